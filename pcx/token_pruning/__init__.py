"""Pruning of image tokens without training."""
