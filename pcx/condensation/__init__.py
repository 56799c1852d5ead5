"""Prompt Condensation: score, select, fine-tune."""

from pcx.registry import Registry

# A new score is one file and one line here: a `FromPrompts`, `PerSample` or `ByRemoval` of
# pcx/condensation/score_methods.py, which say what a score must observe and how it reduces that.
SCORES = Registry(
    "method",
    {
        "taylor": "pcx.condensation.score_methods:TAYLOR",
        "taylor-inner": "pcx.condensation.score_methods:TAYLOR_INNER",
        "gate": "pcx.condensation.score_methods:GATE",
        "cls-attention": "pcx.condensation.score_methods:CLS_ATTENTION",
        "magnitude": "pcx.condensation.score_methods:MAGNITUDE",
        "random": "pcx.condensation.score_methods:RANDOM",
        "exact": "pcx.condensation.score_methods:EXACT",
        "exact-zero": "pcx.condensation.score_methods:EXACT_ZERO",
    },
)
