"""What a trained model is worth and writes: scores, intervals, samples."""
