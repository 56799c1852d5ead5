"""Training and evaluation of any tuned model."""
