"""Names of the metrics that more than one part of tvq reads or writes."""

TRAIN_LOSS = "train/loss_nats_per_token"
TRAIN_TOKENS = "train/tokens"
"""Trained on until then; stored with every point, so that curves can be drawn over tokens."""
EVAL_LOSS = "eval/loss_nats_per_token"
EVAL_BITS = "eval/bits_per_byte"
TOKENS_PER_SECOND = "perf/tokens_per_second"

DECIDING = (EVAL_BITS, EVAL_LOSS)
"""What may decide a promotion: figures of the validation split. The test split never does."""
