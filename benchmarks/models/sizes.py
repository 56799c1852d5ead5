"""Times VPT on larger backbones, longer images and other head dims: writes a CSV.

`python benchmarks/models/sizes.py` writes `results/sizes_<gpu>.csv`; the works are

- train: milliseconds of a training step, recorded in a CUDA graph by hand, of a VPT folded and
  concatenating;
- infer: of a call of timm's plain model and of the concatenating VPT, recorded by hand, and of the
  plain model and the folded VPT through `pcx.freeze`.

Everything is bfloat16 autocast with 100 prompts a layer. Peak memory is that of a step or call
outside of graphs. Logits, and in training the gradients of the prompts, of the folded and the
concatenating form are compared in float32 before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from by_hand import PROMPTS, RESULTS, Rows, backbone_of, inference_of, peak_of, per_call, step_of
from gpu_timing import graph_of

import pcx


class Size(NamedTuple):
    """A backbone of timm, the side of its images in pixels, and the batches to time."""

    name: str
    side: int
    batches: tuple[int, ...]


SIZES = {
    "ViT-B/16": Size("vit_base_patch16_224", 224, (1, 2, 4, 8, 64)),
    "ViT-B/16, 384 px": Size("vit_base_patch16_384", 384, (1, 64)),
    "ViT-L/16": Size("vit_large_patch16_224", 224, (1, 64)),
    "ViT-H/14": Size("vit_huge_patch14_224", 224, (1, 64)),
    "SigLIP SO400M/14": Size("vit_so400m_patch14_siglip_224", 224, (1, 64)),
}
FORMS = {"folded": "folded", "concatenating": "concat"}
Add = Callable[[str, int, float, float], None]  # way, batch, ms, peak MiB


def vpt_of(size: Size, path: str) -> pcx.VPT:
    torch.manual_seed(1)
    return pcx.VPT(backbone_of(size.name), PROMPTS, path=path)


def checked(size: Size) -> None:
    """Compares the logits and the gradients of the first layer's prompts in float32."""
    images = torch.randn(8, 3, size.side, size.side, device="cuda")  # fewer would not be folded
    found = []
    for path in FORMS.values():
        vpt = vpt_of(size, path).eval()
        logits = vpt(images)
        found.append(torch.autograd.grad(logits.square().sum(), vpt.prompts[0])[0])
        found.append(logits.detach())
    for folded, concatenating in zip(found[:2], found[2:], strict=True):
        assert (folded - concatenating).norm() < 2e-3 * concatenating.norm()


def train(add: Add, size: Size) -> None:
    for batch in size.batches:
        for form, path in FORMS.items():
            torch.cuda.empty_cache()
            step = step_of(vpt_of(size, path), batch, size.side)
            peak = peak_of(step)
            add(form, batch, per_call(graph_of([step]).replay, 5, 7), peak)


def infer(add: Add, size: Size) -> None:
    plain = backbone_of(size.name)
    folded, concatenating = (vpt_of(size, path).eval() for path in FORMS.values())
    for batch in size.batches:
        images = torch.randn(batch, 3, size.side, size.side, device="cuda")
        for way, model in (("plain", plain), ("concatenating", concatenating)):
            call = inference_of(model, images)
            add(way, batch, per_call(graph_of([call]).replay, 5, 7), peak_of(call))
        expected = inference_of(folded, images)().float()
        for way, model in (("plain, pcx.freeze", plain), ("VPT, pcx.freeze", folded)):
            frozen = pcx.freeze(model, amp="bf16")
            call = inference_of(frozen, images)
            ms = per_call(call, 5, 7)
            if model is folded:
                assert (call().float() - expected).norm() < 2e-2 * expected.norm()
            add(way, batch, ms, peak_of(call))
            del frozen, call


WORKS = {"train": train, "infer": infer}


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
