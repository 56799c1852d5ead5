"""pcx: Visual Prompt Tuning of vision transformers, exact and fast, and Prompt Condensation.

`import pcx` loads no torch, so that `pcx --help` is quick. The first use of a name below loads the
modules of all of them, and with these the subpackages.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "MLP",
    "SCORES",
    "SCT",
    "SETR",
    "VPT",
    "Adapter",
    "Bias",
    "Border",
    "Condensation",
    "Full",
    "Linear",
    "NonFiniteLoss",
    "Partial",
    "PeftModel",
    "Sidetune",
    "condense",
    "ensemble",
    "evaluate",
    "export",
    "fit",
    "freeze",
    "load",
    "multi_task",
    "multiply_adds",
    "predict",
    "prefix_attention",
    "save",
    "score",
    "select",
    "token_cost",
    "weighted_pagerank",
    "zero_tprune",
]

if TYPE_CHECKING:
    from pcx.analysis.cost import multiply_adds
    from pcx.analysis.prompt_cost import token_cost
    from pcx.backbones.setr import SETR
    from pcx.checkpoints.saving import load, save
    from pcx.condensation import SCORES
    from pcx.condensation.condensing import condense
    from pcx.condensation.scoring import score
    from pcx.condensation.selection import select
    from pcx.deployment.exporting import export
    from pcx.deployment.freezing import freeze
    from pcx.deployment.multi_task import ensemble, multi_task
    from pcx.deployment.predicting import predict
    from pcx.models import METHODS
    from pcx.models.adapter import Adapter
    from pcx.models.bias import Bias
    from pcx.models.border import Border
    from pcx.models.full import Full
    from pcx.models.linear import Linear
    from pcx.models.mlp import MLP
    from pcx.models.partial import Partial
    from pcx.models.peft_model import PeftModel
    from pcx.models.record import Condensation
    from pcx.models.sct import SCT
    from pcx.models.sidetune import Sidetune
    from pcx.models.vpt.model import VPT
    from pcx.ops.prefix_attention import prefix_attention
    from pcx.ops.weighted_pagerank import weighted_pagerank
    from pcx.token_pruning.dropping import zero_tprune
    from pcx.training.evaluation import evaluate
    from pcx.training.fitting import fit
    from pcx.training.losses import NonFiniteLoss

# The same names at run time: where each is defined.
_MODULES = {
    "multiply_adds": "pcx.analysis.cost",
    "token_cost": "pcx.analysis.prompt_cost",
    "SETR": "pcx.backbones.setr",
    "load": "pcx.checkpoints.saving",
    "save": "pcx.checkpoints.saving",
    "SCORES": "pcx.condensation",
    "condense": "pcx.condensation.condensing",
    "score": "pcx.condensation.scoring",
    "select": "pcx.condensation.selection",
    "export": "pcx.deployment.exporting",
    "freeze": "pcx.deployment.freezing",
    "ensemble": "pcx.deployment.multi_task",
    "multi_task": "pcx.deployment.multi_task",
    "predict": "pcx.deployment.predicting",
    "METHODS": "pcx.models",
    "Adapter": "pcx.models.adapter",
    "Bias": "pcx.models.bias",
    "Border": "pcx.models.border",
    "Full": "pcx.models.full",
    "Linear": "pcx.models.linear",
    "MLP": "pcx.models.mlp",
    "Partial": "pcx.models.partial",
    "Sidetune": "pcx.models.sidetune",
    "PeftModel": "pcx.models.peft_model",
    "Condensation": "pcx.models.record",
    "SCT": "pcx.models.sct",
    "VPT": "pcx.models.vpt.model",
    "prefix_attention": "pcx.ops.prefix_attention",
    "weighted_pagerank": "pcx.ops.weighted_pagerank",
    "zero_tprune": "pcx.token_pruning.dropping",
    "evaluate": "pcx.training.evaluation",
    "NonFiniteLoss": "pcx.training.losses",
    "fit": "pcx.training.fitting",
}
_SUBPACKAGES = (
    "analysis",
    "backbones",
    "checkpoints",
    "condensation",
    "deployment",
    "models",
    "ops",
    "tasks",
    "token_pruning",
    "training",
)

if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> Any:
        """A public name or a subpackage, whose first use loads all public names.

        All at once, so that `pcx.backbones.inputs`, say, is there whatever was used before it.
        """
        if name not in _MODULES and name not in _SUBPACKAGES:
            raise AttributeError(f"module 'pcx' has no attribute {name!r}")
        found = {public: getattr(import_module(m), public) for public, m in _MODULES.items()}
        globals().update(found)
        return found[name] if name in found else import_module(f"pcx.{name}")


def __dir__() -> list[str]:
    special = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *_SUBPACKAGES, *special})


if "torch" in sys.modules:  # a program may use torch.ops.pcx.* alone
    for _op in ("prefix_attention", "logit_gate", "prompt_score", "weighted_pagerank"):
        import_module(f"pcx.ops.{_op}")
    import_module("pcx.ops.token_choice")
