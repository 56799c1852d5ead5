"""Tuned models in files."""
