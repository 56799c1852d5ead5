"""Fewer image tokens: without training, or trained for."""

from pcx.token_pruning.ats import Sampling, ats
from pcx.token_pruning.finetune import Teacher, finetune, three_term_loss
from pcx.token_pruning.search import SearchResult, search
from pcx.token_pruning.soft import SoftPruning, soft_prune
from pcx.token_pruning.tome import Merging, tome
from pcx.token_pruning.zero_tprune import TABLE_1, VARIANTS, Pruning, zero_tprune

__all__ = [
    "TABLE_1",
    "VARIANTS",
    "Merging",
    "Pruning",
    "Sampling",
    "SearchResult",
    "SoftPruning",
    "Teacher",
    "ats",
    "finetune",
    "search",
    "soft_prune",
    "three_term_loss",
    "tome",
    "zero_tprune",
]
