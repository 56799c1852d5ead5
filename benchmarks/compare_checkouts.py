"""Times two checkouts of pcx in turn on one GPU: `python benchmarks/compare_checkouts.py BASE`.

BASE is the folder of the other checkout, with its extension built in place. The script writes
`results/checkouts_<gpu>.csv`: for each measurement the median of each checkout over the turns, and
the median, lowest and highest ratio of the turns. A turn is one process for each checkout. Which
checkout comes first alternates. "graph" rows are CUDA graphs, "compiled" rows are compiled models
in CUDA graphs, and "call" rows are plain calls, Python included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graph_of, quantiles, table

HERE = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
BATCH, PROMPTS = 64, 200
MODES = ("graph", "call", "compiled")
FIELDS = "what work mode prompts batch base_us new_us new_over_base lowest highest"
MACHINE = "gpu torch triton turns"
ROW = tuple[str, str, str, int, int]  # what, work, mode, prompts, batch


def attention(prompts: int) -> Iterator[tuple[ROW, Callable[[], object]]]:
    """The operation alone, forward and backward: B = 64, 12 heads, 197 tokens, d = 64, bfloat16."""
    import pcx

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = rand(BATCH, 197, 3, 12, 64).permute(2, 0, 3, 1, 4).unbind(0)
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]
    tensors += [rand(12, prompts, 64).requires_grad_() for _ in range(2)]
    gradient = rand(BATCH, 197, 12, 64).transpose(1, 2)

    def forward() -> object:
        with torch.no_grad():
            return pcx.prefix_attention(*tensors)

    def both() -> object:
        return torch.autograd.grad(pcx.prefix_attention(*tensors), tensors, gradient)

    with torch.no_grad():  # a graph that is kept would tie the leaves to this stream
        pairs = zip(tensors[3:], (k, v), strict=True)
        joined = [torch.cat([p.expand(BATCH, *p.shape), x], 2) for p, x in pairs]
        expected = torch.nn.functional.scaled_dot_product_attention(q, *joined)
    assert (forward() - expected).norm() < 2e-2 * expected.norm()
    for mode in ("graph", "call"):
        yield ("prefix_attention", "forward", mode, prompts, BATCH), forward
        yield ("prefix_attention", "forward and backward", mode, prompts, BATCH), both


def vpt(mode: str, batch: int) -> Iterator[tuple[ROW, Callable[[], object]]]:
    """VPT-Deep of ViT-B/16 with 200 prompts, bfloat16 autocast: inference, a training step."""
    import pcx

    torch.manual_seed(0)
    model = pcx.VPT(timm.create_model("vit_base_patch16_224", num_classes=100), PROMPTS).cuda()
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.arange(batch, device="cuda") % 100
    used = [p for p in model.parameters() if p.requires_grad]
    called = torch.compile(model) if mode == "compiled" else model

    def inference() -> object:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return called(images)

    def training() -> object:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = called(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return torch.autograd.grad(loss, used)

    model.eval()
    yield ("VPT of ViT-B/16", "inference", mode, PROMPTS, batch), inference
    if batch > 1:
        model.train()
        yield ("VPT of ViT-B/16", "training step", mode, PROMPTS, batch), training


def microseconds(run: Callable[[], object], mode: str) -> float:
    """The median time of a call: replayed from a graph, or made from Python as it is."""
    if mode != "call":
        return quantiles(graph_of([run]).replay, repeats=20, per_repeat=3)[1]
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(modes: Sequence[str]) -> None:
    """Prints a line of JSON for each measurement of the pcx that is imported."""
    for prompts in (0, 50, 200):
        for row, run in attention(prompts):
            if row[2] in modes:
                print(json.dumps([row, microseconds(run, row[2])]), flush=True)
    for mode, batch in (("graph", BATCH), ("call", BATCH), ("call", 1), ("compiled", BATCH)):
        for row, run in vpt(mode, batch) if mode in modes else ():
            print(json.dumps([row, microseconds(run, row[2])]), flush=True)


def one_turn(checkout: Path, modes: Sequence[str]) -> dict[ROW, float]:
    """The measurements of a checkout, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--modes", *modes]
    found = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), *sys.path[1:]])},
    )
    rows = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")]
    return {tuple(row): us for row, us in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", action="store_true", help="of the pcx that is imported")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.modes)
    if arguments.base is None:
        parser.error("base: give the folder of the other checkout")
    found: dict[ROW, tuple[list[float], list[float]]] = {}
    for turn in range(arguments.turns):
        pair = list(enumerate((arguments.base.resolve(), HERE)))
        for i, checkout in pair[:: 1 if turn % 2 == 0 else -1]:
            for row, us in one_turn(checkout, arguments.modes).items():
                found.setdefault(row, ([], []))[i].append(us)
        print(f"turn {turn + 1} of {arguments.turns} is done", flush=True)
    file, _ = table(arguments.out, "checkouts")
    import triton

    with open(file, "w", newline="") as output:
        writer = csv.writer(output)
        writer.writerow([*FIELDS.split(), *MACHINE.split()])
        for row, (base, new) in found.items():
            ratios = sorted(b / a for a, b in zip(base, new, strict=True))
            numbers = [statistics.median(base), statistics.median(new)]
            numbers = [round(x, 1) for x in numbers]
            numbers += [round(x, 4) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
            machine = (torch.cuda.get_device_name(), torch.__version__, triton.__version__)
            writer.writerow([*row, *numbers, *machine, len(ratios)])
            print(*row, *numbers, flush=True)


if __name__ == "__main__":
    main()
