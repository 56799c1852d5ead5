"""Visual Prompt Tuning."""
