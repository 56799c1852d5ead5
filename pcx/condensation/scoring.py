"""How much each prompt matters, from gradients, attention or its real removal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from rich.console import Console

from pcx.arguments import whole_number
from pcx.backbones.inputs import data_config
from pcx.backbones.spec import check_unwrapped
from pcx.condensation import SCORES
from pcx.condensation.per_sample import score_in_one_pass
from pcx.condensation.reading import Reader, Scores
from pcx.condensation.removal import Sums, score_by_removal
from pcx.condensation.score_methods import ByRemoval, FromPrompts, PerSample
from pcx.models.vpt.model import VPT
from pcx.tasks.batches import check_loader
from pcx.training.execution import check_execution
from pcx.training.loaders import plain_loader
from pcx.training.objectives import Criterion, Objective, objective_for
from pcx.training.precision import AMP, weights_cast


@overload
def score(
    model: VPT,
    loader,
    *,
    method: str = "taylor",
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Scores: ...


@overload
def score(
    model: VPT,
    loader,
    *,
    method: Sequence[str],
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Scores]: ...


def score(
    model: VPT,
    loader,
    *,
    method: str | Sequence[str] = "taylor",
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Scores | dict[str, Scores]:
    """Scores every prompt over a data set (Prompt Condensation, Eq. 13-16).

    With g = dL_d / dp_i, the gradient of sample d's own loss by prompt i, the methods are

    - taylor: mean_d ||g * p_i||_2, Eq. 16 with the elementwise product (the default);
    - taylor-inner: mean_d |<g, p_i>|, its reading as an inner product;
    - gate: mean_d |sum over heads and queries of dL_d / ds_i|, s_i the attention logits of key i:
      the first-order effect of removing the key;
    - cls-attention: the attention of [CLS] to the prompt, mean over samples and heads ([CLS]-Sim);
    - magnitude: ||p_i||_2; random: uniform, from `seed`;
    - exact: mean_d |L_d without the prompt - L_d|, the prompt really removed, one pass per prompt;
    - exact-zero: the same with the prompt set to zero, Eq. 13's words, which leaves its key in
      place.

    Each sample is read once, in order, without augmentation, dropout or a dropped last batch. Where
    torch.distributed is initialised, all processes must call this; each reads its share of the
    batches, and all get the scores of the whole data set.

    Args:
        model: a VPT; not changed.
        loader: yields (images, labels); not divided among processes.
        method: a method, or several, whose gradients then come from the same pass.
        criterion, objective: as `pcx.fit` takes them.
        amp: "no", "bf16" or "fp16", of what is differentiated. The small differences of "exact" and
            "exact-zero" would drown in it and are always computed without.
        execution: as `pcx.fit` takes it, of the pass that differentiates. A recorded pass takes
            twice the memory. "exact" and "exact-zero" run eagerly.
        seed: of "random".
        checkpoint_dir: folder for the sums so far of "exact" and "exact-zero", a file each, written
            whole or not at all after every batch.
        resume: continue from those files, where they exist. Other data of the same description
            (number of samples, transform) is not noticed.
        progress: show a bar and what was read.

    Returns:
        Per layer, [m_l] float64 on the CPU; for several methods a dict of such lists.

    Raises:
        ValueError: no such method, an empty loader, a model without prompts or (cls-attention)
            without [CLS], a criterion that does not give one value per sample, a loss that is not
            finite (names the sample), float16 that overflows, a checkpoint of other scores, or an
            execution that is not possible.
    """
    check_loader(loader)
    if not isinstance(method, str | Sequence):
        raise ValueError(f"method: {method!r}, expected one of {tuple(SCORES)}, or several")
    whole_number("seed", seed)
    names = (method,) if isinstance(method, str) else tuple(method)
    _check(model, names, amp, execution, checkpoint_dir, resume)
    methods = {name: SCORES[name] for name in names}
    found = {
        name: [s.double().cpu() for s in each.score(model, seed)]
        for name, each in methods.items()
        if isinstance(each, FromPrompts)
    }
    if set(methods) - set(found):
        plain = plain_loader(loader, data_config(model))
        with _as_scored(model):
            chosen = objective_for(objective, criterion)
            reader = Reader(model, plain.loader, chosen, AMP[amp], progress)
            sums = partial(Sums, data=plain.description, folder=checkpoint_dir, resume=resume)
            found |= _from_data(reader, methods, execution, sums)
        _say(reader, plain.description)
    return found[method] if isinstance(method, str) else {name: found[name] for name in names}


def _from_data(
    reader: Reader, methods: Mapping[str, Any], execution: str, sums: Callable[..., Sums]
) -> dict[str, Scores]:
    """The scores of the methods that read data: in one pass, then by removal one after another."""
    one_pass = {n: each for n, each in methods.items() if isinstance(each, PerSample)}
    with weights_cast(reader.model.backbone, reader.amp):
        found = score_in_one_pass(reader, one_pass, execution)
    for name, each in methods.items():
        if isinstance(each, ByRemoval):
            found[name] = score_by_removal(reader, name, each, sums(reader, name))
    return found


def _say(reader: Reader, data: str) -> None:
    Console(quiet=reader.bar.disable).print(
        f"scored {sum(reader.model.counts)} prompts on {reader.total} samples; {data}"
    )


def check_prompted(model: Any) -> None:
    """Raises a ValueError where a model is no `pcx.VPT`, and so has no prompts to score."""
    if not isinstance(model, VPT):
        check_unwrapped(model, "model", "wrap it again afterwards")
        raise ValueError(
            f"model: a {type(model).__name__}, expected a pcx.VPT: other methods have no prompts"
        )


def _check(model, names, amp, execution, checkpoint_dir, resume) -> None:
    """Raises a ValueError where arguments of `score` do not fit, before anything is read."""
    unknown = [name for name in names if name not in SCORES]
    if not names:
        raise ValueError(f"method: got none, expected some of {tuple(SCORES)}")
    if unknown:
        raise ValueError(SCORES.unknown(unknown[0]))
    check_prompted(model)
    observed = {x for n in names for x in getattr(SCORES[n], "observes", ())}
    if "cls" in observed and not (model.spec.has_cls and all(b.is_flat for b in model.spec.blocks)):
        raise ValueError(
            "method: 'cls-attention' needs a [CLS] token in every block's attention; "
            f"{model.spec.family} has none; use another method, such as 'taylor'"
        )
    if not sum(model.counts):
        raise ValueError("model: it has no prompts to score")
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    check_execution(execution, model.prompts[0].device)
    if resume and checkpoint_dir is None:
        raise ValueError("resume: needs checkpoint_dir")
    if checkpoint_dir is None:
        return
    if not any(isinstance(SCORES[name], ByRemoval) for name in names):
        removal = tuple(n for n in SCORES if isinstance(SCORES[n], ByRemoval))
        raise ValueError(f"checkpoint_dir: only {removal} keep sums, got {names}")
    if Path(checkpoint_dir).exists() and not Path(checkpoint_dir).is_dir():
        raise ValueError(f"checkpoint_dir: {checkpoint_dir} is a file, expected a folder")


@contextmanager
def _as_scored(model: VPT) -> Iterator[None]:
    """Eval mode, and no checkpointing: a block would be run again after the prompts were swapped
    back."""
    was_training = model.training
    as_is = not any(module.training for module in model.modules())
    layers = [layer.checkpoint for layer in model.layers]
    backbone_too = getattr(model.backbone, "grad_checkpointing", None)
    if not as_is:
        model.eval()
    model.set_grad_checkpointing(False)
    if backbone_too is not None:
        model.backbone.grad_checkpointing = False
    try:
        with torch.inference_mode(False):
            yield
    finally:
        if not as_is:
            model.train(was_training)
        for layer, checkpoint in zip(model.layers, layers, strict=True):
            layer.checkpoint = checkpoint
        if backbone_too is not None:
            model.backbone.grad_checkpointing = backbone_too
