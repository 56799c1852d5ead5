"""Ops: stateless functions that check their arguments, choose a backend and call it."""
