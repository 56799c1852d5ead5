"""Stateless operations: each checks its arguments, chooses a backend and calls it."""

from pcx.ops.prefix_attention import prefix_attention

__all__ = ["prefix_attention"]
