"""Times VPT-Deep on Swin-B, 50 prompts in every window, against the plain model: writes a CSV.

`python benchmarks/models/swin.py infer` and `... train` write rows of `results/swin_<gpu>.csv`:
milliseconds of a call, and of a training step, of 64 images of 224 x 224 in bfloat16, every form
compiled by `torch.compile` as a whole, then recorded in a CUDA graph. Peak memory is that of a
step outside of graphs. `--eager` leaves the compiler out.

- plain: timm's model with its fused attention on; in training its head alone is trained;
- folded: `pcx.VPT`, for inference through `pcx.freeze`;
- concatenated: prompts as tokens of every window, as in the VPT paper's code, which also runs the
  MLP on the prompts' outputs, averaged over windows, before it drops them;
- concatenated, no MLP on prompts: the same without that.

Before anything is timed, every form is compared in float32 with the concatenated one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from by_hand import CLASSES, RESULTS, Rows, in_turns, peak_of, per_call
from gpu_timing import graph_of
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

import pcx

NAME, M, BATCH = "swin_base_patch4_window7_224", 50, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Concatenated(nn.Module):
    """timm's Swin block with prompts as tokens of every window, dropped behind the block."""

    def __init__(self, block: nn.Module, prompts: Tensor, mlp: bool):
        super().__init__()
        self.block, self.mlp = block, mlp
        self.prompts = nn.Parameter(prompts.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        block, m = self.block, len(self.prompts)
        window, shift = block.window_size, block.shift_size
        batch, height, width, _ = x.shape
        prompts = self.prompts.expand(batch, -1, -1)
        both = block.norm1(torch.cat([prompts, x.flatten(1, 2)], 1))
        tokens = both[:, m:].view(x.shape)
        if any(shift):
            tokens = tokens.roll((-shift[0], -shift[1]), (1, 2))
        windows = window_partition(tokens, window).flatten(1, 2)  # [B * W, N, C]
        count = len(windows) // batch
        own = both[:, None, :m].expand(-1, count, -1, -1).flatten(0, 1)
        out = self._attend(torch.cat([own, windows], 1), count)
        tokens = window_reverse(out[:, m:].unflatten(1, window), window, height, width)
        if any(shift):
            tokens = tokens.roll(tuple(shift), (1, 2))
        averaged = out[:, :m].unflatten(0, (batch, count)).mean(1)
        y = torch.cat([prompts, x.flatten(1, 2)], 1)
        y = y + torch.cat([averaged, tokens.flatten(1, 2)], 1)
        if not self.mlp:
            y = y[:, m:]
        y = y + block.mlp(block.norm2(y))
        return y[:, -height * width :].view(x.shape)

    def _attend(self, x: Tensor, count: int) -> Tensor:
        module, m = self.block.attn, len(self.prompts)
        heads = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        bias = module._get_rel_pos_bias()
        mask = self.block.attn_mask
        if mask is not None:
            q, k, v = (t.unflatten(0, (-1, count)) for t in (q, k, v))
            bias = bias + mask[:, None]
        bias = F.pad(bias, (m, 0, m, 0)).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).flatten(0, -4)
        return module.proj(out.transpose(1, 2).flatten(2))


def plain_of() -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = timm.create_model(NAME, num_classes=CLASSES)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model.eval()


def forms() -> dict[str, nn.Module]:
    """The forms by name, over copies of one model's weights."""
    plain = plain_of()
    folded = pcx.VPT(plain, M, head_init="keep").eval()
    found = {"plain": plain, "folded": folded}
    for name, mlp in (("concatenated", True), ("concatenated, no MLP on prompts", False)):
        model = copy.deepcopy(plain).requires_grad_(False)
        prompts = iter(folded.prompts)
        for stage in model.layers:
            for i, block in enumerate(stage.blocks):
                stage.blocks[i] = Concatenated(block, next(prompts), mlp)
        model.head.requires_grad_()
        found[name] = model.eval()
    plain.requires_grad_(False)
    plain.head.requires_grad_()
    return found


def checked(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    x = torch.randn(2, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        expected = models["concatenated"](x)
        for name in ("folded", "concatenated, no MLP on prompts"):
            assert (models[name](x) - expected).norm() < 1e-3 * expected.norm(), name
        assert (pcx.freeze(models["folded"])(x) - expected).norm() < 1e-3 * expected.norm()
        assert (models["plain"](x) - expected).norm() > 1e-2 * expected.norm()
    return models


def compiled(model: nn.Module, eager: bool) -> Callable[[Tensor], Tensor]:
    return model if eager else torch.compile(model, dynamic=False)


def infer(rows: Rows, models: dict[str, nn.Module], eager: bool) -> None:
    x = torch.randn(BATCH, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
    calls, kept = {}, []
    for way, model in models.items():
        model = pcx.freeze(model) if way == "folded" else copy.deepcopy(model)
        model = model.to(torch.bfloat16).requires_grad_(False).eval()
        run = compiled(getattr(model, "backbone", model), eager)

        def call(run: Callable[[Tensor], Tensor] = run) -> Tensor:
            with torch.no_grad():
                return run(x)

        calls[way] = graph_of([call]).replay
        kept.append(model)  # a graph reads its weights and does not hold them
    for way, ms in in_turns(calls, 5).items():
        rows.add("infer" + (", eager" if eager else ""), "Swin-B", way, BATCH, ms, float("nan"))


def step_of(model: nn.Module, eager: bool) -> Callable[[], Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    labels = torch.randint(CLASSES, (BATCH,), device=DEVICE)
    run = compiled(model, eager)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = run(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def train(rows: Rows, models: dict[str, nn.Module], eager: bool) -> None:
    for way, model in models.items():
        step = step_of(model, eager)
        for _ in range(2):
            step()
        peak = peak_of(step)
        ms = per_call(graph_of([step]).replay, 3, 7)
        rows.add("train" + (", eager" if eager else ""), "Swin-B", way, BATCH, ms, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="+", choices=("infer", "train"))
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    models = checked(forms())
    rows = Rows(RESULTS, "swin")
    for work in options.works:
        (infer if work == "infer" else train)(rows, models, options.eager)


if __name__ == "__main__":
    main()
