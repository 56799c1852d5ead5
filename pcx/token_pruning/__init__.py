"""Token reduction: methods that drop, merge, sample or fade image tokens in a model's layers."""

from pcx.token_pruning.budget_search import SearchResult, search
from pcx.token_pruning.distillation import Teacher, finetune, three_term_loss
from pcx.token_pruning.dropping import TABLE_1, VARIANTS, Pruning, zero_tprune
from pcx.token_pruning.merging import Merging, tome
from pcx.token_pruning.sampling import Sampling, ats
from pcx.token_pruning.soft_masks import SoftPruning, soft_prune

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
