"""Times what users pick instead of pcx: `python benchmarks/models/rivals.py LIBRARY`.

It adds rows of the works "train" and "infer" to the table of `user_calls.py` on the same machine.
Each library runs in a process of its own, since they need versions of timm and Transformers that
exclude each other's:

- adapter-plus: VPT-Deep on timm. adapter-plus 0.1.0 needs timm 1.0.7 to 1.0.11 and omegaconf. Its
  logits are compared with those of the VPT written by hand before they are timed.
- adapters: prefix tuning of Hugging Face's ViT. adapters 1.3.0 needs Transformers 4.57. Its
  prefix is checked to change the logits and to learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from by_hand import (
    BATCHES,
    CLASSES,
    PROMPTS,
    RESULTS,
    VITS,
    HandWrittenVPT,
    Rows,
    backbone_of,
    inference_of,
    peak_of,
    per_call,
    step_of,
)

HF_SIZES = {"ViT-S/16": (384, 6), "ViT-B/16": (768, 12)}


def adapter_plus(model: str) -> torch.nn.Module:
    import adapter_plus  # noqa: F401, it puts itself into timm

    config = SimpleNamespace(num_tokens=PROMPTS, dropout=0.0)
    made = backbone_of(VITS[model], adapter=True, prompt_config=config)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("prompt" in name or name.startswith("head."))
    by_hand = HandWrittenVPT(backbone_of(VITS[model]), [block.prompt for block in made.blocks])
    by_hand.backbone.load_state_dict(
        {n: t for n, t in made.state_dict().items() if "prompt" not in n}
    )
    images = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(made(images), by_hand(images), rtol=1e-3, atol=1e-3)
    return made


def adapters(model: str) -> torch.nn.Module:
    import adapters as library
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    width, heads = HF_SIZES[model]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    made = ViTForImageClassification(ViTConfig(num_labels=CLASSES, **sizes))
    library.init(made)
    config = library.PrefixTuningConfig(prefix_length=PROMPTS, flat=True)
    made.add_adapter("prefix", config=config)
    made.train_adapter("prefix")
    made.cuda().eval()
    images = torch.randn(4, 3, 224, 224, device="cuda")
    found = []
    for active in (None, "prefix"):
        made.set_active_adapters(active)
        with torch.no_grad():
            found.append(made(images).logits)
    assert (found[1] - found[0]).norm() > 1e-4 * found[0].norm()
    step = step_of(made, 4)
    first = float(step())
    for _ in range(20):
        last = float(step())
    assert last < first, (first, last)
    return made.eval()


LIBRARIES: dict[str, tuple[str, Callable[[str], torch.nn.Module]]] = {
    "adapter-plus": ("adapter-plus VPT", adapter_plus),
    "adapters": ("adapters prefix tuning", adapters),
}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("library", choices=LIBRARIES)
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    way, make = LIBRARIES[chosen.library]
    rows = Rows(chosen.out)
    for model in VITS:
        for batch in BATCHES:
            made = make(model)
            call = inference_of(made, torch.randn(batch, 3, 224, 224, device="cuda"))
            rows.add("infer", model, way, batch, per_call(call, 10), peak_of(call))
            step = step_of(made, batch)
            rows.add("train", model, way, batch, per_call(step, 10), peak_of(step))
    print(f"timm {timm.__version__}")


if __name__ == "__main__":
    main()
