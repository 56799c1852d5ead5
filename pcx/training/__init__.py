"""Training and evaluation of any tuned model."""

from pcx.registry import Registry

# A new objective is one class and one line here.
OBJECTIVES = Registry(
    "objective",
    {
        "single-label": "pcx.training.objectives:SingleLabel",
        "multi-label": "pcx.training.objectives:MultiLabel",
        "soft": "pcx.training.objectives:SoftTargets",
        "regression": "pcx.training.objectives:Regression",
        "segmentation": "pcx.training.objectives:Segmentation",
    },
)
