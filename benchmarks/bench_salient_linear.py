"""Benchmark of salient_linear with its LayerNorm against the LayerNorm alone.

`pytest benchmarks/bench_salient_linear.py` checks and times. Run as a program on a GPU it writes
`results/salient_linear_<gpu>.csv`: microseconds of a call in a CUDA graph on the tokens of a
ViT-B/16 in bfloat16. Inputs of a batch of 64 do not fit the L2, those of one image do, as in a
model. `times_norm` is relative to the form "LayerNorm" of the same batch and pass.

- LayerNorm: `F.layer_norm` alone, which a frozen backbone computes anyway;
- pcx: `salient_linear` with `norm=`, as "auto" chooses;
- pcx, cuda and pcx, triton: the same by a kernel's name;
- four launches: the channels, `F.linear`, the sum into x, and `F.layer_norm`, in torch.

The pass "inference" has weights in bfloat16. The pass "training" is forward and backward with
float32 weights, behind a copy of x that every form makes.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.ops.salient_linear import DISPATCH, salient_linear

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graphed, table

RESULTS = Path(__file__).parent / "results"
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
TOKENS, DIM, EPS = 197, 768, 1e-6
BATCHES = (64, 1) if ON_GPU else (4, 1)
COUNTS = (96, 32, 192)
SCALE = 1e-3  # so that x stays finite where a graph changes it again and again
FIELDS = (
    "pass form batch tokens dim channels dtype us_median us_q1 us_q3 times_norm gpu torch driver"
)


class Inputs:
    """x, the channels and their map, and a LayerNorm."""

    def __init__(self, batch: int, count: int, learns: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        learned = torch.float32 if learns else DTYPE
        self.x = draw(batch, TOKENS, DIM).requires_grad_(learns)
        self.index = torch.randperm(DIM, generator=generator)[:count].to(DEVICE)
        self.weight = (draw(count, count, dtype=learned) / count**0.5).requires_grad_(learns)
        self.bias = draw(count, dtype=learned).requires_grad_(learns)
        self.norm = (draw(DIM), draw(DIM), EPS)
        self.grads = (draw(batch, TOKENS, DIM), draw(batch, TOKENS, DIM)) if learns else ()


Results = tuple[Tensor, Tensor]


def norm_alone(given: Inputs, x: Tensor, scale: float) -> Results:
    return x, F.layer_norm(x, (DIM,), *given.norm)


def ours(backend: str) -> Callable[[Inputs, Tensor, float], Results]:
    def run(given: Inputs, x: Tensor, scale: float) -> Results:
        index, weight, bias = given.index, given.weight, given.bias
        return x, salient_linear(x, index, weight, bias, scale, norm=given.norm, backend=backend)

    return run


def four_launches(given: Inputs, x: Tensor, scale: float) -> Results:
    weight, bias = given.weight.to(x.dtype), given.bias.to(x.dtype)  # no launch in inference
    delta = F.linear(x.index_select(-1, given.index), weight, bias)
    x.index_add_(-1, given.index, delta, alpha=scale)
    return x, F.layer_norm(x, (DIM,), *given.norm)


FORMS = {"LayerNorm": norm_alone, "pcx": ours("auto"), "four launches": four_launches}
if ON_GPU:
    FORMS |= {f"pcx, {name}": ours(name) for name in ("cuda", "triton")}


def can_run(form: str) -> bool:
    return ", " not in form or DISPATCH.unavailable(form.split(", ")[1]) is None


def inference(form: str, given: Inputs, scale: float = SCALE) -> Results:
    with torch.no_grad():
        return FORMS[form](given, given.x, scale)


def training(form: str, given: Inputs, scale: float = SCALE) -> tuple[Tensor, ...]:
    """The gradients of x, W and b; that of x alone for the LayerNorm."""
    results = FORMS[form](given, given.x.clone(), scale)
    leaves = [given.x] if form == "LayerNorm" else [given.x, given.weight, given.bias]
    return torch.autograd.grad(results, leaves, given.grads)


PASSES = {"inference": inference, "training": training}


def exact(given: Inputs, scale: float) -> tuple[Results, tuple[Tensor, ...]]:
    """The results and the gradients in float64, out of place."""
    leaves = [t.detach().double().requires_grad_() for t in (given.x, given.weight, given.bias)]
    x, weight, bias = leaves
    delta = scale * F.linear(x[..., given.index], weight, bias)
    changed = x.index_add(-1, given.index, delta)
    affine = [t.double() for t in given.norm[:2]]
    results = (changed, F.layer_norm(changed, (DIM,), *affine, EPS))
    grads = [g.double() for g in given.grads]
    found = torch.autograd.grad(results, leaves, grads) if grads else ()
    return (changed.detach(), results[1].detach()), found


def check(batch: int, count: int) -> None:
    """Checks results and gradients of every form to a few roundings of the exact ones."""
    allowed = 8 * torch.finfo(DTYPE).eps
    for form in FORMS:
        if form == "LayerNorm" or not can_run(form):
            continue
        given = Inputs(batch, count, learns=False)
        wanted, _ = exact(given, 0.5)
        pairs = list(zip(inference(form, given, 0.5), wanted, strict=True))
        given = Inputs(batch, count, learns=True)
        pairs += list(zip(training(form, given, 0.5), exact(given, 0.5)[1], strict=True))
        for found, right in pairs:
            error = (found.double() - right).norm() / right.norm()
            assert error < allowed, (form, batch, count, float(error))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("batch", BATCHES)
def test_ninety_six_channels(benchmark, form, name, batch):
    if not can_run(form):
        pytest.skip(f"{form} cannot run here")
    check(batch, 96)
    given = Inputs(batch, 96, name == "training")

    def run() -> None:
        PASSES[name](form, given)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def measure(name: str, batch: int, count: int):
    """A row for each form; LayerNorm comes first."""
    per_norm = None
    for form in FORMS:
        if not can_run(form):
            continue
        inputs = [Inputs(batch, count, name == "training", seed) for seed in range(6)]
        calls = [lambda g=g, form=form: PASSES[name](form, g) for g in inputs]
        first, median, third = graphed(calls)
        per_norm = per_norm or median
        row = {
            "pass": name,
            "form": form,
            "batch": batch,
            "tokens": TOKENS,
            "dim": DIM,
            "channels": count,
            "dtype": "bfloat16",
            "us_median": round(median, 2),
            "us_q1": round(first, 2),
            "us_q3": round(third, 2),
            "times_norm": round(median / per_norm, 3),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "driver": driver(),
        }
        print(*row.values(), flush=True)
        yield row


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file, before = table(parser.parse_args().out, "salient_linear")
    done = {(r["pass"], r["batch"], r["channels"]) for r in before}
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        for batch in BATCHES:
            for count in COUNTS:
                check(batch, count)
                for name in PASSES:
                    if (name, str(batch), str(count)) in done:
                        continue
                    for row in measure(name, batch, count):
                        writer.writerow(row)
                    output.flush()


if __name__ == "__main__":
    main()
