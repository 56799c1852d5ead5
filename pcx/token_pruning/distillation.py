"""Training of a model for pruning, under soft masks and with the unpruned model as its teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones.outputs import logits_of
from pcx.backbones.spec import find_spec
from pcx.models.base import TunedModel
from pcx.models.block_forward import found_on, set_read_tokens
from pcx.token_pruning import stages
from pcx.token_pruning.soft_masks import TEMPERATURE, SoftPruning, soft_prune
from pcx.training.evaluation import accelerator_for
from pcx.training.fitting import fit

WEIGHT = 0.5  # weight of the distillation term and of the KL term, as DynamicViT publishes them


def finetune(
    model: nn.Module,
    loader,
    *,
    layers: Sequence[int],
    keep: float | Sequence[float],
    iters: int | Sequence[int],
    epochs: int,
    lr: float,
    temperature: float = TEMPERATURE,
    cls_boost: bool = True,
    variances: tuple[float, float] = stages.VARIANCES,
    distill: float = WEIGHT,
    kl: float = WEIGHT,
    opt: str = "momentum",
    weight_decay: float = 1e-3,
    clip_grad: float | None = None,
    amp: str = "no",
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Trains a model for `pcx.zero_tprune`, under soft masks (Zero-TPrune, Sec. C).

    The unpruned model is the teacher, and the loss is `three_term_loss`. The model is left
    unpruned: prune it afterwards with the same `layers`, `keep` and `iters`, and `similar=0`.
    Each setting needs a training of its own, and the unpruned model gets worse. `pcx.fit` of a
    model that is pruned already is cheaper (benchmarks/zero_tprune_finetune.py).

    Args:
        model: a tuned model, or a vision transformer, whose parameters that require gradients are
            trained. It is trained already and not pruned.
        loader: as `pcx.fit` takes it.
        layers, keep, iters, temperature, cls_boost, variances: as `soft_prune` takes them.
        epochs, lr: as `pcx.fit` takes them, without warm-up. A tuned model's record is kept.
        distill, kl: weights of the loss's second and third term, 0 or more.
        opt, weight_decay, clip_grad, amp, seed, progress: as `pcx.fit` takes them.

    Returns:
        The history, as `pcx.fit` returns it. Loss and accuracy are those under soft masks.

    Raises:
        ValueError: an argument does not fit, or the model cannot be pruned softly.
        NonFiniteLoss: as `pcx.fit` raises it. Masks and teacher are gone after any exception.

    Example:
        >>> setting = {"layers": (3, 6, 9), "keep": 0.7, "iters": (30, 5, 1)}
        >>> pcx.token_pruning.finetune(model, loader, **setting, epochs=5, lr=0.1)
        >>> pruning = pcx.zero_tprune(model, **setting)
    """
    _check_weights(distill, kl)
    if found_on(model):
        raise ValueError("model: its tokens are pruned already; call the handle's remove() first")
    with accelerator_for(amp, seed) as accelerator:
        model.to(accelerator.device)  # before the teacher shares its memory
    teacher = Teacher(model)
    settings: dict[str, Any] = {"layers": layers, "keep": keep, "iters": iters}
    settings |= {"temperature": temperature, "cls_boost": cls_boost, "variances": variances}
    options: dict[str, Any] = {"epochs": epochs, "lr": lr, "opt": opt, "amp": amp, "seed": seed}
    options |= {"weight_decay": weight_decay, "clip_grad": clip_grad, "progress": progress}
    loss = _DistillationLoss(teacher, soft_prune(model, **settings), distill, kl)
    record = copy.copy(model.record) if isinstance(model, TunedModel) else None
    hook = model.register_forward_hook(loss.run_teacher)
    try:
        return fit(model, loader, warmup_epochs=0, criterion=loss.criterion, **options)
    finally:
        hook.remove()
        loss.soft.remove()
        if isinstance(model, TunedModel) and record is not None:
            model.record = record


def three_term_loss(
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    mask: Tensor,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    *,
    distill: float = WEIGHT,
    kl: float = WEIGHT,
) -> Tensor:
    """CE + lambda_distill L_distill + lambda_KL L_KL (Zero-TPrune, Sec. C, Eq. 7).

    L_distill = sum_i m_i |t_i - t'_i|^2 / (D sum_i m_i), over the tokens t of the last block and
    the teacher's tokens t'. Each token is normalised to mean 0 and variance 1 over its features,
    because DynamicViT compares them behind the last norm. The masks m_i are constants here: no
    gradient flows into them.

    L_KL = KL(y || y') of the predicted classes, where y is the student's and y' the teacher's
    distribution. The weights of 0.5 are DynamicViT's.

    Args:
        logits, teacher_logits: [B, C].
        labels: [B], integers in 0..C-1.
        tokens: [B, N, D], as `SoftPruning.tokens` gives them.
        teacher_tokens: [B, N, D], as a `Teacher` gives them.
        mask: [B, N], the last of `SoftPruning.masks`.
        distill, kl: lambda_distill and lambda_KL, 0 or more.

    Returns:
        [B], the loss of each sample.

    Raises:
        ValueError: student and teacher differ in shape, or a weight is negative.
    """
    _check_weights(distill, kl)
    for name, mine, theirs in (
        ("logits", logits, teacher_logits),
        ("tokens", tokens, teacher_tokens),
    ):
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{name}: shape {tuple(mine.shape)}, but the teacher's is {tuple(theirs.shape)}, "
                "expected equal ones"
            )
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = tokens.shape[-1:]
    student, teacher = (F.layer_norm(t.to(wide), size) for t in (tokens, teacher_tokens))
    weights = mask.detach().to(wide)
    distance = (student - teacher).square().mean(-1)  # [B, N]
    likeness = (weights * distance).sum(1) / weights.sum(1)
    mine, theirs = logits.to(wide).log_softmax(-1), teacher_logits.to(wide).log_softmax(-1)
    divergence = (mine.exp() * (mine - theirs)).sum(-1)
    return F.nll_loss(mine, labels.long(), reduction="none") + distill * likeness + kl * divergence


class Teacher:
    """A frozen copy of a model; a tuned model's copy shares the backbone's memory.

    Called with images it returns logits [B, C] and the output of the last block [B, N, D].

    Args:
        model: a `pcx.VPT`, or another model that `pcx.zero_tprune` takes, not pruned.
    """

    def __init__(self, model: nn.Module):
        if isinstance(model, TunedModel):
            self.model: Any = model.copy()
            blocks = model.spec.blocks_in(self.model.plain_backbone())
        else:
            self.model = copy.deepcopy(model)
            blocks = find_spec(self.model).blocks_in(self.model)
        self.model.eval().requires_grad_(False)
        self.last: Any = blocks[-1]
        set_read_tokens(self.last, None)  # all tokens are compared

    @torch.no_grad()
    def __call__(self, images: Any) -> tuple[Tensor, Tensor]:
        outputs: list[Any] = []
        hook = self.last.register_forward_hook(lambda _, __, out: outputs.append(out))
        try:
            predictions = self.model(images)
        finally:
            hook.remove()
        tokens = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        return logits_of(predictions), tokens


class _DistillationLoss:
    """`three_term_loss` as a criterion of `fit`, with the teacher's outputs of the same batch."""

    def __init__(self, teacher: Teacher, soft: SoftPruning, distill: float, kl: float):
        self.teacher, self.soft = teacher, soft
        self.distill, self.kl = distill, kl
        self.teacher_outputs: tuple[Tensor, Tensor] | None = None  # logits, tokens

    def run_teacher(self, _: nn.Module, arguments: tuple, __: Tensor) -> None:
        """A forward hook of the student: gives the teacher the same batch."""
        self.teacher_outputs = self.teacher(*arguments)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.teacher_outputs is not None
        tokens, mask = self.soft.tokens, self.soft.masks[-1]
        return three_term_loss(
            logits, labels, tokens, mask, *self.teacher_outputs, distill=self.distill, kl=self.kl
        )


def _check_weights(distill: float, kl: float) -> None:
    for name, weight in {"distill": distill, "kl": kl}.items():
        if not weight >= 0:
            raise ValueError(f"{name}: {weight}, expected a weight of 0 or more")
