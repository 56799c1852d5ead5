"""Stateless operations: each checks its arguments, chooses a backend and calls it."""
