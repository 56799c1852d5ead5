"""Fewer image tokens without training."""

from pcx.token_pruning.ats import Sampling, ats
from pcx.token_pruning.tome import Merging, tome
from pcx.token_pruning.zero_tprune import Pruning

__all__ = ["Merging", "Pruning", "Sampling", "ats", "tome"]
