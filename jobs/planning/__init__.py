"""What a training will take on devices that nobody has paid for yet."""
