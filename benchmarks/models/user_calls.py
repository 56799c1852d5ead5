"""Times the calls that users make, not graphs they would have to build: writes a CSV.

`python benchmarks/models/user_calls.py` writes `results/user_calls_<gpu>.csv`, all rows of one run:

- train: milliseconds a step of `pcx.fit` by execution, over batches that lie ready in pinned
  memory, beside a step of the same model recorded by hand ("bare graph"), the same VPT
  concatenating, and a plain loop over a peft LoRA model;
- infer: milliseconds of a call, of the plain backbone, and of a VPT folded, concatenating, frozen;
- prune: of a DeiT-S whole and with Zero-TPrune's setting "a", frozen and not;
- score: of `pcx.score` a batch, beside forward and backward of the same VPT recorded by hand.

Everything is bfloat16 autocast; models that must agree are compared before they are timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import pcx
from pcx.token_pruning.dropping import VARIANTS

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpu_timing import table

RESULTS = Path(__file__).parent.parent / "results"
CLASSES, PROMPTS, BATCH = 100, 100, 64
VITS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
FIELDS = ["work", "model", "way", "batch", "ms", "peak_mib", "gpu", "torch", "timm"]


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


def backbone_of(name: str, classes: int = CLASSES, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, **arguments).cuda().eval()


def vpt_of(name: str, path: str = "folded", m: int = PROMPTS) -> pcx.VPT:
    torch.manual_seed(1)
    return pcx.VPT(backbone_of(name), m, path=path)


def per_call(call: Callable[[], object], calls: int, repeats: int = 15) -> float:
    """The median milliseconds of one of several calls in a row, the last one waited for."""
    for _ in range(4):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def fit_step(model: torch.nn.Module, execution: str, steps: int) -> float:
    """Milliseconds a step of the later epochs of `pcx.fit`."""
    arguments = {"epochs": 5, "lr": 0.01, "amp": "bf16", "progress": False}
    history = pcx.fit(model, Ready(steps), execution=execution, **arguments)
    return 1000 * statistics.median(row["seconds"] for row in history[2:]) / steps


def loop_step(model: torch.nn.Module, recorded: bool) -> float:
    """Milliseconds a step of a loop as users write it, or of its step recorded by hand."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-3, fused=True)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    labels = torch.randint(CLASSES, (BATCH,), device="cuda")
    model.train()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    if not recorded:
        return per_call(step, 10)
    return per_call(recording(step).replay, 10)


def recording(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        graph.kept = call()  # type: ignore[attr-defined]
    return graph


def lora_of(name: str) -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
    return peft.get_peft_model(backbone_of(name), config).cuda()


def train(add: Callable[..., None], steps: int) -> None:
    for model, name in VITS.items():
        with torch.no_grad():
            x = torch.randn(2, 3, 224, 224, device="cuda")
            folded, concat = (vpt_of(name, path).eval()(x) for path in ("folded", "concat"))
        torch.testing.assert_close(folded, concat, rtol=1e-3, atol=1e-3)

        def fitted(execution: str, path: str = "folded", name: str = name) -> Callable[[], float]:
            return lambda: fit_step(vpt_of(name, path), execution, steps)

        def looped(recorded: bool, make: Callable[[], torch.nn.Module]) -> Callable[[], float]:
            return lambda: loop_step(make(), recorded)

        add("pcx.fit", model, fitted("auto"))
        add("pcx.fit eager", model, fitted("eager"))
        add("pcx.fit compile", model, fitted("compile"))
        add("bare graph", model, looped(True, partial(vpt_of, name)))
        add("concat pcx.fit", model, fitted("auto", "concat"))
        add("concat pcx.fit eager", model, fitted("eager", "concat"))
        add("concat bare graph", model, looped(True, partial(vpt_of, name, "concat")))
        add("peft LoRA eager loop", model, looped(False, partial(lora_of, name)))
        add("peft LoRA pcx.fit", model, partial(lora_fit, name, steps))


def lora_fit(name: str, steps: int) -> float:
    return fit_step(lora_of(name), "auto", steps)


def infer(add: Callable[..., None]) -> None:
    model, name = "ViT-B/16", VITS["ViT-B/16"]
    plain, folded, concat = backbone_of(name), vpt_of(name).eval(), vpt_of(name, "concat").eval()
    folded.requires_grad_(False)
    frozen = {e: pcx.freeze(folded, amp="bf16", execution=e) for e in ("eager", "auto", "compile")}
    compiled = torch.compile(plain, mode="reduce-overhead")
    ways = {"plain": plain, "folded": folded, "concat": concat, "plain compiled": compiled}
    ways |= {f"frozen {execution}": made for execution, made in frozen.items()}
    for batch in (1, 8, 64):
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            expected = folded(x).float()
            for way in ("concat", *(f"frozen {e}" for e in frozen)):
                found = [ways[way](x).float() for _ in range(3)][-1]
                assert (found - expected).norm() < 2e-2 * expected.norm(), way
            for way, made in ways.items():
                add(way, model, lambda m=made, x=x: per_call(lambda: m(x), 20), batch)


def prune(add: Callable[..., None]) -> None:
    name = "deit_small_patch16_224"
    plain = pcx.Linear(backbone_of(name), head_init="keep").eval()
    pruned = pcx.Linear(backbone_of(name), head_init="keep").eval()
    pcx.zero_tprune(pruned, **VARIANTS["a"])
    ways: dict[str, torch.nn.Module] = {"plain": plain, "zero-tprune a": pruned}
    for way, made in list(ways.items()):
        for execution in ("eager", "auto"):
            ways[f"{way} frozen {execution}"] = pcx.freeze(made, amp="bf16", execution=execution)
    for batch in (64, 256):
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for way in ("plain", "zero-tprune a"):
                found = [ways[f"{way} frozen auto"](x).float() for _ in range(3)][-1]
                same = ways[f"{way} frozen eager"](x).float()
                assert torch.equal(found, same), way
            for way, made in ways.items():
                add(way, "DeiT-S", lambda m=made, x=x: per_call(lambda: m(x), 10), batch)


def score(add: Callable[..., None], steps: int) -> None:
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

    def scored(execution: str) -> float:
        call = lambda: pcx.score(vpt, loader, amp="bf16", execution=execution, progress=False)  # noqa: E731
        return per_call(call, 1, 5) / steps

    add("forward and backward, bare graph", model, lambda: per_call(recording(both).replay, 10))
    vpt.zero_grad()
    add("pcx.score", model, lambda: scored("auto"))
    add("pcx.score eager", model, lambda: scored("eager"))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--work", nargs="*", default=["train", "infer", "prune", "score"])
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    file, _ = table(chosen.out, "user_calls")
    rows: list[dict] = []
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }

    def adding(work: str) -> Callable[..., None]:
        def add(way: str, model: str, timed: Callable[[], float], batch: int = BATCH) -> None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            ms = timed()
            peak = torch.cuda.max_memory_allocated() / 2**20
            values = (work, model, way, batch, f"{ms:.3f}", f"{peak:.0f}")
            rows.append({**dict(zip(FIELDS, values, strict=False)), **machine})
            print(*values, flush=True)
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

        return add

    for work in chosen.work:
        if work in ("train", "score"):
            {"train": train, "score": score}[work](adding(work), chosen.steps)
        else:
            {"infer": infer, "prune": prune}[work](adding(work))


if __name__ == "__main__":
    main()
