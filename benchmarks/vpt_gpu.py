"""Times ViT-B/16 and ViT-L/16 end to end on a GPU: `python benchmarks/vpt_gpu.py` writes a CSV.

`results/vpt_<gpu>.csv` has inference and training steps in bfloat16 autocast, each eager in a CUDA
graph and compiled. Rows that are already there are not measured again.

- plain: the backbone without prompts;
- folded, concat: VPT-Deep on either path;
- read: computes in the last block only the tokens that the head reads;
- frozen: "read" after `pcx.freeze(..., amp="bf16")`, for inference: weights are cast once, and the
  prompts' keys and values are constants.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import timm
import torch

import pcx

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graph_of, quantiles, table

RESULTS = Path(__file__).parent / "results"
BATCH, CLASSES = 64, 100
MODELS = {"vit_base_patch16_224": (50, 100, 200), "vit_large_patch16_224": (200,)}
FORMS = ("plain", "plain read", "plain frozen", "folded", "folded read", "frozen", "concat")
FIELDS = "model work form mode prompts batch dtype ms_median ms_q1 ms_q3 peak_mib gpu torch timm"


def build(name: str, form: str, prompts: int) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES).cuda().eval()
    if form == "plain":
        return backbone
    path = "concat" if form == "concat" else "folded"
    count = 0 if form.startswith("plain") else prompts
    read = form.endswith(("read", "frozen"))
    model = pcx.VPT(backbone, count, path=path, read_only=read)
    return pcx.freeze(model, amp="bf16") if form.endswith("frozen") else model


def check(name: str, prompts: int, images: torch.Tensor) -> None:
    """Checks that the forms with prompts agree in float32."""
    found = {}
    for form in ("folded", "folded read", "concat"):
        model = build(name, form, prompts).eval()
        with torch.no_grad():
            found[form] = model(images[:4])
    for form in ("folded", "folded read"):
        torch.testing.assert_close(found[form], found["concat"], rtol=1e-3, atol=1e-3)
    frozen = build(name, "frozen", prompts)(images[:4]).float()
    assert (frozen - found["concat"]).norm() < 2e-2 * found["concat"].norm()


def inference(model: torch.nn.Module, images: torch.Tensor):
    model.eval()  # works for a frozen model too, which only refuses to train

    def run():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(images)

    return run


def training(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """Forward and backward, without the optimiser's step, which is the same for all forms."""
    model.train()
    used = [p for p in model.parameters() if p.requires_grad]

    def run():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return torch.autograd.grad(loss, used)

    return run


def measure(name: str, form: str, prompts: int, work: str, mode: str) -> dict:
    torch._dynamo.reset()
    model = build(name, form, prompts)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    labels = torch.arange(BATCH, device="cuda") % CLASSES
    called = torch.compile(model) if mode == "compiled" else model
    run = inference(model, images) if work == "inference" else training(model, images, labels)
    if mode == "compiled":
        run = inference(called, images) if work == "inference" else training(called, images, labels)
    run()
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - weights
    replay = graph_of([run]).replay
    first, median, third = (us / 1000 for us in quantiles(replay, repeats=15, per_repeat=2))
    return {
        "model": name,
        "work": work,
        "form": form,
        "mode": mode,
        "prompts": 0 if form.startswith("plain") else prompts,
        "batch": BATCH,
        "dtype": "bfloat16 autocast",
        "ms_median": round(median, 3),
        "ms_q1": round(first, 3),
        "ms_q3": round(third, 3),
        "peak_mib": round(peak / 2**20),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def runs():
    """All cases (model, form, prompts, work, mode), the headline of the fold first."""
    for name, counts in MODELS.items():
        for prompts in reversed(counts):
            for mode in ("compiled", "eager"):
                for work in ("inference", "training"):
                    for form in FORMS:
                        plain = form.startswith("plain")
                        if plain and (prompts != counts[-1] or work == "training"):
                            continue
                        if form.endswith("frozen") and work == "training":
                            continue
                        yield name, form, prompts, work, mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file, before = table(parser.parse_args().out, "vpt")
    done = {tuple(r[k] for k in ("model", "work", "form", "mode", "prompts")) for r in before}
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        checked = set()
        for model, form, prompts, work, mode in runs():
            shown = 0 if form.startswith("plain") else prompts
            if (model, work, form, mode, str(shown)) in done:
                continue
            if (model, prompts) not in checked:
                check(model, prompts, images)
                checked.add((model, prompts))
            row = measure(model, form, prompts, work, mode)
            print(*row.values(), flush=True)
            writer.writerow(row)
            output.flush()


if __name__ == "__main__":
    main()
