"""From a corpus to deterministic batches: documents, tokens, shards, windows, order, loader."""
