"""What users give, in checks and messages: numbers of any type that stands for one, and names."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def whole_number(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """The value as an int; NumPy's whole numbers are taken too, booleans are not.

    Raises:
        ValueError: it is no whole number, or out of range; the message names the argument.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: {value!r}, expected a whole number, {allowed}")
    return found


def real_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    expected: str | None = None,
) -> float:
    """The value as a finite float within its bounds; NumPy's numbers are taken too.

    Args:
        name: of the argument.
        value: what was given.
        least, above, most, below: bounds; `above` and `below` are excluded.
        expected: what the message says was expected, made from the bounds by default.

    Raises:
        ValueError: it is no such number; the message names the argument.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:
        found = math.inf
    inside = (
        math.isfinite(found)
        and (least is None or found >= least)
        and (above is None or found > above)
        and (most is None or found <= most)
        and (below is None or found < below)
    )
    if not inside:
        bounds = {"or more": least, "or less": most}
        parts = [f"above {above:g}"] if above is not None else []
        parts += [f"{bound:g} {word}" for word, bound in bounds.items() if bound is not None]
        parts += [f"under {below:g}"] if below is not None else []
        said = expected or " ".join(["a finite number,", " and ".join(parts)]).rstrip(", ")
        raise ValueError(f"{name}: {value!r}, expected {said}")
    return found


def some_of(names: Iterable[str], shown: int = 3) -> str:
    """The first names, and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
