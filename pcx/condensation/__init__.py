"""Prompt Condensation: score, select, fine-tune."""
