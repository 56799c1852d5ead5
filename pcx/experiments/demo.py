"""The demo: VPT, scoring, condensation and their baselines on data in the package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pcx.analysis import figures
from pcx.analysis.latency import by_path
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.condensation.condensing import condense
from pcx.condensation.scoring import score
from pcx.extras import need
from pcx.models.vpt.model import VPT
from pcx.tasks import Task, load_task
from pcx.training.evaluation import evaluate, standard_error
from pcx.training.fitting import fit

TASKS = ("digits", "sprites:ori")
PROMPTS, KEEP = 20, 0.3
KEEPS = (0.1, KEEP, 0.5)  # only KEEP is fine-tuned
# A search over fewer epochs is still at chance on the harder task, and chooses by noise.
EPOCHS, TUNE_EPOCHS, SEARCH_EPOCHS = 15, 4, 6
BATCH = 32
RATES, LINEAR_RATES = (0.1, 0.3), (0.1, 0.3, 1.0)
# The published head (kaiming-normal by fan-out) starts at a high loss for 10 or 16 classes. Its
# gradients destroy the prompts of this small backbone. Clipped gradients and timm's head do not.
CLIP = 1.0
# timm's "sgd" has Nesterov's momentum, which gets further than plain momentum in so few epochs.
OPT = "sgd"
HEAD_INIT = "keep"

METHODS = {
    "linear": "linear probe",
    "vpt": "VPT-Deep",
    "condensed_no_finetune": "condensed, not fine-tuned",
    "condensed": "condensed, fine-tuned",
    "vpt_small": "VPT-Deep with 30% of the prompts",
}


def demo(out: Path = Path("runs/demo"), *, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> dict:
    """Runs the demo and writes `result.json` and figures to `out`.

    Args:
        out: folder for the results.
        seed: seed of prompts, heads and training.
        tasks: names for `pcx.tasks.load_task`, of procedural tasks or those in the package.

    Returns:
        The content of result.json.

    Raises:
        ImportError: a package that draws figures or holds images is missing; nothing has run.
    """
    need("matplotlib", "pcx demo")
    if "digits" in tasks:
        need("sklearn", "pcx demo")
    console, start = Console(width=None if sys.stdout.isatty() else 110), time.perf_counter()
    result: dict = {"seed": seed, "keep": KEEP, "threads": torch.get_num_threads(), "tasks": {}}
    for name in tasks:
        console.rule(f"[bold]{name}")
        result["tasks"][name] = _run_task(name, seed, console, out)
    result["seconds"] = round(time.perf_counter() - start, 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{result['seconds']:.0f} s; wrote {out}/result.json and figures")
    return result


def _run_task(name: str, seed: int, console: Console, out: Path) -> dict:
    task = load_task(name, data_config(scenes_vit()))
    search = _Search(task, seed, console)
    test = task.loader("test", 256)
    train = task.loader("trainval", BATCH)

    linear, linear_lr = search.linear()
    model, lr = search.vpt(PROMPTS, EPOCHS, "VPT")
    scores = score(model, train, progress=False)
    rough = {keep: condense(model, train, keep, scores=scores, epochs=0) for keep in KEEPS}
    tuned = condense(
        model,
        train,
        KEEP,
        scores=scores,
        epochs=TUNE_EPOCHS,
        clip_grad=CLIP,
        opt=OPT,
        seed=seed,
        progress=False,
    )
    few, few_lr = search.vpt(round(PROMPTS * KEEP), EPOCHS + TUNE_EPOCHS, "VPT, 30% of the prompts")
    models = {
        "linear": linear,
        "vpt": model,
        "condensed_no_finetune": rough[KEEP],
        "condensed": tuned,
        "vpt_small": few,
    }
    found = {key: evaluate(models[key], test) for key in METHODS}
    curve: list[dict] = [{"keep": keep} for keep in KEEPS]
    for row in curve:
        done = row["keep"] == KEEP
        rough_found = found["condensed_no_finetune"] if done else evaluate(rough[row["keep"]], test)
        row["not_finetuned"] = _point(rough_found)
        if done:
            row |= {"finetuned": _point(found["condensed"]), "trained": _point(found["vpt_small"])}
    rates = {"linear": linear_lr, "vpt": lr, "condensed": lr / 10, "vpt_small": few_lr}
    return _report(name, models, rates, curve, found, console, out)


def _point(found: dict) -> dict[str, float]:
    return {"accuracy": found["accuracy"], "standard_error": standard_error(found)}


def _report(name, models, rates, curve, found, console: Console, out: Path) -> dict:
    model, condensed = models["vpt"], models["condensed"]
    before, after = by_path(model), by_path(condensed)
    result = {
        "accuracy": {key: found[key]["accuracy"] for key in METHODS},
        "standard_error": {key: standard_error(found[key]) for key in METHODS},
        "test_images": found["vpt"]["samples"],
        "learning_rate": rates,
        "prompts": {"before": list(model.counts), "after": list(condensed.counts)},
        "parameters": {
            key: sum(p.numel() for p in models[key].trainable().values()) for key in METHODS
        },
        "latency_ms": {
            "folded": before["folded"],
            "concat": before["concat"],
            "folded_condensed": after["folded"],
            "concat_condensed": after["concat"],
        },
        "accuracy_by_keep": curve,
    }
    console.print(_table(name, models, result))
    folder = out / name.replace(":", "-")
    figures.kept_per_layer(model.counts, condensed.counts).write(folder)
    figures.score_distribution(condensed.condensation).write(folder)
    figures.accuracy_by_keep(result).write(folder)
    return result


def _table(name: str, models: dict[str, VPT], result: dict) -> Table:
    table = Table(title=f"{name}, {result['test_images']} test images")
    for column in ("method", "accuracy %", "prompts per layer", "parameters"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_column("ms/image folded", justify="right")
    table.add_column("ms/image concat", justify="right")
    times = result["latency_ms"]
    suffixes = {"vpt": "", "condensed": "_condensed"}
    for key, label in METHODS.items():
        suffix = suffixes.get(key)
        table.add_row(
            label,
            f"{result['accuracy'][key]:.1f} ± {result['standard_error'][key]:.1f}",
            _per_layer(models[key].counts),
            f"{result['parameters'][key]:,}",
            "" if suffix is None else f"{times['folded' + suffix]:.2f}",
            "" if suffix is None else f"{times['concat' + suffix]:.2f}",
        )
    return table


def _per_layer(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} x {counts[0]}" if len(set(counts)) == 1 else " ".join(map(str, counts))


class _Search:
    """Trains at each rate on "train", picks the rate by "val", then trains on both splits."""

    def __init__(self, task: Task, seed: int, console: Console):
        self.task, self.seed, self.console = task, seed, console

    def vpt(self, prompts: int, epochs: int, label: str) -> tuple[VPT, float]:
        train, val, both = (self.task.loader(s, BATCH) for s in ("train", "val", "trainval"))
        lr = self._best(RATES, lambda: self._new(prompts), train, val, SEARCH_EPOCHS, label)
        model = self._new(prompts)
        self._train(model, both, epochs, lr)
        return model, lr

    def linear(self) -> tuple[VPT, float]:
        """Trains the linear probe on features that the frozen backbone computes once."""
        model = self._new(0)
        train, val, both = (self._features(s) for s in ("train", "val", "trainval"))
        lr = self._best(
            LINEAR_RATES, lambda: self._new(0).heads[0], train, val, EPOCHS, "linear probe"
        )
        self._train(model.heads[0], both, EPOCHS, lr)
        return model, lr

    def _train(self, model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
        fit(
            model,
            loader,
            epochs=epochs,
            lr=lr,
            opt=OPT,
            clip_grad=CLIP,
            seed=self.seed,
            progress=False,
        )

    def _new(self, prompts: int) -> VPT:
        torch.manual_seed(self.seed)
        return VPT(scenes_vit(self.task.num_classes), prompts, head_init=HEAD_INIT)

    def _best(
        self,
        rates: tuple[float, ...],
        new: Callable[[], nn.Module],
        train,
        val,
        epochs: int,
        label: str,
    ) -> float:
        found = {}
        for lr in rates:
            model = new()
            self._train(model, train, epochs, lr)
            found[lr] = evaluate(model, val)
        best = max(rates, key=lambda lr: (found[lr]["accuracy"], -found[lr]["loss"]))
        said = ", ".join(f"{lr:g}: {row['accuracy']:.1f}%" for lr, row in found.items())
        self.console.print(f"{label}: learning rate {best:g} by validation ({said})")
        return best

    @torch.no_grad()
    def _features(self, split: str) -> DataLoader:
        head_free = VPT(scenes_vit(0), 0).eval()
        loader = DataLoader(self.task.splits[split], batch_size=256)
        rows = [(head_free(images), labels) for images, labels in loader]
        features, labels = (torch.cat(column) for column in zip(*rows, strict=True))
        return DataLoader(
            TensorDataset(features, labels), batch_size=BATCH, shuffle=split.startswith("train")
        )
