"""Times VPT on larger backbones, longer images and other head dims: writes a CSV.

`python benchmarks/models/sizes.py` writes `results/sizes_<gpu>.csv`; the works are

- train: milliseconds of a training step, recorded in a CUDA graph by hand, of a VPT folded and
  concatenating;
- infer: of a call of timm's plain model and of the concatenating VPT, recorded by hand, and of the
  plain model and the folded VPT through `pcx.freeze`.

- memory: the peak of a call of each of these, eagerly and with that model alone on the GPU; its
  milliseconds are empty.

Everything is bfloat16 autocast with 100 prompts a layer. Peak memory of training is that of a step
outside of graphs, with one model on the GPU. Before anything is timed,
the folded and the concatenating form are compared in float32: logits, and gradients of the first
layer's prompts. Frozen models are compared with those that they were made of.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from by_hand import RESULTS, Rows, backbone_of, inference_of, peak_of, per_call, step_of
from gpu_timing import graph_of
from user_calls import vpt_of

import pcx


class Size(NamedTuple):
    """A backbone of timm, the side of its images in pixels, and the batches to time."""

    name: str
    side: int
    batches: tuple[int, ...]


SIZES = {
    "ViT-S/16": Size("vit_small_patch16_224", 224, (1, 8, 64)),
    "ViT-B/16": Size("vit_base_patch16_224", 224, (1, 2, 4, 8, 64)),
    "ViT-B/16, 384 px": Size("vit_base_patch16_384", 384, (1, 64)),
    "ViT-L/16": Size("vit_large_patch16_224", 224, (1, 64)),
    "ViT-H/14": Size("vit_huge_patch14_224", 224, (1, 64)),
    "SigLIP SO400M/14": Size("vit_so400m_patch14_siglip_224", 224, (1, 64)),
}
FORMS = {"folded": "folded", "concatenating": "concat"}
Add = Callable[[str, int, float, float], None]  # way, batch, ms, peak MiB


def checked(size: Size) -> None:
    """Compares the logits and the gradients of the first layer's prompts in float32."""
    images = torch.randn(8, 3, size.side, size.side, device="cuda")  # one or two might not fold
    found = []
    for path in FORMS.values():
        vpt = vpt_of(size.name, path).eval()
        logits = vpt(images)
        found.append(torch.autograd.grad(logits.square().sum(), vpt.prompts[0])[0])
        found.append(logits.detach())
    for folded, concatenating in zip(found[:2], found[2:], strict=True):
        assert (folded - concatenating).norm() < 2e-3 * concatenating.norm()


def train(add: Add, size: Size) -> None:
    for batch in size.batches:
        for form, path in FORMS.items():
            gc.collect()
            torch.cuda.empty_cache()
            step = step_of(vpt_of(size.name, path), batch, size.side)
            peak = peak_of(step)
            add(form, batch, per_call(graph_of([step]).replay, 5, 7), peak)
            del step


def infer(add: Add, size: Size) -> None:
    plain = backbone_of(size.name)
    folded, concatenating = (vpt_of(size.name, path).eval() for path in FORMS.values())
    nothing = float("nan")  # three models are on the GPU, so that a peak says little
    for batch in size.batches:
        images = torch.randn(batch, 3, size.side, size.side, device="cuda")
        for way, model in (("plain", plain), ("concatenating", concatenating)):
            ms = per_call(graph_of([inference_of(model, images)]).replay, 5, 7)
            add(way, batch, ms, nothing)
        for way, model in (("plain, pcx.freeze", plain), ("VPT, pcx.freeze", folded)):
            expected = inference_of(model, images)().float()
            call = inference_of(pcx.freeze(model, amp="bf16"), images)
            found = [call().float() for _ in range(3)][-1]
            assert (found - expected).norm() < 2e-2 * expected.norm(), way
            add(way, batch, per_call(call, 5, 7), nothing)
            del call


def memory(add: Add, size: Size) -> None:
    for way in ("plain", "concatenating", "plain, pcx.freeze", "VPT, pcx.freeze"):
        gc.collect()
        torch.cuda.empty_cache()
        model = backbone_of(size.name).requires_grad_(False)
        if way == "concatenating":
            model = vpt_of(size.name, "concat").eval()
        elif way == "VPT, pcx.freeze":
            model = vpt_of(size.name, "folded").eval()
        if way.endswith("freeze"):
            model = pcx.freeze(model, amp="bf16", execution="eager")
        images = torch.randn(size.batches[-1], 3, size.side, size.side, device="cuda")
        call = inference_of(model, images)
        call()
        gc.collect()  # what the model was made from
        add(way, size.batches[-1], float("nan"), peak_of(call))


WORKS = {"train": train, "infer": infer, "memory": memory}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--work", nargs="*", choices=WORKS, default=list(WORKS))
    options.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    rows = Rows(chosen.out, "sizes")
    for model in chosen.size:
        checked(SIZES[model])
        for work in chosen.work:
            torch.cuda.empty_cache()
            WORKS[work](partial(rows.add, work, model), SIZES[model])


if __name__ == "__main__":
    main()
