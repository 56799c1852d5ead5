"""Experiments: runs that end in figures and tables."""
