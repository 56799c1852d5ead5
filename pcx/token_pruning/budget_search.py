"""Monte-Carlo search of where and how much to prune (Zero-TPrune, Sec. 4.1 and G.5)."""

from __future__ import annotations

import inspect
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

from pcx.arguments import real_number, whole_number
from pcx.backbones.inputs import data_config
from pcx.backbones.outputs import logits_of
from pcx.checkpoints.studies import ask, completed, open_study
from pcx.extras import need
from pcx.models.base import keeping_modes
from pcx.models.block_forward import found_on
from pcx.tasks.batches import images_and_labels, rows_of
from pcx.token_pruning.budget_space import Space
from pcx.token_pruning.dropping import zero_tprune
from pcx.token_pruning.schedule import arguments_of
from pcx.training.execution import check_execution, prepared
from pcx.training.loaders import plain_loader, rebuilt
from pcx.training.objectives import SingleLabel
from pcx.training.precision import AMP

if TYPE_CHECKING:
    import optuna

# The arguments of `zero_tprune` that a search draws; they cannot be fixed.
SEARCHED = ("layers", "keep", "iters", "similar")


@dataclass(frozen=True)
class SearchResult:
    """The result of `search`: the best setting, its accuracy and its cost.

    Attributes:
        study: Optuna's study of all trials. A trial's value is an accuracy in percent. Its user
            attributes "setting" and "multiply_adds" hold the evaluated setting and its cost.
        fixed: the argument `fixed` of the search.
        unpruned: accuracy of the unpruned model on the same images, percent.
        images: number of images that every setting was evaluated on.
    """

    study: optuna.Study
    fixed: dict[str, Any]
    unpruned: float
    images: int

    @property
    def best(self) -> dict[str, Any]:
        """The arguments of `pcx.zero_tprune` with the highest accuracy; the first among equals."""
        setting = self._trial.user_attrs["setting"]
        return {**{name: tuple(values) for name, values in setting.items()}, **self.fixed}

    @property
    def accuracy(self) -> float:
        """Accuracy of `best`, percent.

        It is measured on the images that chose the setting. Expect less on other images.
        """
        return self._trial.values[0]

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per image of `best`, as `pcx.multiply_adds` counts them."""
        return self._trial.user_attrs["multiply_adds"]

    @property
    def _trial(self) -> optuna.trial.FrozenTrial:
        return max(completed(self.study), key=lambda trial: (trial.values[0], -trial.number))


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
    execution: str = "auto",
    progress: bool = True,
) -> SearchResult:
    """Searches for the best setting of `pcx.zero_tprune` at one budget (Sec. 4.1, G.5).

    Settings are drawn from these ranges. The last layer never prunes.

    | drawn                     | range                                                        |
    | ------------------------- | ------------------------------------------------------------ |
    | number of layers          | 3 or more                                                    |
    | keep ratio                | 0.5 to 0.99                                                  |
    | similar patches           | 0 to a tenth of all patches                                  |
    | PageRank iterations (G.1) | 30 to 50 in layers 1 to 3, 1 in the last three, else 5 to 10 |

    Each setting is then scaled to the budget, to within a few whole patches and never above it. If
    dropping similar patches alone reaches the budget, fewer of them are dropped and nothing else.
    Otherwise all keep ratios are raised to one power, found by bisection, and none falls below 0.3.
    If that is not enough, more layers join, in a drawn order. So no setting is rejected.

    Args:
        model: as `pcx.zero_tprune` takes it, not pruned. It is left as it was, after an error too.
        loader: of validation data; a DataLoader over a map-style data set is read in order.
        budget: a share of the unpruned model's multiply-adds, in (0, 1], or a number of them per
            image, above 1. Both include the patch embedding, as in `pcx.multiply_adds`.
        trials: number of settings to evaluate. Settings that are in the storage already count.
        images: how many all settings are evaluated on, held on the model's device. The seed draws
            them, or they are a loader's first if its order is fixed.
        seed: of the images and the settings, 0 or more.
        fixed: further arguments of `pcx.zero_tprune` in all settings.
        sampler: of Optuna's; by default trials are random, from the seed and their place.
        storage: where Optuna keeps the study, such as "sqlite:///search.db". An existing one is
            continued, killed trials anew, and several processes may share it.
        study_name: its name in the storage.
        amp, execution: as `pcx.evaluate` takes them, without "compile".
        progress: show a bar.

    Returns:
        `.best`, its `.accuracy` and `.multiply_adds`, the accuracy `.unpruned`, the `.study`.

    Raises:
        ValueError: an argument is out of range, the model is pruned already, the budget cannot be
            reached, or the stored study has other arguments (weights and images are not compared).

    Example:
        >>> found = pcx.token_pruning.search(model, val_loader, budget=0.65)
        >>> pruning = pcx.zero_tprune(model, **found.best)
    """
    fixed = dict(fixed or {})
    _check_arguments(model, budget, {"trials": trials, "images": images}, seed, fixed, amp)
    space = Space(model, fixed)
    limit = space.limit(budget)
    arguments = {"budget": limit, "unpruned": space.whole, "images": images, "seed": seed}
    evaluation = _Evaluation(model, loader, images, seed, fixed, amp, execution)
    study = open_study(storage, study_name, sampler, {**arguments, "fixed": fixed, "amp": amp})
    unpruned = evaluation.accuracy(check=True)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("searching", total=trials)
        while (done := len(completed(study))) < trials:
            bar.update(task, completed=done)
            _try_one(study, space, limit, evaluation, seed if sampler is None else None)
    result = SearchResult(study, fixed, unpruned, evaluation.images)
    Console(quiet=not progress).print(
        f"best of {len(completed(study))} settings at {limit / space.whole:.3f} of "
        f"{space.whole / 1e9:.3g} G multiply-adds: {result.accuracy:.2f}% of {result.images} "
        f"images, unpruned {unpruned:.2f}%"
    )
    return result


def _check_arguments(
    model: nn.Module, budget: float, counts: dict[str, int], seed: int, fixed: dict, amp: str
) -> None:
    need("optuna", "pcx.token_pruning.search")
    for name, value in {**counts, "seed": seed}.items():
        whole_number(name, value, int(name != "seed"))
    real_number(
        "budget",
        budget,
        above=0,
        expected="a share of the unpruned model's multiply-adds, in (0, 1], or a number of them",
    )
    allowed = set(inspect.signature(zero_tprune).parameters) - {"model", *SEARCHED}
    if not set(fixed) <= allowed:
        raise ValueError(f"fixed: got {sorted(fixed)}, expected some of {sorted(allowed)}")
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    if found_on(model):
        raise ValueError(
            "model: it is pruned; call remove() of the handle that zero_tprune returned first"
        )


def _try_one(
    study: optuna.Study,
    space: Space,
    limit: float,
    evaluation: _Evaluation,
    seed: int | None,
) -> None:
    """Draws one setting by the seed, or by the study's sampler if None, and evaluates it."""
    import optuna

    trial, place = ask(study)
    if seed is not None:  # mixed with the trial's place: a continued search draws new settings
        mixed = np.random.SeedSequence((seed, place)).generate_state(1)[0]
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
    """Measures a model's accuracy on a fixed set of images, held on the model's device."""

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        images: int,
        seed: int,
        fixed: dict,
        amp: str,
        execution: str,
    ):
        self.model, self.seed, self.fixed, self.amp = model, seed, fixed, AMP[amp]
        self.execution = execution
        self.device = next(model.parameters()).device
        if execution == "compile":
            raise ValueError(
                "execution: 'compile' would compile every setting anew; use 'auto', 'cuda-graph' "
                "or 'eager'"
            )
        check_execution(execution, self.device)
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.images = 0
        for batch in _drawn_samples(loader, model, images, seed):
            x, labels = images_and_labels(batch)
            labels = rows_of(labels)
            x, labels = x[: images - self.images], labels[: images - self.images]
            self.batches.append(send_to_device((x, labels), self.device))
            self.images += len(labels)
            if self.images == images:
                break
        if not self.images:
            raise ValueError("loader: it yielded no sample, expected one batch or more")

    def pruned(self, setting: Mapping[str, Any]) -> float:
        """Accuracy in percent of the model pruned by a setting of `zero_tprune`."""
        pruning = zero_tprune(self.model, **setting, **self.fixed)
        try:
            return self.accuracy()
        finally:
            pruning.remove()

    @torch.no_grad()
    def accuracy(self, *, check: bool = False) -> float:
        """Accuracy in percent of the model as it is; `check` also validates the labels."""
        right = torch.zeros((), dtype=torch.int64, device=self.device)

        def count(images: Any, labels: Tensor) -> Tensor:
            logits = logits_of(self.model(images))
            if check:
                SingleLabel().losses(logits, labels)  # raises an error that names the fault
            return (logits.argmax(-1) == labels).sum()

        with self._eval_mode():
            # The check reads labels on the device, which a recording cannot.
            run = prepared(lambda: count, self.device, "eager" if check else self.execution)
            for images, labels in self.batches:
                right += run(images, labels)
        return 100 * int(right) / self.images

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Within it the model is in eval mode and autocast, and the global generator is seeded.

        Random rankings and partitions draw from that generator. All is restored afterwards.
        """
        on_cuda = self.device.type == "cuda"
        generator = torch.default_generator
        if on_cuda:
            generator = torch.cuda.default_generators[self.device.index]
        autocast = torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()
        drawn = torch.random.fork_rng([self.device] if on_cuda else [])
        with keeping_modes(self.model), drawn, autocast:
            generator.manual_seed(self.seed)
            self.model.eval()
            yield


def _drawn_samples(loader: Any, model: nn.Module, images: int, seed: int) -> Any:
    """A loader of that many samples, drawn by the seed.

    A loader whose samples cannot be chosen is returned without augmentation, all of it.
    """
    plain = plain_loader(loader, data_config(model)).loader
    if not isinstance(plain, DataLoader) or not isinstance(plain.sampler, SequentialSampler):
        return plain
    if plain.batch_size is None:
        return plain
    dataset: Any = plain.dataset
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    subset = Subset(dataset, drawn[:images].sort().values.tolist())
    return rebuilt(plain, subset, batch_size=plain.batch_size)
