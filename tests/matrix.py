"""What each family of backbones carries, found by comparing with literal forms in float64.

`python tests/matrix.py` (or `make families`) runs every cell and writes `docs/families.md`; of some
`--families` or `--cells` it writes these anew.
`tests/models/test_matrix.py` runs some of them in CI. A cell is a function of a family's name; it
raises an AssertionError where the numbers differ, and a ValueError of pcx where the family has no
meaning for it, whose first sentence is the reason that the table gives.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, build, image_size, randomise
from torch import Tensor, nn

import pcx
from pcx.backbones import attention
from pcx.backbones.outputs import logits_of
from pcx.backbones.towers import with_head
from pcx.token_pruning import stages, tome

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
CLASSES = 5
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6)}

# Small models with stages or windows: timm's name, arguments, the size of an image, and depth= of
# a VPT where not all blocks can carry prompts.
STAGED: dict[str, tuple[str, dict[str, Any], int, Any]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64, None),
    "swin-s3": ("swin_s3_tiny_224", {**SWIN, "window_size": (4, 8)}, 64, None),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 64, None),
    "swinv2-cr": ("swinv2_cr_tiny_224", SWIN, 64, None),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}, 64, None),
    "coatnet": ("coatnet_nano_rw_224", {"img_size": 64}, 64, None),
    "tiny-vit": ("tiny_vit_5m_224", {}, 224, None),
    "nest": ("nest_tiny", {"img_size": 64}, 64, None),
    "hiera": ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 2, 2, 1)}, 224, slice(None)),
    "twins": (
        "twins_svt_small",
        {"img_size": 64, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
        | {"depths": (2, 2, 2, 2)},
        64,
        slice(0, 6, 2),
    ),
    "pvt-v2": ("pvt_v2_b0", {}, 64, slice(-2, None)),
    "volo": ("volo_d1_224", {"img_size": 64}, 64, slice(4, None)),
    "cait": ("cait_xxs24_224", {"img_size": 64, "depth": 2}, 64, slice(None)),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 2}, 64, slice(-2, None)),
    "pit": ("pit_ti_224", {"img_size": 64}, 64, None),
    "pit-distilled": ("pit_ti_distilled_224", {"img_size": 64}, 64, None),
    "vitamin": ("vitamin_small_224", {"img_size": 64}, 64, None),
    "crossvit": ("crossvit_9_240", {"img_size": 240}, 240, None),
    "samvit": (
        "samvit_base_patch16_224",
        {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
        | {"window_size": 2, "global_attn_indexes": (2,)},
        64,
        None,
    ),
    "visformer": ("visformer_tiny", {"img_size": 64}, 64, None),
    "mobilevit": ("mobilevit_xxs", {}, 64, None),
    "fastvit": ("fastvit_sa12", {}, 64, None),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}, 64, None),
    "levit": ("levit_128s", {"img_size": 64}, 64, None),
    "davit": ("davit_tiny", {}, 64, None),
    "efficientformer": ("efficientformer_l1", {}, 224, None),
    "convnext": ("convnext_atto", {}, 64, None),
    "resnet": ("resnet18", {}, 64, None),
}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViT": {},
    "DeiT": {},
    "Dinov2": {},
    "Dinov2WithRegisters": {},
    "Beit": {},
    "Swin": {"depths": [2, 2], "num_heads": [3, 6], "embed_dim": 24, "window_size": 4}
    | {"patch_size": 4},
    "IJepa": {},
    "Siglip": {},
}
# Vision towers, which have no classifier: their class, and that of their configuration.
TOWERS = {
    "hf-clip": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "hf-clip-projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
    "hf-siglip-tower": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "hf-siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", {}),
    "hf-dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {}),
    "hf-mae": ("ViTMAEModel", "ViTMAEConfig", {}),
}
NAMES = [*FAMILIES, *STAGED, *(f"hf-{name.lower()}" for name in HUGGING_FACE), *TOWERS]


def backbone_of(name: str, **more: Any) -> nn.Module:
    """A small random model in float64 and eval mode; `more` goes to timm's constructor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in FAMILIES:
            return build(name, CLASSES, **more)
        if name in STAGED:
            library, arguments, size, _ = STAGED[name]
            overlay = {"input_size": (3, size, size)}  # what timm does not say of another img_size
            model: Any = timm.create_model(
                library, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **arguments, **more
            )
        elif more:
            raise TypeError("arguments are timm's")
        else:
            model = _hugging_face(name)
    model = model.double()
    randomise(model)
    for p in model.parameters() if name not in FAMILIES else ():
        if p.dim() == 4:  # a convolution's inputs are more than a row of its kernel
            p.data *= (p.shape[-1] / p[0].numel()) ** 0.5
    for module in model.modules():  # running statistics that are not the identity
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            generator = torch.Generator().manual_seed(2)
            shape = module.running_var.shape
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return model.eval()


def _hugging_face(name: str) -> nn.Module:
    """A classifier, or a tower with a linear layer behind its features."""
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 96, "image_size": 64, "patch_size": 16}
    if name in TOWERS:
        of_model, of_config, more = TOWERS[name]
        config = getattr(transformers, of_config)(**sizes, **more)
        tower = getattr(transformers, of_model)(config)
        return with_head(tower.double(), CLASSES)
    named = next(n for n in HUGGING_FACE if f"hf-{n.lower()}" == name)
    more = HUGGING_FACE[named]
    given = {**({} if "depths" in more else sizes), "image_size": 64, **more}
    of_config = getattr(transformers, f"{named}Config")
    if hasattr(of_config, "sub_configs") and "vision_config" in of_config.sub_configs:
        config = of_config(vision_config=given, num_labels=CLASSES)
    else:
        config = of_config(**given, num_labels=CLASSES)
    return getattr(transformers, f"{named}ForImageClassification")(config)


def images_of(name: str, batch: int = 2) -> Tensor:
    size = image_size(name) if name in FAMILIES else STAGED.get(name, ("", {}, 64, None))[2]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator).double()


def prompted(name: str, backbone: nn.Module | None = None, m: int = 3, **more: Any) -> pcx.VPT:
    """A VPT whose prompts are large enough to be seen beside tokens that are not normed."""
    depth = STAGED[name][3] if name in STAGED else None
    if more.get("kind") == "shallow":
        depth = None
    torch.manual_seed(0)
    model = pcx.VPT(backbone_of(name) if backbone is None else backbone, m, depth=depth, **more)
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.copy_(torch.randn_like(prompts) * 2)
    return model.eval()


def close(found: Tensor, expected: Tensor, bound: float = 1e-10) -> None:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    assert difference <= bound, difference


# The literal forms.


def _first_token(x: Tensor, layout: str, vector: Tensor) -> Tensor:
    """The stream with a vector in the place of its first token."""
    x = x.clone()
    place: Any = {"BNC": (..., 0, slice(None)), "BHWC": (..., 0, 0, slice(None))}.get(
        layout, (slice(None), slice(None), 0, 0)
    )
    x[place] = vector
    return x


def _rows(x: Tensor, form: str, heads: int) -> Tensor:
    """Keys or values of a call as [tokens, H, d]."""
    if form == "(BH)ND":
        x = x.unflatten(0, (-1, heads))
    if form == "BHWND" and x.dim() == 5:
        x = x.transpose(1, 2)
    return x.transpose(-3, -2).reshape(-1, heads, x.shape[-1])


class Literal:
    """A block's forward with prompts whose keys are those that a token of the image would have.

    Each prompt is put in the place of the first token of the block's input. The key that changes is
    the prompt's. The attention is a softmax over the prompts' keys and the block's own.
    """

    def __init__(self, block: nn.Module, spec: Any, prompts: Tensor, kind: str):
        self.block, self.spec, self.prompts, self.kind = block, spec, prompts, kind
        self.own = block.forward
        block.forward = self  # type: ignore[assignment]

    def _keys(self, x: Tensor, args: tuple, kwargs: dict) -> list[tuple[Tensor, Tensor]]:
        """For each attention call the keys and values of the prompts, [H, m, d]."""
        spec = self.spec
        if self.kind == "prefix":
            pair = self.prompts.unflatten(-1, (spec.heads, -1)).transpose(1, 2)
            return [(pair[0], pair[1])]
        whole = self._calls(x, args, kwargs)
        found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in whole]
        for prompt in self.prompts:
            changed = self._calls(_first_token(x, spec.layout, prompt), args, kwargs)
            for (keys, values), before, after in zip(found, whole, changed, strict=True):
                k, v = (_rows(t, spec.call_form, spec.heads) for t in (after.k, after.v))
                old = _rows(before.k, spec.call_form, spec.heads)
                rows = ((k - old).abs().amax((-1, -2)) > 1e-9).nonzero().flatten()
                assert len(rows), "the token has no key"
                assert len(rows) == len(x), "a token changes keys of others"
                keys.append(k[rows[0]])
                values.append(v[rows[0]])
        return [(torch.stack(k, 1), torch.stack(v, 1)) for k, v in found]

    def _calls(self, x: Tensor, args: tuple, kwargs: dict) -> list[attention.Call]:
        calls: list[attention.Call] = []

        def attend(_: int, call: attention.Call) -> Tensor:
            calls.append(call)
            return call.output()

        with attention.intercept(attend, []):
            self.own(x, *args, **kwargs)
        return calls

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.prompts.shape[-2]:
            return self.own(x, *args, **kwargs)
        pairs = self._keys(x, args, kwargs)

        def attend(n: int, call: attention.Call) -> Tensor:
            form, (key, value) = self.spec.call_form, pairs[n]
            if form == "(BH)ND":
                key, value = (t.repeat(len(call.k) // len(t), 1, 1) for t in (key, value))
            elif form == "BHWND" and call.k.dim() == 5:
                key, value = key[:, None], value[:, None]
            scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
            logits = call.q @ call.k.transpose(-2, -1) * scale
            if call.bias is not None:
                bias = call.bias
                if bias.dtype == torch.bool:
                    bias = torch.zeros_like(logits).masked_fill(~bias, -torch.inf)
                logits = logits + bias
            of_prompts = call.q @ key.transpose(-2, -1) * scale
            weights = torch.cat([of_prompts, logits], -1).softmax(-1)
            m = key.shape[-2]
            return weights[..., :m] @ value + weights[..., m:] @ call.v

        with attention.intercept(attend, []):
            return self.own(x, *args, **kwargs)


def literal(model: pcx.VPT, prompts: Sequence[Tensor] | None = None) -> nn.Module:
    """The plain backbone, fused, with a model's head and the literal form of its prompts."""
    plain = copy.deepcopy(model.plain).eval()  # type: ignore[operator]
    attention.fuse(plain)
    for name, head in zip(model.spec.heads, model.heads, strict=True):
        plain.set_submodule(name, copy.deepcopy(head))
    for i, spec in enumerate(model.spec.blocks):
        own = model.prompts[i] if prompts is None else prompts[i]
        Literal(plain.get_submodule(spec.name), spec, own, model.kind)
    return plain


def _model(name: str, **more: Any) -> pcx.VPT:
    plain = backbone_of(name)
    model = prompted(name, plain, **more)
    object.__setattr__(model, "plain", plain)
    return model


# The cells.


def deep(name: str) -> None:
    """Logits and gradients by the prompts and the image equal the literal form's."""
    _folded(_model(name), images_of(name))


def prefix(name: str) -> None:
    """The same of kind "prefix"."""
    _folded(_model(name, kind="prefix"), images_of(name))


def _folded(model: pcx.VPT, x: Tensor, idle: int = 0, **inputs: Any) -> None:
    """Compares with the literal form; so many blocks at most have prompts that nothing reads."""
    oracle = literal(model)
    grads = []
    used = [p for p in model.prompts if p.numel()]
    for run in (model, oracle):
        given = x.clone().requires_grad_()
        logits = logits_of(run(given, **inputs))
        grads.append([logits, *torch.autograd.grad(logits.square().sum(), [given, *used])])
    for found, expected in zip(*grads, strict=True):
        close(found, expected, 1e-9)
    assert all(expected.norm() > 0 for expected in grads[1][:2])
    assert sum(not expected.norm() for expected in grads[1]) <= idle
    without = model.keep([torch.arange(0)] * len(model.prompts))
    assert (without(x, **inputs) - grads[1][0]).norm() > 1e-6 * grads[1][0].norm()


def shallow(name: str) -> None:
    """Equal to the plain blocks run on the prompts among the tokens."""
    model, x = _model(name, kind="shallow"), images_of(name)
    if not model.spec.is_one_sequence:  # tests/models/test_windows.py has the literal form
        whole = model(x)
        close(model(x[:1]), whole[:1])
        without = model.keep([torch.arange(0)] * len(model.prompts))
        assert (without(x) - whole).norm() > 1e-6 * whole.norm()
        return
    start, m = model.spec.prefix_tokens, len(model.prompts[0])
    plain = literal(model, [p.new_zeros(0, p.shape[-1]) for p in model.prompts])
    blocks = [plain.get_submodule(b.name) for b in model.spec.blocks]
    own = model.prompts[0].detach()

    def put_in(_: Any, args: tuple) -> tuple:
        tokens = args[0]
        among = own.expand(len(tokens), -1, -1)
        return (torch.cat([tokens[:, :start], among, tokens[:, start:]], 1), *args[1:])

    def take_out(_: Any, args: tuple, out: Any) -> Any:
        tokens = out[0] if isinstance(out, tuple) else out
        tokens = torch.cat([tokens[:, :start], tokens[:, start + m :]], 1)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    blocks[0].register_forward_pre_hook(put_in)
    blocks[-1].register_forward_hook(take_out)
    for module in plain.modules():
        if hasattr(module, "num_prefix_tokens") and module is not plain:
            module.num_prefix_tokens += m

    def attend(_: int, call: attention.Call) -> Tensor:
        bias = call.bias
        if bias is not None and bias.shape[-1] < call.k.shape[-2]:
            rows = (start, bias.shape[-2] - start) if bias.shape[-2] > 1 else None
            for axis in (-1, -2) if rows else (-1,):
                size = list(bias.shape)
                size[axis] = m
                value = bias.new_ones(size) if bias.dtype == torch.bool else bias.new_zeros(size)
                first, rest = bias.split([start, bias.shape[axis] - start], axis)
                bias = torch.cat([first, value, rest], axis)
        return attention.Call(call.q, call.k, call.v, bias, call.scale).output()

    with attention.intercept(attend, []):
        expected = logits_of(plain(x))
    close(model(x), expected)


def condense(name: str) -> None:
    """Scores equal each sample's own gradient of the literal form; what is kept, it without."""
    model, x = _model(name), images_of(name, 3)
    y = torch.tensor([0, 4, 2])
    prompts = [p.detach().clone().requires_grad_() for p in model.prompts]
    oracle, used = literal(model, prompts), [p for p in prompts if p.numel()]
    rows = []
    for image, label in zip(x, y, strict=True):
        loss = F.cross_entropy(logits_of(oracle(image[None])), label[None])
        grads = torch.autograd.grad(loss, used)
        rows.append(torch.cat([(g * p).norm(dim=-1) for g, p in zip(grads, used, strict=True)]))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    found = pcx.score(model, loader, method="taylor", progress=False)
    close(torch.cat(found), torch.stack(rows).mean(0), 1e-8)
    small = pcx.condense(model, loader, keep=0.5, epochs=0, progress=False)
    assert 0 < sum(small.counts) < sum(model.counts)
    close(small(x), logits_of(literal_of(small, model)(x)))


def literal_of(small: pcx.VPT, model: pcx.VPT) -> nn.Module:
    object.__setattr__(small, "plain", model.plain)
    return literal(small)


def sct(name: str) -> None:
    """Equal to the plain model with one line in place before each reader and behind each MLP."""
    plain, x = backbone_of(name), images_of(name)
    for position in ("attn", "mlp"):
        model = pcx.SCT(
            plain, None, k=5, position=position, selection="random", head_init="keep"
        ).eval()
        oracle = copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in model.salient.parameters():
                parameter.normal_(0, 0.3)
        for spec, salient in zip(model.spec.blocks, model.salient[position], strict=True):
            _line_in(oracle, spec, salient, position)
        with torch.no_grad():
            expected = logits_of(oracle(x))
            close(model(x), expected)
            assert (logits_of(plain(x)) - expected).norm() > 1e-5 * expected.norm()


def _line_in(oracle: nn.Module, spec: Any, salient: Any, position: str) -> None:
    def change(x: Tensor) -> None:
        x = x.movedim(1, -1) if spec.layout == "BCHW" else x
        u = x[..., salient.index]
        x[..., salient.index] = u + salient.scale * (u @ salient.weight.T + salient.bias)

    if position == "attn":
        oracle.get_submodule(spec.reader).register_forward_pre_hook(lambda _, args: change(args[0]))
    else:
        oracle.get_submodule(spec.mlp).register_forward_hook(lambda _, args, out: change(out))


def features(name: str) -> None:
    """Maps without prompts equal the library's own."""
    plain, x = backbone_of(name), images_of(name)
    found = pcx.Linear(plain, head_init="keep").eval().features(x)
    if hasattr(plain, "forward_intermediates"):
        expected = plain.forward_intermediates(x, intermediates_only=True)
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    else:
        tower: Any = getattr(plain, "tower", plain)
        states = tower(x, output_hidden_states=True).hidden_states
        side = found[-1].shape[-1]
        for a, b in zip(found, states[1:], strict=True):
            close(a, b[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)))


def setr(name: str) -> None:
    """A class for every pixel by SETR's decoder: the same as deep, on `pcx.SETR`."""
    plain = pcx.SETR(backbone_of(name), CLASSES, channels=8)
    randomise(plain.decoder)
    model = prompted(name, plain, head_init="keep")
    object.__setattr__(model, "plain", plain)
    _folded(model, images_of(name), idle=1)  # CrossViT's last block gives [CLS] alone


def sizes(name: str) -> None:
    """The same as deep, of images of another size than the model was built for."""
    x = images_of(name)
    step = 28 if x.shape[-1] % 16 else 32
    larger = F.interpolate(x, (x.shape[-2] + step, x.shape[-1]))
    for more, inputs in SIZE_ARGUMENTS:
        try:
            plain = backbone_of(name, **more)
            with torch.no_grad():
                plain(larger, **inputs)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
            continue
        model = prompted(name, plain)
        object.__setattr__(model, "plain", plain)
        return _folded(model, larger, **inputs)
    raise ValueError("model: its library takes images of one size")


# Arguments by which libraries take other sizes: of the constructor, and of the forward.
SIZE_ARGUMENTS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"dynamic_img_size": True}, {}),
    ({"strict_img_size": False}, {}),
    ({}, {"interpolate_pos_encoding": True}),
    ({}, {}),
)


class Reduced:
    """A block's forward, behind which tokens are dropped or merged; written out.

    Args:
        block: changed.
        reduce: (tokens, call, known) -> (tokens, known), of what is known of the tokens.
        known: a list of one item, which the blocks hand on.
        attend: (call, known) -> what attention gives.
    """

    def __init__(self, block: nn.Module, reduce: Any, known: list[Any], attend: Any):
        self.own, self.reduce, self.known, self.attend = block.forward, reduce, known, attend
        block.forward = self  # type: ignore[assignment]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls: list[attention.Call] = []

        def attend(_: int, call: attention.Call) -> Tensor:
            calls.append(call)
            return self.attend(call, self.known[0])

        with attention.intercept(attend, []):
            out = self.own(x, *args, **kwargs)
        tokens = out[0] if isinstance(out, tuple) else out
        tokens, self.known[0] = self.reduce(tokens, calls[0], self.known[0])
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens


def zero_tprune(name: str) -> None:
    """Equal to the plain blocks, behind which the tokens that the stages leave are picked."""
    model, x = backbone_of(name), images_of(name)
    setting = {"similar": 2, "iters": 3, "cls_boost": False}
    oracle = copy.deepcopy(model)
    attention.fuse(oracle)
    pruning = pcx.zero_tprune(model, layers=(1, 2), keep=0.7, **setting)
    spec, known = pcx.Linear(oracle).spec, [None]

    def drop(tokens: Tensor, call: attention.Call, _: Any) -> tuple[Tensor, Any]:
        left = int((call.q.shape[2] - spec.prefix_tokens - 2) * 0.7 + 0.5)
        stays = stages.prune(
            call.q, call.k, keep=left, protected=spec.prefix_tokens, scale=call.scale, **setting
        )
        return torch.stack([t[s] for t, s in zip(tokens, stays, strict=True)]), None

    for block in spec.blocks_in(oracle)[:2]:
        Reduced(block, drop, known, lambda call, _: call.output())
    with torch.no_grad():
        whole = logits_of(backbone_of(name)(x))
        expected = logits_of(oracle(x))
        close(logits_of(model(x)), expected)
    assert (expected - whole).norm() > 1e-6 * whole.norm()
    assert [kept.shape[1] < x.shape[-1] for kept in pruning.kept] == [True, True]


def tokens_merged(name: str) -> None:
    """Equal to the plain blocks, with sizes in a softmax, and pairs merged in loops behind them."""
    model, x, r = backbone_of(name), images_of(name), 3
    oracle = copy.deepcopy(model)
    attention.fuse(oracle)
    tome(model, r=r)
    spec = pcx.Linear(oracle).spec
    known: list[Any] = [None]

    def attend(call: attention.Call, sizes: Any) -> Tensor:
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        logits = call.q @ call.k.transpose(-2, -1) * scale
        if sizes is not None:
            logits = logits + sizes.log()[:, None, None]
        return logits.softmax(-1) @ call.v

    def merge(tokens: Tensor, call: attention.Call, sizes: Any) -> tuple[Tensor, Tensor]:
        sizes = tokens.new_ones(tokens.shape[:2]) if sizes is None else sizes
        rows = zip(tokens, sizes, call.k.mean(1), strict=True)
        merged = [_merged(*row, r, spec.prefix_tokens) for row in rows]
        return torch.stack([t for t, _ in merged]), torch.stack([s for _, s in merged])

    def spread(tokens: Tensor, _: attention.Call, sizes: Tensor) -> tuple[Tensor, None]:
        rows = zip(tokens, sizes.long(), strict=True)
        return torch.stack([t.repeat_interleave(s, 0) for t, s in rows]), None

    blocks = spec.blocks_in(oracle)
    for block in blocks[:-1]:
        Reduced(block, merge, known, attend)
    Reduced(blocks[-1], spread, known, attend)  # the head reads each token as often as it stands
    with torch.no_grad():
        whole = logits_of(backbone_of(name)(x))
        expected = logits_of(oracle(x))
        close(logits_of(model(x)), expected)
    assert (expected - whole).norm() > 1e-6 * whole.norm()


def _merged(
    tokens: Tensor, sizes: Tensor, features: Tensor, r: int, protected: int
) -> tuple[Tensor, Tensor]:
    """One sample's tokens [N, D] and sizes [N]; the r of A most like one of B go into it."""
    places = range(protected, len(tokens))
    if not (r := min(r, len(places) // 2)):
        return tokens, sizes
    group_a, group_b = ([i for i in places if i % 2 == odd] for odd in (0, 1))
    unit = F.normalize(features, dim=-1)
    best = {i: max((float(unit[i] @ unit[j]), -j) for j in group_b) for i in group_a}
    going = sorted(group_a, key=lambda i: -best[i][0])[:r]
    groups = [[i] for i in (*range(protected), *(i for i in group_a if i not in going))]
    groups += [[j, *(i for i in going if -best[i][1] == j)] for j in group_b]
    mass = [sizes[group].sum() for group in groups]
    means = [
        (sizes[group, None] * tokens[group]).sum(0) / m
        for group, m in zip(groups, mass, strict=True)
    ]
    return torch.stack(means), torch.stack(mass)


def freeze(name: str) -> None:
    """The frozen model computes what the literal form does."""
    model, x = _model(name), images_of(name)
    with torch.no_grad():
        close(pcx.freeze(model)(x), logits_of(literal(model)(x)))


def compiled(name: str) -> None:
    """One graph, whose logits and gradients are the model's."""
    model, x = _model(name), images_of(name)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    used = [p for p in model.prompts if p.numel()]
    grads = []
    for each in (model, run):
        logits = each(x)
        grads.append([logits, *torch.autograd.grad(logits.square().sum(), used)])
    for found, expected in zip(*reversed(grads), strict=True):
        close(found, expected)


def exported(name: str) -> None:
    """torch.export of the frozen backbone computes what it does."""
    frozen, x = pcx.freeze(_model(name)), images_of(name)
    with torch.no_grad():
        expected = logits_of(frozen.backbone(x))
        program = torch.export.export(frozen.backbone, (x,), strict=False)
        close(logits_of(program.module()(x)), expected)


CELLS: dict[str, Callable[[str], None]] = {
    "deep": deep,
    "shallow": shallow,
    "prefix": prefix,
    "condense": condense,
    "SCT": sct,
    "Zero-TPrune": zero_tprune,
    "ToMe": tokens_merged,
    "features": features,
    "SETR": setr,
    "freeze": freeze,
    "compile": compiled,
    "export": exported,
    "sizes": sizes,
}


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mark(cell: str, name: str) -> str:
    """Runs a cell; "" where it holds, else the reason why the family has no meaning for it.

    Raises:
        AssertionError: numbers differ.
    """
    try:
        with quiet():
            CELLS[cell](name)
    except ValueError as error:
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    """The first sentence of an error's message, without the names of this family."""
    text = str(error)
    for end in (". Supported", ". Blocks ", "; ", " (", ", so that tokens"):
        text = text.split(end)[0]
    text = re.sub(r"^\w+: ((SETR of )?\w+ is not supported: )?", "", text).strip()
    text = re.sub(r"^[\w.]*\.[\w.]*\d[\w.]*( of \w+)?:? ", "a block ", text)
    text = text.replace("a block its attention", "a block's attention")
    text = re.sub(r"^[A-Z]\w+ (has|turns|gives|computes)", r"it \1", text)
    text = re.sub(r"of the image tokens of \w+", "of image tokens", text)
    text = re.sub(r", and \w+ is neither$", "", text)
    return re.sub(r"^\d+ of \d+ tokens", "tokens", text).replace("|", "/")


Marks = dict[tuple[str, str], str]  # by family and cell: "" where it holds, else the reason


def table_of(marks: Marks) -> str:
    """The page of the table, whose notes are the reasons."""
    reasons = list(dict.fromkeys(reason for reason in marks.values() if reason))
    green = sum(not reason for reason in marks.values())
    head = " | ".join(CELLS)
    lines = [
        "# Families",
        "",
        "<!-- Written by `make families`; tests/models/test_matrix.py compares it with runs. -->",
        "",
        "What each family of backbones carries. A `yes` stands for a comparison with a literal",
        "form in float64, on a small random model of the family: equal logits, and equal gradients",
        "by the prompts and the image where there are some. A number is a reason, below.",
        f"{green} of {len(marks)} cells hold (timm {timm.__version__}, torch",
        f"{torch.__version__.partition('+')[0]}). A row: `python tests/matrix.py --families swin`.",
        "",
        f"| family | model | {head} |",
        f"| --- | --- |{' --- |' * len(CELLS)}",
    ]
    for name in dict.fromkeys(family for family, _ in marks):
        found = [marks[name, cell] for cell in CELLS]
        cells = ["yes" if not r else str(reasons.index(r) + 1) for r in found]
        depth = STAGED[name][3] if name in STAGED else None
        partly = "" if depth is None else f", depth={_said(depth)}"
        lines.append(f"| {name} | {library_name(name)}{partly} | {' | '.join(cells)} |")
    lines += ["", "| | reason |", "| --- | --- |"]
    lines += [f"| {i} | {reason} |" for i, reason in enumerate(reasons, 1)]
    lines += ["", "Columns:", ""]
    lines += [f"- {cell}: {(run.__doc__ or '').splitlines()[0]}" for cell, run in CELLS.items()]
    lines += [
        "",
        "A family with depth= has blocks that cannot carry prompts: attention over channels, over",
        "reduced keys, or with heads mixed. `pcx.VPT` names the blocks that can, and takes depth=",
        'or a number for each. Kind "shallow" of Swin is compared with its literal form in',
        "tests/models/test_windows.py.",
    ]
    return "\n".join(lines) + "\n"


def _said(depth: slice) -> str:
    parts = [depth.start, depth.stop, *([] if depth.step is None else [depth.step])]
    return f"slice({', '.join(map(str, parts))})"


def library_name(name: str) -> str:
    """The model's name in its library."""
    if name in FAMILIES:
        return FAMILIES[name][0]
    if name in STAGED:
        return STAGED[name][0]
    if name in TOWERS:
        return TOWERS[name][0]
    return next(n for n in HUGGING_FACE if f"hf-{n.lower()}" == name) + "ForImageClassification"


def marks_in(text: str) -> Marks:
    """The marks of a page that `table_of` wrote."""
    reasons = {
        int(n): reason for n, reason in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    }
    found: Marks = {}
    columns: list[str] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if parts[:2] == ["family", "model"]:
            columns = parts[2:]
        if line.startswith("| ") and parts[0] in NAMES:
            for cell, part in zip(columns, parts[2:], strict=True):
                found[parts[0], cell] = "" if part == "yes" else reasons[int(part)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--check", action="store_true", help="compare with the page; write nothing")
    options = parser.parse_args()
    marks, failed = Marks(), []
    for name in options.families:
        for cell in options.cells:
            start = time.time()
            try:
                marks[name, cell] = mark(cell, name)
                said = marks[name, cell] or "yes"
            except Exception as error:
                failed.append((name, cell))
                said = f"FAILED {type(error).__name__}: {str(error)[:300]}"
            print(f"{name} {cell} {time.time() - start:.1f}s {said}", flush=True)
    page = marks_in(TABLE.read_text())
    if options.check:
        failed += [each for each, reason in marks.items() if bool(page[each]) != bool(reason)]
    if failed:
        sys.exit(f"failed: {failed}")
    cells = [(name, cell) for name in NAMES for cell in CELLS]
    known = {**page, **marks}
    if not options.check and set(cells) <= set(known):
        TABLE.write_text(table_of({each: known[each] for each in cells}))
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
