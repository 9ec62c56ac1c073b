"""Training: rows to batches, a plain loop, generation and scores, a loss plot."""
