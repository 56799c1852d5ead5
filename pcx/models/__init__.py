"""Tuned models: a frozen backbone, and what a method adds to it."""
