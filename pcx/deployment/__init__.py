"""Tuned models for inference alone."""
