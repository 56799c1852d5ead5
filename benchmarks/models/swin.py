"""Times VPT-Deep on Swin-B, 50 prompts in every window, against the plain model: writes a CSV.

`python benchmarks/models/swin.py infer` and `... train` write rows of `results/swin_<gpu>.csv`:
milliseconds of a call, and of a training step, of 64 images of 224 x 224 in bfloat16, every form
compiled by `torch.compile` as a whole, then recorded in a CUDA graph. Peak memory is that of a
step outside of graphs. `--eager` leaves the compiler out, `--ways` chooses forms.

- plain: timm's model with its fused attention on; in training its head alone is trained;
- plain, timm's default: the same with its attention written out, as timm has it by default;
- folded: `pcx.VPT`, for inference through `pcx.freeze`;
- concatenated: prompts as tokens of every window, as in the VPT paper's code, which also runs the
  MLP on the prompts' outputs, averaged over windows, before it drops them;
- concatenated, no MLP on prompts: the same without that.

Before anything is timed, every form is compared in float32 with the concatenated one.

`... op` times the attention alone, of all windows of a stage's shifted block (of the last stage,
which has one window, of a plain one): packed, the kernel that `pcx.prefix_attention` takes;
tiled, the Triton kernel for any size; and SDPA over concatenated keys and widened bias.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from by_hand import CLASSES, RESULTS, Rows, in_turns, peak_of, per_call
from gpu_timing import graph_of, graphed
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


def plain_of(fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = timm.create_model(NAME, num_classes=CLASSES)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model.eval()


def forms() -> dict[str, nn.Module]:
    """The forms by name, over copies of one model's weights."""
    plain = plain_of()
    folded = pcx.VPT(plain, M, head_init="keep").eval()
    found = {"plain": plain, "plain, timm's default": plain_of(fused=False), "folded": folded}
    for name, mlp in (("concatenated", True), ("concatenated, no MLP on prompts", False)):
        model = copy.deepcopy(plain).requires_grad_(False)
        prompts = iter(folded.prompts)
        for stage in model.layers:
            for i, block in enumerate(stage.blocks):
                stage.blocks[i] = Concatenated(block, next(prompts), mlp)
        model.head.requires_grad_()
        found[name] = model.eval()
    for name in ("plain", "plain, timm's default"):
        found[name].requires_grad_(False)
        found[name].head.requires_grad_()
    return found


def checked(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    x = torch.randn(2, 3, 224, 224, device=DEVICE)
    with torch.no_grad():
        expected = models["concatenated"](x)
        for name in ("folded", "concatenated, no MLP on prompts"):
            assert (models[name](x) - expected).norm() < 1e-3 * expected.norm(), name
        assert (pcx.freeze(models["folded"])(x) - expected).norm() < 1e-3 * expected.norm()
        assert (models["plain"](x) - expected).norm() > 1e-2 * expected.norm()
        written_out = models["plain, timm's default"](x)
        assert (models["plain"](x) - written_out).norm() < 1e-3 * written_out.norm()
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


# Of Swin-B's stages: windows of an image, heads.
STAGES = {"stage 1": (64, 4), "stage 2": (16, 8), "stage 3": (4, 16), "stage 4": (1, 32)}
TOKENS, HEAD_DIM, SETS_OF_INPUTS = 49, 32, 4


def op(rows: Rows) -> None:
    for stage, (windows, heads) in STAGES.items():
        like = {"device": DEVICE, "dtype": torch.bfloat16}
        each = [
            torch.randn(BATCH * windows, TOKENS, 3, heads, HEAD_DIM, **like)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
            for _ in range(SETS_OF_INPUTS)
        ]
        ways = attentions(windows, heads)
        expected = ways["concatenated"](*each[0]).float()
        for way, run in ways.items():
            assert (run(*each[0]).float() - expected).norm() < 1e-2 * expected.norm(), way
            calls = [partial(run, *inputs) for inputs in each]
            rows.add("op", f"Swin-B {stage}", way, BATCH, graphed(calls)[1] / 1000, float("nan"))


def attentions(windows: int, heads: int) -> dict[str, Callable[..., Tensor]]:
    """The attention of a stage by way, of windows [B * W, H, N, d]."""
    from pcx.kernels.prefix_attention.forward import forward

    like = {"device": DEVICE, "dtype": torch.bfloat16}
    bias = torch.randn(windows, heads, TOKENS, TOKENS, **like)
    prefix = torch.randn(2, heads, M, HEAD_DIM, **like).unbind(0)
    padded, shape = F.pad(bias, (M, 0)), (BATCH, windows)

    def packed(*qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, shape) for t in qkv)
        return pcx.prefix_attention(q, k, v, *prefix, bias=bias).flatten(0, 1)

    def tiled(*qkv: Tensor) -> Tensor:
        return forward(*qkv, *prefix, None, None, bias[None], HEAD_DIM**-0.5, (64, 32, 4, 3))[0]

    def concatenated(q: Tensor, *kv: Tensor) -> Tensor:
        k, v = (
            torch.cat([p.expand(len(t), -1, -1, -1), t], 2) for p, t in zip(prefix, kv, strict=True)
        )
        q, k, v = (t.unflatten(0, shape) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=padded).flatten(0, 1)

    return {"packed": packed, "tiled": tiled, "concatenated": concatenated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("works", nargs="+", choices=("infer", "train", "op"))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--ways", nargs="*")
    options = parser.parse_args()
    rows = Rows(RESULTS, "swin")
    if "op" in options.works:
        op(rows)
    works = [work for work in options.works if work != "op"]
    models = checked(forms()) if works else {}
    chosen = {way: models[way] for way in options.ways or models}
    for work in works:
        (infer if work == "infer" else train)(rows, chosen, options.eager)


if __name__ == "__main__":
    main()
