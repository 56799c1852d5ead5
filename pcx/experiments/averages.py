"""Averages over tasks and groups of tasks, intervals over seeds, and Wilcoxon's test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from pcx.extras import need

# VTAB's groups (Zhai et al., 2019), by the names of the community layout.
VTAB_GROUPS: dict[str, tuple[str, ...]] = {
    "natural": (
        "caltech101",
        "cifar",
        "dtd",
        "oxford_flowers102",
        "oxford_iiit_pet",
        "sun397",
        "svhn",
    ),
    "specialized": ("diabetic_retinopathy", "eurosat", "patch_camelyon", "resisc45"),
    "structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "dsprites_loc",
        "dsprites_ori",
        "kitti",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}
_ALIASES = {"cifar100": "cifar", "oxford_pet": "oxford_iiit_pet"}
CONFIDENCE = 0.95


def group_of(task: str) -> str:
    """The group of a task: VTAB's own, else what stands before ':' in its name."""
    family, colon, name = task.partition(":")
    if family == "vtab" and colon:
        name = _ALIASES.get(name, name)
        return next((group for group, names in VTAB_GROUPS.items() if name in names), family)
    return family


def groups_of(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Tasks by their group, in the order in which they come."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(group_of(task), []).append(task)
    return found


def mean_of_tasks(accuracies: Mapping[str, float]) -> float:
    """The mean of all tasks, each of which weighs the same."""
    return statistics.fmean(accuracies.values())


def mean_of_groups(accuracies: Mapping[str, float]) -> float:
    """The mean of the groups' means, each of which weighs the same."""
    groups = groups_of(list(accuracies))
    return statistics.fmean(
        statistics.fmean(accuracies[task] for task in tasks) for tasks in groups.values()
    )


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% t-interval of a mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    need("scipy", "an interval")
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def wilcoxon(method: Sequence[float], other: Sequence[float]) -> float:
    """The p of Wilcoxon's one-tailed signed-rank test over tasks (VPT paper, Appendix, Table 10).

    Args:
        method: mean accuracies by task, of the method that is asked to be better.
        other: of the other, in the same order.

    Returns:
        How likely differences like these are where the methods are equally good; 1 where they are
        the same on every task.
    """
    need("scipy", "Wilcoxon's test")
    from scipy.stats import wilcoxon as signed_rank

    if all(a == b for a, b in zip(method, other, strict=True)):
        return 1.0
    return float(signed_rank(method, other, alternative="greater").pvalue)
