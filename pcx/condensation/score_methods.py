"""The methods of scoring."""

from __future__ import annotations

GRADIENT = ("taylor", "taylor-inner", "gate")


ONE_PASS = (*GRADIENT, "cls-attention")


REMOVAL = ("exact", "exact-zero")


METHODS = (*ONE_PASS, "magnitude", "random", *REMOVAL)
