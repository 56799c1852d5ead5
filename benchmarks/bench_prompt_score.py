"""Benchmark of scoring a data set, against other ways to its gradients, and against training.

`pytest benchmarks/bench_prompt_score.py` checks and times. Run as a program it writes
`results/prompt_score_cpu.csv`, or on a GPU `prompt_score_<gpu>.csv` in bfloat16 autocast. A row has
the time of one more batch, the time of a call beside its batches, and peak memory. Modes are eager,
CUDA graphs ("graphed", pcx by its own `execution`), and compiled in CUDA graphs. Rows that are
already there are not measured again. `--draw <csv>` draws the cost of all of condensing, as the
paper's Fig. 8b.

- plain: the backbone's forward and the gradient of the loss down to the input of its first block;
- pcx: `pcx.score(method="taylor")`;
- pcx, four methods: four scores from the same pass;
- expanded: every sample has its own copy of the prompts, which pass each block's norm and
  projection; folded, with `pcx.prefix_attention`;
- expanded, concatenated: the same in the published form of VPT;
- one by one: the gradient of one sample's loss by the prompts, sample after sample;
- training: a step of `pcx.fit`'s recipe with all prompts, folded;
- fine-tuning: the same with 30% of the prompts.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.func import functional_call

import pcx

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graph_of, rows_of, table
from machine import cpu_name

RESULTS = Path(__file__).parent / "results"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
AMP = "bf16" if ON_GPU else "no"
BATCH = 64 if ON_GPU else 16
# Batches; the difference in time is that of more batches. On a CPU it would drown in noise.
FEW = 4 if ON_GPU else 0
MODELS = (
    {"vit_base_patch16_224": (100, 10, 50, 200), "vit_large_patch16_224": (100, 10, 50, 200)}
    if ON_GPU
    else {"vit_tiny_patch16_224": (100, 10, 50, 200)}
)
DRAWN = {
    "vit_tiny_patch16_224": (50, 100, 200),
    "vit_base_patch16_224": (50, 100, 200),
    "vit_large_patch16_224": (100,),
}
GRAPHED = {("vit_base_patch16_224", 100), ("vit_base_patch16_224", 200)} if ON_GPU else set()
KEEP = 0.3
# Passes over the data set in the paper: VPT's training, scoring, fine-tuning.
PASSES = {"training": 100, "pcx": 1, "fine-tuning": 20}
FIELDS = (
    "model form mode prompts batch dtype ms_median ms_q1 ms_q3 fixed_ms peak_mib threads machine "
    "torch timm"
)


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def effort(name: str, prompts: int) -> tuple[int, int]:
    """How many batches, and how often: more for what is measured in all modes."""
    if not ON_GPU:
        return 4, 5
    return (36, 5) if (name, prompts) in GRAPHED else (16, 3)


class Setting:
    """A model, and every form of its scoring and training over some batches."""

    def __init__(self, name: str, prompts: int, mode: str = "eager"):
        torch.manual_seed(0)
        self.mode = mode
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        # Frozen, since a compiled backward pass computes all gradients that are required.
        self.backbone = timm.create_model(name, num_classes=100).requires_grad_(False)
        self.backbone.to(DEVICE).eval()
        self.model = pcx.VPT(self.backbone, prompts, read_only=False, head_init="keep").eval()
        keep = [torch.arange(round(KEEP * prompts)) for _ in self.model.layers]
        self.small = self.model.keep(keep).train()
        self.embed, self.rest = self._embed, self._rest
        if mode == "compiled":
            self.model.compile()
            self.embed, self.rest = torch.compile(self._embed), torch.compile(self._rest)
        count = effort(name, prompts)[0] * BATCH
        images = torch.randn(count, 3, 224, 224, device=DEVICE)
        labels = torch.arange(count, device=DEVICE) % 100
        self.batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone._pos_embed(self.backbone.patch_embed(images))

    def _rest(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_head(self.backbone.norm(self.backbone.blocks(x)))

    def _losses(self, run, x, labels) -> torch.Tensor:
        with autocast():
            logits = run(x)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def plain(self, batches: Batches) -> None:
        for images, labels in batches:
            with torch.no_grad(), autocast():
                tokens = self.embed(images)
            tokens.requires_grad_()
            torch.autograd.grad(self._losses(self.rest, tokens, labels).sum(), tokens)

    def pcx(self, batches: Batches) -> list[torch.Tensor]:
        execution = "eager" if self.mode == "eager" else "cuda-graph"
        return pcx.score(self.model, batches, amp=AMP, execution=execution, progress=False)

    def four_methods(self, batches: Batches) -> list[torch.Tensor]:
        methods = ("taylor", "taylor-inner", "gate", "cls-attention")
        arguments = {"method": methods, "amp": AMP, "execution": "eager", "progress": False}
        return pcx.score(self.model, batches, **arguments)["taylor"]

    def expanded(self, batches: Batches) -> list[torch.Tensor]:
        prompts = [p.detach() for p in self.model.prompts]
        totals = [torch.zeros(len(p), dtype=torch.float64, device=DEVICE) for p in prompts]
        for images, labels in batches:
            leaves = [p.expand(BATCH, *p.shape).requires_grad_() for p in prompts]
            names = {f"prompts.{i}": leaf for i, leaf in enumerate(leaves)}

            def run(images, names=names):
                return functional_call(self.model, names, (images,))

            losses = self._losses(run, images, labels)
            grads = torch.autograd.grad(losses.sum(), leaves)
            for total, g, p in zip(totals, grads, prompts, strict=True):
                total += (g * p).norm(dim=-1).double().sum(0)
        return _means(totals, batches)

    def concatenated(self, batches: Batches) -> list[torch.Tensor]:
        self.model.path = "concat"
        try:
            return self.expanded(batches)
        finally:
            self.model.path = "folded"

    def one_by_one(self, batches: Batches) -> list[torch.Tensor]:
        prompts = list(self.model.prompts)
        totals = [torch.zeros(len(p), dtype=torch.float64, device=DEVICE) for p in prompts]
        for images, labels in batches:
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                grads = torch.autograd.grad(self._losses(self.model, image, label), prompts)
                for total, g, p in zip(totals, grads, prompts, strict=True):
                    total += (g * p.detach()).norm(dim=-1).double()
        return _means(totals, batches)

    def _train(self, model, batches: Batches) -> None:
        used = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(used, lr=0.0, momentum=0.9, weight_decay=1e-3)
        for images, labels in batches:
            self._losses(model, images, labels).mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    def training(self, batches: Batches) -> None:
        self.model.train()
        try:
            self._train(self.model, batches)
        finally:
            self.model.eval()

    def fine_tuning(self, batches: Batches) -> None:
        self._train(self.small, batches)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, AMP == "bf16")


def _means(totals: list[torch.Tensor], batches: Batches) -> list[torch.Tensor]:
    return [total / sum(len(labels) for _, labels in batches) for total in totals]


FORMS = {
    "plain": "plain",
    "pcx": "pcx",
    "pcx, four methods": "four_methods",
    "expanded": "expanded",
    "expanded, concatenated": "concatenated",
    "training": "training",
    "fine-tuning": "fine_tuning",
    "one by one": "one_by_one",
}
# The forms that are measured in CUDA graphs too.
ALSO_GRAPHED = ("plain", "pcx", "expanded", "expanded, concatenated")


def check(setting: Setting, expected: list[torch.Tensor]) -> None:
    """Checks that all ways to the scores agree on the first batch, in a CUDA graph too."""
    first = setting.batches[:1] * (1 if setting.mode == "eager" else 3)
    for form in (setting.pcx, setting.four_methods, setting.expanded, setting.concatenated):
        for a, b in zip(form(first), expected, strict=True):
            a, b = a.cpu(), b.cpu()
            if AMP == "no":
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
            else:
                assert (a - b).norm() < 0.05 * b.norm()


@pytest.fixture(scope="module")
def setting():
    made = Setting(next(iter(MODELS)), 100)
    check(made, made.one_by_one(made.batches[:1]))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_a_data_set(benchmark, setting, form):
    benchmark.pedantic(timed, (setting, form, FEW or 1), rounds=2, warmup_rounds=1)


def timed(setting: Setting, form: str, count: int) -> float:
    """Milliseconds of the first `count` batches."""
    batches = setting.batches[:count]
    start = time.perf_counter()
    if form in setting.graphs:
        for _ in batches:
            setting.graphs[form].replay()
    else:
        getattr(setting, FORMS[form])(batches)
    if ON_GPU:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def warm_up(setting: Setting, form: str) -> int | str:
    """The peak memory of a few batches in MiB, less what was used before; "" if not counted."""
    if not ON_GPU:
        timed(setting, form, 1)
        return ""
    if setting.mode != "eager" and form != "pcx":
        call = getattr(setting, FORMS[form])
        setting.graphs[form] = graph_of([lambda: call(setting.batches[:1])])
        return ""  # a graph holds all of its memory all the time
    count = 1 if form == "one by one" else FEW
    timed(setting, form, count)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(setting, form, count)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def measure(name: str, prompts: int, mode: str, forms: list[str]):
    """One row per form. The forms take turns, so that a slow minute affects all of them."""
    setting = Setting(name, prompts)
    expected = setting.one_by_one(setting.batches[:1])
    if mode != "eager":
        setting = Setting(name, prompts, mode)
    check(setting, expected)
    peaks = {form: warm_up(setting, form) for form in forms}
    times: dict[str, list[float]] = {form: [] for form in forms}
    fixed: dict[str, list[float]] = {form: [] for form in forms}
    many, repeats = effort(name, prompts)
    for number in range(repeats):
        for form in forms:
            if form == "one by one":
                if number < 3:
                    times[form].append(timed(setting, form, 1))
                continue
            few = timed(setting, form, FEW) if FEW else 0.0
            times[form].append((timed(setting, form, many) - few) / (many - FEW))
            if FEW:
                fixed[form].append(few - FEW * times[form][-1])
    for form in forms:
        first, median, third = statistics.quantiles(times[form], n=4, method="inclusive")
        row = {
            "model": name,
            "form": form,
            "mode": mode,
            "prompts": prompts,
            "batch": BATCH,
            "dtype": "bfloat16 autocast" if AMP == "bf16" else "float32",
            "ms_median": round(median, 2),
            "ms_q1": round(first, 2),
            "ms_q3": round(third, 2),
            "fixed_ms": round(statistics.median(fixed[form]), 1) if fixed[form] else "",
            "peak_mib": peaks[form],
            "threads": torch.get_num_threads(),
            "machine": torch.cuda.get_device_name() if ON_GPU else cpu_name(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        print(*row.values(), flush=True)
        yield row


def draw(file: Path) -> None:
    """Draws the times of training, scoring and fine-tuning, relative to training (Fig. 8b)."""
    from matplotlib.figure import Figure

    rows = rows_of(file)
    shown = [(m, n) for m, counts in DRAWN.items() for n in counts]
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    colours = {"training": "C0", "pcx": "C3", "fine-tuning": "C1"}
    labels = []
    for model, prompts in shown:
        times = {
            r["form"]: float(r["ms_median"])
            for r in rows
            if (r["model"], r["prompts"], r["mode"]) == (model, str(prompts), "eager")
        }
        if not set(PASSES) <= set(times):
            continue
        place = len(labels)
        whole, left = PASSES["training"] * times["training"], 0.0
        for form, passes in PASSES.items():
            width = passes * times[form] / whole
            axes.barh(place, width, left=left, color=colours[form])
            left += width
        labels.append(f"{model}, {prompts} prompts")
    if not labels:
        raise SystemExit(f"{file}: no model has rows of {', '.join(PASSES)} yet")
    for form, colour in colours.items():
        name = "scoring" if form == "pcx" else form
        passes = "1 pass" if PASSES[form] == 1 else f"{PASSES[form]} passes"
        axes.barh(0, 0, color=colour, label=f"{name}, {passes}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set(xlabel="time, relative to training VPT", title=rows[0]["machine"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    figure.savefig(file.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    if arguments.draw:
        return draw(arguments.draw)
    if ON_GPU:
        file, before = table(arguments.out, "prompt_score")
    else:
        file = arguments.out / "prompt_score_cpu.csv"
        before = rows_of(file)
    done = {(r["model"], r["mode"], r["prompts"], r["form"]) for r in before}
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        for name, mode, prompts in settings():
            wanted = FORMS if mode == "eager" else ALSO_GRAPHED
            forms = [f for f in wanted if (name, mode, str(prompts), f) not in done]
            if forms:
                for row in measure(name, prompts, mode, forms):
                    writer.writerow(row)
                output.flush()


def settings():
    """All cases (model, mode, prompts), the most important first."""
    for mode in ("graphed", "eager", "compiled"):
        for name, prompts in sorted(GRAPHED):
            yield name, mode, prompts
    for name, counts in MODELS.items():
        for prompts in counts:
            if (name, prompts) not in GRAPHED:
                yield name, "eager", prompts


if __name__ == "__main__":
    main()
