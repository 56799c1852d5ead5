"""Times the calls that users make, not graphs they would have to build: writes a CSV.

`python benchmarks/models/user_calls.py` writes `results/user_calls_<gpu>.csv`; the works are

- train: milliseconds a step of `pcx.fit` by execution, over batches that lie ready in pinned
  memory, beside a step of the same model recorded by hand ("bare graph"), the same VPT
  concatenating, a VPT written by hand in a plain loop, and a plain loop over a peft LoRA model;
- infer: milliseconds of a call, of the plain backbone, and of a VPT folded, concatenating, frozen;
- prune: of a DeiT-S whole and with Zero-TPrune's setting "a", frozen and not; "plain bare graph" is
  timm's model as it is, recorded by hand;
- score: of `pcx.score` a batch, beside forward and backward of the same VPT recorded by hand;
- condense: of the whole of `pcx.condense`, beside the training that comes before it.

`rivals.py` adds the rows of other libraries, and `--draw <csv>` draws the figure of a table.
Everything is bfloat16 autocast, entered in each call; the ways of inference take turns. Models that
must agree are compared before they are timed: a pruned model with its own eager form alone, since
rounding may change which tokens it keeps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from by_hand import (
    BATCHES,
    CLASSES,
    PROMPTS,
    RESULTS,
    VITS,
    HandWrittenVPT,
    Rows,
    backbone_of,
    in_turns,
    inference_of,
    peak_of,
    per_call,
    step_of,
)
from gpu_timing import graph_of, rows_of

import pcx
from pcx.token_pruning.dropping import VARIANTS

BATCH = 64
Add = Callable[[str, str, int, float, float], None]  # model, way, batch, ms, peak MiB


class Ready:
    """A loader of batches that lie ready in pinned memory, the same few again and again."""

    def __init__(self, steps: int, batch: int = BATCH):
        torch.manual_seed(0)
        self.steps, self.batch_size = steps, batch
        self.batches = [
            (torch.randn(batch, 3, 224, 224).pin_memory(), torch.randint(CLASSES, (batch,)))
            for _ in range(4)
        ]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        return (self.batches[i % len(self.batches)] for i in range(self.steps))


def vpt_of(name: str, path: str = "folded", m: int = PROMPTS) -> pcx.VPT:
    torch.manual_seed(1)
    return pcx.VPT(backbone_of(name), m, path=path)


def by_hand(name: str) -> HandWrittenVPT:
    vpt = vpt_of(name)
    made = HandWrittenVPT(backbone_of(name), [p.detach() for p in vpt.prompts])
    made.backbone.head.load_state_dict(vpt.heads[0].state_dict())
    return made.cuda()


def fit_step(model: torch.nn.Module, execution: str, steps: int, batch: int = BATCH) -> float:
    """Milliseconds a step of the later epochs of `pcx.fit`."""
    arguments = {"epochs": 5, "lr": 0.01, "amp": "bf16", "progress": False}
    history = pcx.fit(model, Ready(steps, batch), execution=execution, **arguments)
    return 1000 * statistics.median(row["seconds"] for row in history[2:]) / steps


def lora_of(name: str) -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
    return peft.get_peft_model(backbone_of(name), config).cuda()


def looped(model: torch.nn.Module, batch: int, recorded: bool = False) -> float:
    """Milliseconds a step of a loop as users write it, or of its step recorded by hand."""
    step = step_of(model, batch)
    return per_call(graph_of([step]).replay if recorded else step, 10)


def train(add: Add, steps: int) -> None:
    for model, name in VITS.items():
        x = torch.randn(16, 3, 224, 224, device="cuda")  # fewer might not fold
        folded, concat = (vpt_of(name, path).eval()(x).detach() for path in ("folded", "concat"))
        torch.testing.assert_close(folded, concat, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(by_hand(name)(x).detach(), concat, rtol=1e-3, atol=1e-3)
        for batch in BATCHES:
            for way, timed in ways_of_training(name, batch, steps).items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                ms = timed()
                add(model, way, batch, ms, torch.cuda.max_memory_allocated() / 2**20)


def ways_of_training(name: str, batch: int, steps: int) -> dict[str, Callable[[], float]]:
    """Functions that give milliseconds a step; at the largest batch, of all executions."""

    def fitted(make: Callable[[], torch.nn.Module], execution: str) -> Callable[[], float]:
        return lambda: fit_step(make(), execution, steps, batch)

    def by_loop(make: Callable[[], torch.nn.Module], recorded: bool = False) -> Callable:
        return lambda: looped(make(), batch, recorded)

    folded, concat = (partial(vpt_of, name, path) for path in ("folded", "concat"))
    lora = partial(lora_of, name)
    ways = {
        "pcx.fit": fitted(folded, "auto"),
        "concat pcx.fit eager": fitted(concat, "eager"),
        "VPT by hand, loop": by_loop(partial(by_hand, name)),
        "peft LoRA, loop": by_loop(lora),
    }
    if batch < BATCH:
        return ways
    return ways | {
        "pcx.fit eager": fitted(folded, "eager"),
        "pcx.fit compile": fitted(folded, "compile"),
        "bare graph": by_loop(folded, True),
        "concat pcx.fit": fitted(concat, "auto"),
        "concat bare graph": by_loop(concat, True),
        "peft LoRA pcx.fit": fitted(lora, "auto"),
    }


def timed_in_turns(add: Add, model: str, ways: Mapping[str, Callable], batch: int) -> None:
    found = in_turns(ways, 10)
    for way, call in ways.items():
        add(model, way, batch, found[way], peak_of(call))


def infer(add: Add, steps: int) -> None:
    for model, name in VITS.items():
        folded, concat = (vpt_of(name, path).eval() for path in ("folded", "concat"))
        plain = backbone_of(name)
        made: dict[str, torch.nn.Module] = {"plain": plain, "folded": folded, "concat": concat}
        for execution in ("eager", "auto", "compile"):
            made[f"frozen {execution}"] = pcx.freeze(folded, amp="bf16", execution=execution)
        made["plain compiled"] = torch.compile(plain, mode="reduce-overhead")
        if model == "ViT-S/16":  # compiling takes minutes
            del made["plain compiled"], made["frozen compile"]
        for batch in BATCHES:
            x = torch.randn(batch, 3, 224, 224, device="cuda")
            ways = {way: inference_of(each, x) for way, each in made.items()}
            expected = ways["folded"]().float()
            for way in (way for way in ways if not way.startswith("plain")):
                found = [ways[way]().float() for _ in range(3)][-1]
                assert (found - expected).norm() < 2e-2 * expected.norm(), way
            timed_in_turns(add, model, ways, batch)


def prune(add: Add, steps: int) -> None:
    name = "deit_small_patch16_224"
    plain, pruned = backbone_of(name), backbone_of(name)
    pcx.zero_tprune(pruned, **VARIANTS["a"])
    made: dict[str, torch.nn.Module] = {"plain": plain, "zero-tprune a": pruned}
    for way, each in list(made.items()):
        for execution in ("eager", "auto"):
            made[f"{way} frozen {execution}"] = pcx.freeze(each, amp="bf16", execution=execution)
    for batch in (64, 256):
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        ways: dict[str, Callable] = {way: inference_of(each, x) for way, each in made.items()}
        for way in ("plain", "zero-tprune a"):
            found = [ways[f"{way} frozen auto"]().float() for _ in range(3)][-1]
            assert torch.equal(found, ways[f"{way} frozen eager"]().float()), way
        expected, found = ways["plain"]().float(), ways["plain frozen auto"]().float()
        assert (found - expected).norm() < 2e-2 * expected.norm()
        ways["plain bare graph"] = graph_of([ways["plain"]]).replay
        timed_in_turns(add, "DeiT-S", ways, batch)


def score(add: Add, steps: int) -> None:
    model, name = "ViT-B/16", VITS["ViT-B/16"]
    vpt, loader = vpt_of(name).eval(), Ready(steps)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    labels = torch.randint(CLASSES, (BATCH,), device="cuda")

    def both() -> torch.Tensor:
        vpt.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(vpt(images).float(), labels)
        loss.backward()
        return loss

    def scored(execution: str, batches: Ready) -> object:
        return pcx.score(vpt, batches, amp="bf16", execution=execution, progress=False)

    ms = per_call(graph_of([both]).replay, 10)
    add(model, "forward and backward, bare graph", BATCH, ms, peak_of(both))
    vpt.zero_grad()
    for way, execution, batches in (
        ("pcx.score", "auto", loader),
        ("pcx.score, 200 batches", "auto", Ready(200)),
        ("pcx.score eager", "eager", loader),
    ):
        call = partial(scored, execution, batches)
        add(model, way, BATCH, per_call(call, 1, 5) / len(batches), peak_of(call))


def condense(add: Add, steps: int) -> None:
    """As on VTAB-1k: 1000 images, 100 epochs, then 20 with 30% of the prompts."""
    model, vpt, loader = "ViT-B/16", vpt_of(VITS["ViT-B/16"]), Ready(16)
    arguments = {"amp": "bf16", "progress": False}
    start = time.perf_counter()
    pcx.fit(vpt, loader, epochs=100, lr=0.01, **arguments)
    trained = time.perf_counter()
    small = pcx.condense(vpt, loader, keep=0.3, epochs=20, **arguments)
    end = time.perf_counter()
    assert sum(small.counts) == round(0.3 * sum(vpt.counts))
    peak = torch.cuda.max_memory_allocated() / 2**20
    add(model, "pcx.fit, 100 epochs", 1024 * 100, 1000 * (trained - start), peak)
    add(model, "pcx.condense, 20 epochs", 1024 * 21, 1000 * (end - trained), peak)


WORKS = {"train": train, "infer": infer, "prune": prune, "score": score, "condense": condense}


DRAWN = {  # of the figure: way in the table -> label
    "train": {
        "pcx.fit compile": 'pcx.fit, "compile"',
        "pcx.fit": "pcx.fit",
        "concat pcx.fit eager": "concatenating VPT, eager",
        "VPT by hand, loop": "VPT by hand, loop",
        "adapter-plus VPT": "adapter-plus VPT, loop",
        "adapters prefix tuning": "adapters prefix tuning, loop",
        "peft LoRA, loop": "peft LoRA, loop",
    },
    "infer": {
        "plain": "timm's plain model",
        "frozen auto": "VPT, pcx.freeze",
        "folded": "VPT, folded",
        "concat": "VPT, concatenating",
        "adapter-plus VPT": "adapter-plus VPT",
        "adapters prefix tuning": "adapters prefix tuning",
    },
}


def draw(file: Path) -> None:
    """Draws images a second of ViT-B/16 by batch, beside the table."""
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(file) if row["model"] == "ViT-B/16"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (work, ways) in zip(figure.subplots(1, 2), DRAWN.items(), strict=True):
        for way, label in ways.items():
            found = {
                int(row["batch"]): float(row["images_per_s"])
                for row in rows
                if (row["work"], row["way"]) == (work, way)
            }
            ours = "pcx" in label
            style = {"linewidth": 2.2 if ours else 1.2, "linestyle": "-" if ours else "--"}
            axes.plot(*zip(*sorted(found.items()), strict=True), "o", label=label, **style)
        axes.set(title=work, xlabel="batch", ylabel="images a second", xscale="log", yscale="log")
        axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6)
    figure.suptitle(f"ViT-B/16, {PROMPTS} prompts a layer, {rows[0]['gpu']}, bfloat16", fontsize=9)
    figure.savefig(file.with_suffix(".png"), dpi=150)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--draw", type=Path)
    options.add_argument("--work", nargs="*", choices=WORKS, default=list(WORKS))
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    if chosen.draw:
        return draw(chosen.draw)
    rows = Rows(chosen.out)
    for work in chosen.work:
        WORKS[work](partial(rows.add, work), chosen.steps)


if __name__ == "__main__":
    main()
