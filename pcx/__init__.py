"""pcx: Visual Prompt Tuning of vision transformers, exact and fast, and Prompt Condensation."""

from pcx.analysis.cost import multiply_adds, token_cost
from pcx.checkpoints.saving import load, save
from pcx.condensation.condensing import condense
from pcx.condensation.scoring import score
from pcx.condensation.selection import select
from pcx.deployment.freezing import freeze
from pcx.deployment.multi_task import ensemble
from pcx.models.record import Condensation
from pcx.models.vpt.model import VPT
from pcx.ops.prefix_attention import prefix_attention
from pcx.ops.weighted_pagerank import weighted_pagerank
from pcx.token_pruning.dropping import zero_tprune
from pcx.training.evaluation import evaluate
from pcx.training.fitting import NonFiniteLoss, fit

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
