"""Training: settings, rows to batches, the loop and its events, checkpoints, TRL, generation and scores, the demo."""
