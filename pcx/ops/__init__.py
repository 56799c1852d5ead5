"""Stateless operations: each checks its arguments, chooses a backend and calls it."""

from pcx.ops.prefix_attention import prefix_attention
from pcx.ops.weighted_pagerank import weighted_pagerank

__all__ = ["prefix_attention", "weighted_pagerank"]
