"""Runs whose results are figures and tables."""
