"""Monte-Carlo search of where and how much to prune (Zero-TPrune, Sec. 4.1 and G.5)."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset

from pcx.backbones.inputs import data_config
from pcx.backbones.outputs import logits_of
from pcx.models.block_forward import found_on
from pcx.token_pruning.budget_space import Space
from pcx.token_pruning.dropping import zero_tprune
from pcx.token_pruning.schedule import arguments_of
from pcx.training.batches import images_and_labels
from pcx.training.loaders import plain_loader, rebuilt
from pcx.training.objectives import SingleLabel
from pcx.training.precision import AMP

if TYPE_CHECKING:
    import optuna

SEARCHED = ("layers", "keep", "iters", "similar")


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        study: Optuna's, of all trials: their values are accuracies, percent; their user attributes
            "setting" and "multiply_adds" what was evaluated.
        fixed: as given.
        unpruned: accuracy of the model without pruning on the same images, percent.
        images: on how many.
    """

    study: optuna.Study
    fixed: dict[str, Any]
    unpruned: float
    images: int

    @property
    def best(self) -> dict[str, Any]:
        """The arguments of `pcx.zero_tprune` of the highest accuracy, of equal ones the first."""
        setting = self._trial.user_attrs["setting"]
        return {**{name: tuple(values) for name, values in setting.items()}, **self.fixed}

    @property
    def accuracy(self) -> float:
        """Of `best`, percent, on the images by which it was chosen; on others expect less."""
        return self._trial.values[0]

    @property
    def multiply_adds(self) -> float:
        """Of `best`, per image, as `pcx.multiply_adds` counts them."""
        return self._trial.user_attrs["multiply_adds"]

    @property
    def _trial(self) -> optuna.trial.FrozenTrial:
        return max(_evaluated(self.study), key=lambda trial: (trial.values[0], -trial.number))


def search(
    model: nn.Module,
    loader,
    *,
    budget: float,
    trials: int = 100,
    images: int = 1024,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    study_name: str = "zero_tprune",
    amp: str = "no",
    progress: bool = True,
) -> SearchResult:
    """Draws settings of `pcx.zero_tprune` at one budget and evaluates each (Sec. 4.1, G.5).

    Drawn are how many layers prune, three or more, and which, the last one never; each layer's keep
    ratio, 0.5 to 0.99; its similar patches, up to a tenth of all; and its iterations: 30 to 50 in
    the first three layers, 1 in the last three, 5 to 10 between (G.1). Every setting then meets the
    budget, within a few whole patches and never above it: where dropping the similar patches alone
    takes less, fewer of them are dropped, and nothing else is; otherwise the keep ratios are raised
    to one power, found by bisection, but none is brought under 0.3. Layers that cannot reach the
    budget are joined by more, in an order that was drawn too, so that no setting is rejected.

    Args:
        model: as `pcx.zero_tprune` takes it, not pruned; left as it was found, also by an error.
        loader: yields (images, labels) of validation data. A DataLoader over a map-style data set
            is read unshuffled and without augmentation.
        budget: share of the unpruned model's multiply-adds, in (0, 1], or a number of them, above
            1; with the patch embedding, as `pcx.multiply_adds` counts them.
        trials: settings to evaluate, with those that the storage has already.
        images: to evaluate every setting on, the same for all: drawn by the seed, or the first
            ones of a loader whose order cannot be chosen; held on the model's device.
        seed: of images and settings, 0 or more.
        fixed: further arguments of `pcx.zero_tprune`, the same in all settings.
        sampler: Optuna's, to draw by; by default each trial is drawn at random, from the seed and
            its number.
        storage: where Optuna keeps the study, such as "sqlite:///search.db"; a study that is there
            is continued, and processes may share it.
        study_name: of the study in it.
        amp: "no", "bf16" or "fp16".
        progress: show a bar and the result.

    Returns:
        `.best`, its `.accuracy` beside `.unpruned`, its `.multiply_adds`, and the `.study`.

    Raises:
        ValueError: an argument is out of range, the model is pruned already, the budget cannot be
            reached, or the study in the storage is of another search. Other weights or images of
            the same number are not noticed.

    Example:
        >>> found = pcx.token_pruning.search(model, val_loader, budget=0.65)
        >>> pruning = pcx.zero_tprune(model, **found.best)
    """
    fixed = dict(fixed or {})
    _check(model, budget, {"trials": trials, "images": images}, seed, fixed, amp)
    space = Space(model, fixed)
    limit = space.limit(budget)
    facts = {"budget": limit, "unpruned": space.whole, "images": images, "seed": seed}
    study = _study(storage, study_name, sampler, {**facts, "fixed": fixed, "amp": amp})
    evaluation = _Evaluation(model, loader, images, seed, fixed, amp)
    unpruned = evaluation.accuracy(check=True)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("searching", total=trials)
        while (done := len(_evaluated(study))) < trials:
            bar.update(task, completed=done)
            _try_one(study, space, limit, evaluation, seed if sampler is None else None)
    result = SearchResult(study, fixed, unpruned, evaluation.images)
    Console(quiet=not progress).print(
        f"best of {len(_evaluated(study))} settings at {limit / space.whole:.3f} of "
        f"{space.whole / 1e9:.3g} G multiply-adds: {result.accuracy:.2f}% of {result.images} "
        f"images, unpruned {unpruned:.2f}%"
    )
    return result


def _check(
    model: nn.Module, budget: float, counts: dict[str, int], seed: int, fixed: dict, amp: str
) -> None:
    for name, value in {**counts, "seed": seed}.items():
        least = int(name != "seed")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {value!r}, expected a whole number, {least} or more")
    if not isinstance(budget, float | int) or not 0 < budget < math.inf:
        raise ValueError(
            f"budget: {budget!r}, expected a share of the unpruned model's multiply-adds, in "
            "(0, 1], or a number of them"
        )
    allowed = set(inspect.signature(zero_tprune).parameters) - {"model", *SEARCHED}
    if not set(fixed) <= allowed:
        raise ValueError(f"fixed: got {sorted(fixed)}, expected some of {sorted(allowed)}")
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    if found_on(model):
        raise ValueError("model: it is pruned; call remove() of what zero_tprune gave first")


def _study(
    storage: Any, name: str, sampler: optuna.samplers.BaseSampler | None, facts: dict[str, Any]
) -> optuna.Study:
    """A new study of the search that the facts describe, or the one in the storage."""
    import optuna

    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=sampler or optuna.samplers.RandomSampler(),
        direction="maximize",
        load_if_exists=True,
    )
    facts = json.loads(json.dumps(facts))  # as they are read back
    before = {fact: study.user_attrs.get(fact) for fact in facts}
    if study.trials and before != facts:
        raise ValueError(
            f"storage: its study {name!r} is of {before}, not of {facts}; give another study_name"
        )
    for fact, value in facts.items():
        study.set_user_attr(fact, value)
    return study


def _evaluated(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _try_one(
    study: optuna.Study,
    space: Space,
    limit: float,
    evaluation: _Evaluation,
    seed: int | None,
) -> None:
    """One trial of the study: a setting, drawn by a seed or by the study's sampler, evaluated."""
    import optuna

    trial = study.ask()
    if seed is not None:  # and by number, so that a search that goes on does not repeat itself
        mixed = np.random.SeedSequence((seed, trial.number)).generate_state(1)[0]
        study.sampler = optuna.samplers.RandomSampler(seed=int(mixed))
    try:
        steps = space.at_budget(space.draw(trial), limit)
        setting = arguments_of(steps)
        trial.set_user_attr("setting", setting)
        trial.set_user_attr("multiply_adds", space.cost(steps))
        accuracy = evaluation.pruned(setting)
    except BaseException:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    study.tell(trial, accuracy)


class _Evaluation:
    """A model's accuracy on some images, which it holds on the model's device."""

    def __init__(
        self, model: nn.Module, loader: Any, images: int, seed: int, fixed: dict, amp: str
    ):
        self.model, self.seed, self.fixed, self.amp = model, seed, fixed, AMP[amp]
        self.device = next(model.parameters()).device
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.images = 0
        for batch in _some(loader, model, images, seed):
            x, labels = images_and_labels(batch)
            if not isinstance(labels, Tensor) or not labels.dim():
                raise ValueError("loader: it yields single samples; give it a batch_size")
            x, labels = x[: images - self.images], labels[: images - self.images]
            self.batches.append(send_to_device((x, labels), self.device))
            self.images += len(labels)
            if self.images == images:
                break
        if not self.images:
            raise ValueError("loader: it yielded no sample")

    def pruned(self, setting: Mapping[str, Any]) -> float:
        """Percent, with a setting of `zero_tprune` for the length of the call."""
        pruning = zero_tprune(self.model, **setting, **self.fixed)
        try:
            return self.accuracy()
        finally:
            pruning.remove()

    @torch.no_grad()
    def accuracy(self, *, check: bool = False) -> float:
        """Percent; `check` looks at the labels."""
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        with self._as_evaluated():
            for images, labels in self.batches:
                logits = logits_of(self.model(images))
                if check:
                    SingleLabel().losses(logits, labels)  # says what is wrong with the labels
                right += (logits.argmax(-1) == labels).sum()
        return 100 * int(right) / self.images

    @contextmanager
    def _as_evaluated(self) -> Iterator[None]:
        """Eval mode and autocast, and the seed for rankings and partitions that are random."""
        modes = [(module, module.training) for module in self.model.modules()]
        on_cuda = self.device.type == "cuda"
        generator = torch.default_generator
        if on_cuda:
            generator = torch.cuda.default_generators[self.device.index]
        autocast = torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()
        try:
            with torch.random.fork_rng([self.device] if on_cuda else []), autocast:
                generator.manual_seed(self.seed)
                self.model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training


def _some(loader: Any, model: nn.Module, images: int, seed: int) -> Any:
    """A loader of as many samples drawn by the seed, where it can be told which to read."""
    plain = plain_loader(loader, data_config(model)).loader
    if not isinstance(plain, DataLoader) or not isinstance(plain.sampler, SequentialSampler):
        return plain
    if plain.batch_size is None:
        return plain
    dataset: Any = plain.dataset
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    some = Subset(dataset, drawn[:images].sort().values.tolist())
    return rebuilt(plain, some, batch_size=plain.batch_size)
