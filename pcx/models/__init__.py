"""Tuned models: a frozen backbone, and what a method adds to it."""

from pcx.registry import Registry

# A new method is one file and one line here. The name is the key in saved files.
METHODS = Registry(
    "method",
    {
        "vpt": "pcx.models.vpt.model:VPT",
        "sct": "pcx.models.sct:SCT",
        "linear": "pcx.models.linear:Linear",
        "mlp": "pcx.models.mlp:MLP",
        "partial": "pcx.models.partial:Partial",
        "bias": "pcx.models.bias:Bias",
        "adapter": "pcx.models.adapter:Adapter",
        "sidetune": "pcx.models.sidetune:Sidetune",
        "border": "pcx.models.border:Border",
        "full": "pcx.models.full:Full",
        "peft": "pcx.models.peft_model:PeftModel",
    },
)

# Ways to fewer image tokens that a saved model is set up with again; each is a function of a model
# and keyword arguments. A new one is one file of pcx/token_pruning and one line here.
REDUCTIONS = Registry(
    "token_reduction",
    {
        "zero_tprune": "pcx.token_pruning.dropping:zero_tprune",
        "tome": "pcx.token_pruning.merging:tome",
        "ats": "pcx.token_pruning.sampling:ats",
        "soft_prune": "pcx.token_pruning.soft_masks:soft_prune",
    },
)
# How a model's head starts; the first is the default.
HEAD_INITS = ("trunc-normal", "published", "keep")
