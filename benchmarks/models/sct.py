"""Times a frozen SCT against its plain backbone and against SCT as published: writes a CSV.

`python benchmarks/models/sct.py` writes `results/sct_<gpu>.csv`: milliseconds of a call, and of a
training step, of a ViT-B/16 in bfloat16 autocast, recorded in a CUDA graph. K is 96 channels in
every layer. Peak memory is that of a training step outside of graphs.

- plain: timm's model, recorded by hand; plain frozen: the same through `pcx.freeze`;
- SCT attn, mlp, both: through `pcx.freeze`;
- published: four operations of torch behind each attention (channels, linear layer, sum, write).

Before anything is timed, every form is compared in float32 with the published one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from by_hand import (
    RESULTS,
    Rows,
    backbone_of,
    in_turns,
    inference_of,
    peak_of,
    per_call,
    step_of,
)
from gpu_timing import graph_of
from torch import Tensor, nn

import pcx

NAME, K, BATCHES = "vit_base_patch16_224", 96, (1, 64)
POSITIONS = ("attn", "mlp", "both")


class Published(nn.Module):
    """SCT behind attention or the MLP, as four operations out of place."""

    def __init__(self, salient: nn.Module):
        super().__init__()
        self.salient = salient

    def forward(self, x: Tensor) -> Tensor:
        salient = self.salient
        u = x[..., salient.index]
        changed = x.clone()
        changed[..., salient.index] = u + salient.scale * F.linear(u, salient.weight, salient.bias)
        return changed


class PublishedBlock(nn.Module):
    """timm's block with one line more behind each of the positions."""

    def __init__(self, block: nn.Module, maps: dict[str, nn.Module]):
        super().__init__()
        self.block = block
        self.maps = nn.ModuleDict({name: Published(each) for name, each in maps.items()})

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        block = self.block
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        if "attn" in self.maps:
            x = self.maps["attn"](x)
        y = block.mlp(block.norm2(x))
        if "mlp" in self.maps:
            y = self.maps["mlp"](y)
        return x + block.drop_path2(block.ls2(y))


def sct_of(position: str) -> pcx.SCT:
    torch.manual_seed(0)
    model = pcx.SCT(
        backbone_of(NAME), None, k=K, selection="random", position=position, head_init="keep"
    )
    with torch.no_grad():
        for parameter in model.salient.parameters():
            parameter.normal_(0, 0.05)
    return model.eval()


def published(model: pcx.SCT) -> nn.Module:
    plain = backbone_of(NAME)
    plain.load_state_dict({k: v for k, v in model.frozen_state().items()}, strict=False)
    for name, head in zip(model.spec.heads, model.heads, strict=True):
        plain.get_submodule(name).load_state_dict(head.state_dict())
    for i, block in enumerate(plain.blocks):
        plain.blocks[i] = PublishedBlock(block, {n: each[i] for n, each in model.salient.items()})
    return plain.eval()


def checked(models: dict[str, pcx.SCT]) -> None:
    """Compares every frozen SCT with the published form in float32."""
    x = torch.randn(4, 3, 224, 224, device="cuda")
    with torch.no_grad():
        for position, model in models.items():
            expected = published(model)(x)
            for found in (model(x), pcx.freeze(model)(x)):
                assert (found - expected).norm() < 1e-3 * expected.norm(), position


def infer(rows: Rows, models: dict[str, pcx.SCT]) -> None:
    plain = backbone_of(NAME)
    ways: dict[str, nn.Module] = {"plain": plain, "SCT attn published": published(models["attn"])}
    ways["plain frozen"] = pcx.freeze(plain, amp="bf16")
    for position, model in models.items():
        ways[f"SCT {position} frozen"] = pcx.freeze(model, amp="bf16")
    for batch in BATCHES:
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        calls = {}
        for way, model in ways.items():
            call = inference_of(model, x)
            call()
            calls[way] = call if "frozen" in way else graph_of([call]).replay
        for way, ms in in_turns(calls, 20).items():
            rows.add("infer", "ViT-B/16", way, batch, ms, float("nan"))


def train(rows: Rows, models: dict[str, pcx.SCT]) -> None:
    """Steps of the head alone, of SCT, and of SCT as published, each recorded by hand."""
    ways: dict[str, nn.Module] = {"linear": pcx.Linear(backbone_of(NAME))}
    ways |= {f"SCT {position}": model for position, model in models.items()}
    ways["SCT attn published"] = written = published(models["attn"])
    for name, parameter in written.named_parameters():
        parameter.requires_grad_("salient" in name or name.startswith("head"))
    for way, model in ways.items():
        step = step_of(model, BATCHES[-1])
        peak = peak_of(step)
        ms = per_call(graph_of([step]).replay, 5, 7)
        rows.add("train", "ViT-B/16", way, BATCHES[-1], ms, peak)


def main() -> None:
    models = {position: sct_of(position) for position in POSITIONS}
    checked(models)
    rows = Rows(RESULTS, "sct")
    infer(rows, models)
    train(rows, models)


if __name__ == "__main__":
    main()
