"""pcx: Visual Prompt Tuning of vision transformers, exact and fast, and Prompt Condensation."""

from pcx.condense import Condensation, condense
from pcx.cost import multiply_adds, token_cost
from pcx.evaluate import evaluate
from pcx.fit import NonFiniteLoss, fit
from pcx.freeze import ensemble, freeze
from pcx.ops import prefix_attention, weighted_pagerank
from pcx.save import load, save
from pcx.score import score
from pcx.select import select
from pcx.token_pruning.zero_tprune import zero_tprune
from pcx.vpt import VPT

__version__ = "0.1.0"

__all__ = [
    "VPT",
    "Condensation",
    "NonFiniteLoss",
    "condense",
    "ensemble",
    "evaluate",
    "fit",
    "freeze",
    "load",
    "multiply_adds",
    "prefix_attention",
    "save",
    "score",
    "select",
    "token_cost",
    "weighted_pagerank",
    "zero_tprune",
]
