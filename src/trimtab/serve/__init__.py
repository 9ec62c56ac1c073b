"""What serves many adapters on one model."""
