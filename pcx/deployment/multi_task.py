"""Several tuned models on one backbone, run in one batch: all for each image, or one each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.checkpoints.fingerprint import backbone_fingerprint
from pcx.deployment.freezing import Frozen, make_fast
from pcx.models.base import check_choice
from pcx.models.block_forward import reduction_of
from pcx.models.vpt.model import VPT
from pcx.models.vpt.prompts import Chosen
from pcx.training.execution import EXECUTIONS
from pcx.training.precision import AMP


class Ensemble(Frozen):
    """Several VPTs on one backbone; made by `pcx.ensemble`."""

    def __init__(self, backbone: nn.Module, members: int):
        super().__init__(backbone)
        self.members = members

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W] -> each member's logits, [k, B, C]."""
        repeated = x.expand(self.members, *x.shape).flatten(0, 1)  # member by member
        return super().forward(repeated, **inputs).unflatten(0, (self.members, -1))


class MultiTask(Frozen):
    """Several VPTs on one backbone, each for its samples of a batch; made by `pcx.multi_task`.

    Attributes:
        num_classes: of each model.
        tasks: what each model was trained on, as its record says; None where it does not.
    """

    def __init__(
        self,
        backbone: nn.Module,
        chosen: Chosen,
        num_classes: Sequence[int],
        tasks: Sequence[str | None],
        amp: torch.dtype | None,
        execution: str,
    ):
        super().__init__(backbone, amp, execution)
        self.num_classes, self.tasks = tuple(num_classes), tuple(tasks)
        self._chosen = chosen

    def forward(  # type: ignore[override]  # it needs one argument more
        self, x: Tensor, task: Tensor | Sequence[int], **inputs: Any
    ) -> Tensor:
        """Images [B, 3, H, W] and the model of each -> logits [B, C], C of the most classes.

        Args:
            x: the images.
            task: [B], the place of each image's model among those given. A tensor on a GPU is not
                looked at, which would wait for the GPU.
            inputs: what else the backbone takes.

        Returns:
            The logits; behind a model's own classes they are -inf, so that `softmax` and `argmax`
            are those of its classes.

        Raises:
            ValueError: `task` is not one whole number for each image, or there is no such model.
        """
        return super().forward(x, task=self._checked(x, task), **inputs)

    def _checked(self, x: Tensor, task: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(task)
        whole = not index.is_floating_point() and index.dtype != torch.bool
        if not whole or index.shape != (len(x),):
            raise ValueError(
                f"task: {index.dtype} of shape {tuple(index.shape)}, expected a whole number for "
                f"each of {len(x)} images"
            )
        most = len(self.num_classes) - 1
        if (
            index.device.type == "cpu"
            and len(index)
            and not 0 <= int(index.min()) <= int(index.max()) <= most
        ):
            raise ValueError(f"task: {index.tolist()}, expected numbers from 0 to {most}")
        return index.to(x.device, torch.int64)

    def _logits(self, backbone: nn.Module, x: Tensor, **inputs: Any) -> Tensor:
        self._chosen.sets = inputs.pop("task")
        try:
            return super()._logits(backbone, x, **inputs)
        finally:
            self._chosen.sets = None


class _ChosenHeads(nn.Module):
    """The heads of several models, of which each sample has one; -inf behind its classes."""

    def __init__(self, heads: Sequence[nn.Module], sizes: Sequence[int], chosen: Chosen):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.missing = [max(sizes) - size for size in sizes]
        self._chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        # All heads for all samples: they are small, and shapes stay the same for every mixture.
        found = [
            F.pad(head(x), (0, missing), value=-torch.inf)
            for head, missing in zip(self.heads, self.missing, strict=True)
        ]
        index = self._chosen.sets
        assert index is not None
        return torch.stack(found, 1)[torch.arange(len(index), device=index.device), index]


class _MemberHeads(nn.Module):
    """The k members' heads, each for its part of the batch."""

    def __init__(self, heads: Sequence[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (len(self.heads), -1))
        return torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)])


@torch.no_grad()
def ensemble(models: Sequence[VPT]) -> Ensemble:
    """Several VPTs on one backbone as one model, run in one batch.

    Each image passes the backbone once per member; the members' prompts are sets of keys and values
    of one attention call, ragged where the members were condensed.

    Args:
        models: VPTs of the same backbone, of any counts, with heads of one size.

    Returns:
        A module for inference that maps images [B, 3, H, W] to logits [k, B, C];
        `.softmax(-1).mean(0)` averages the members.

    Raises:
        ValueError: no models, another backbone or size of head, or prompts that do not
            fold.

    Example:
        >>> probabilities = pcx.ensemble([a, b])(images).softmax(-1).mean(0)
    """
    copied = _on_one_backbone(models, None)
    members = zip(*(model.heads for model in models), strict=True)
    for name, heads in zip(copied.spec.heads, members, strict=True):
        copied.backbone.set_submodule(name, _MemberHeads([copy.deepcopy(h).eval() for h in heads]))
    return Ensemble(copied.backbone, members=len(models))


@torch.no_grad()
def multi_task(models: Sequence[VPT], *, amp: str = "no", execution: str = "auto") -> MultiTask:
    """Several VPTs on one backbone as one model, of which each image of a batch names its own.

    The images of all tasks pass the backbone together, in one batch. The tasks' prompts are sets
    of keys and values of one attention call, ragged where counts differ.

    Args:
        models: VPTs of the same backbone, of any counts and numbers of classes.
        amp, execution: as `pcx.freeze` takes them.

    Returns:
        A module for inference that maps images [B, 3, H, W] and a task index [B] to logits [B, C]
        of the most classes. To rounding they are those of each model that `pcx.freeze` made alone.

    Raises:
        ValueError: no models, another backbone, prompts that do not fold, heads that read another
            number of tokens, or amp or execution that there is not.

    Example:
        >>> served = pcx.multi_task([cars, birds], amp="bf16")
        >>> classes = served(images, [0, 1, 1, 0]).argmax(-1)
    """
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    check_choice("execution", execution, EXECUTIONS)
    chosen, sizes = Chosen(), [model.num_classes for model in models]
    copied = _on_one_backbone(models, chosen)
    members = zip(*(model.heads for model in models), strict=True)
    for name, heads in zip(copied.spec.heads, members, strict=True):
        own = [copy.deepcopy(head).eval() for head in heads]
        copied.backbone.set_submodule(name, _ChosenHeads(own, sizes, chosen))
    make_fast(copied.backbone, copied.spec, AMP[amp])
    tasks = [model.record.task for model in models]
    return MultiTask(copied.backbone, chosen, sizes, tasks, AMP[amp], execution)


def _on_one_backbone(models: Sequence[VPT], chosen: Chosen | None) -> VPT:
    """A copy of the first whose layers hold the prompts' keys and values of all.

    Args:
        models: of one backbone; their heads are alike where there is nothing that chooses.
        chosen: which sample has whose; None for as many equal parts of a batch.

    Raises:
        ValueError: they do not fit together.
    """
    if not models:
        raise ValueError("models: none given")
    for i, model in enumerate(models):
        if not isinstance(model, VPT):
            raise ValueError(f"models[{i}]: a {type(model).__name__}, expected a pcx.VPT")
        model.check_folds(f"models[{i}]")
    _check_alike(models, heads=chosen is None)
    copied = models[0].copy().eval()
    copied.path = "folded"
    for i, layer in enumerate(copied.layers):
        sets = _joined([m.layers[i].constants_of_prompts() for m in models])
        layer.make_constant(*sets, chosen)
    return copied


def _joined(
    members: list[list[tuple[Tensor, Tensor]]],
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Joins members' keys and values into padded sets [k, H, m, d]; lengths where they differ."""
    counts = [pairs[0][0].shape[-2] for pairs in members]
    most = max(counts)

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(t, (0, 0, 0, most - t.shape[-2])) for t in tensors])

    calls = [
        (stacked([key for key, _ in call]), stacked([value for _, value in call]))
        for call in zip(*members, strict=True)
    ]
    lengths = torch.tensor(counts, device=calls[0][0].device) if len(set(counts)) > 1 else None
    return calls, lengths


def _check_alike(models: Sequence[VPT], *, heads: bool) -> None:
    """Raises a ValueError where the models do not fit together; `heads` of one size, or any."""
    first = models[0]
    sizes = [[tuple(p.shape) for head in m.heads for p in head.parameters()] for m in models]
    kept = backbone_fingerprint(first)
    for i, model in enumerate(models[1:], 1):
        if backbone_fingerprint(model) != kept:
            raise ValueError(f"models[{i}]: its backbone's weights are not those of models[0]")
        changed = _of_backbone(model)
        other = [n for n, t in _of_backbone(first).items() if not torch.equal(t, changed[n])]
        if other:
            raise ValueError(
                f"models[{i}]: it trained {other[0]!r} of the backbone, which models[0] has with "
                "other values; one backbone is run for all, so give models that train "
                "prompts and heads alone"
            )
        if reduction_of(model) != reduction_of(first):
            raise ValueError(
                f"models[{i}]: its tokens are reduced by {reduction_of(model)}, and those of "
                f"models[0] by {reduction_of(first)}; one backbone is run for all, so "
                "set the same up on each, or none"
            )
        same_heads = sizes[i] == sizes[0] if heads else len(sizes[i]) == len(sizes[0])
        if model.read_only != first.read_only or not same_heads:
            raise ValueError(
                f"models[{i}]: heads of {sizes[i]} (read_only={model.read_only}), expected "
                f"{sizes[0]} (read_only={first.read_only}) as models[0] has"
            )


def _of_backbone(model: VPT) -> dict[str, Tensor]:
    """The model's own tensors among the backbone's, but for its heads."""
    heads = tuple(f"backbone.{name}." for name in model.spec.heads)
    own = model.own_state().items()
    return {n: t for n, t in own if n.startswith("backbone.") and not n.startswith(heads)}
