"""Prompts in windows against a literal loop over images and windows, in float64."""

import math
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from families import randomise
from torch.func import functional_call

import pcx
from pcx.backbones import attention
from pcx.models.vpt import block as vpt_block
from pcx.ops.prefix_attention import prefix_attention

NAMES = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}


def swin(version, size=64, window=4, called=None, resized=None, **more):
    model = timm.create_model(
        NAMES[version],
        **{"img_size": size, "window_size": window, "embed_dim": 24, "depths": (2, 2)},
        **{"num_heads": (2, 4), "num_classes": 5, **more},
    ).double()
    randomise(model)
    if resized is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # timm's, of torch's indexing
            model.set_input_size(**resized)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("logit_scale"):  # some above the clamp
                p.copy_(torch.linspace(1.0, 6.0, p.numel()).view_as(p))
    return model.eval()


# What the published and timm's own code distinguish: shift, padding, sizes and window shapes.
CASES = {
    "divisible": {},
    "padded": {"size": 52},
    "oblong": {"size": (44, 60)},
    "window-3-5": {"size": (48, 40), "window": (3, 5)},
    "always-partition": {"size": 64, "window": 8, "always_partition": True},
    "always-partition-padded": {"size": (44, 60), "window": 5, "always_partition": True},
    "small-window-of-a-stage": {"size": 32},
    "called-at-52": {"strict_img_size": False, "called": (52, 52)},
    "called-at-80-36": {"strict_img_size": False, "called": (80, 36)},
    "set-to-96": {"resized": {"img_size": 96}, "called": (96, 96)},
    "set-to-72-56": {
        "resized": {"img_size": (72, 56), "window_size": (5, 5)},
        "called": (72, 56),
    },
}


def stale_masks(backbone, x):
    """Whether timm, before 1.0.31, has built shift masks for other windows than the image has."""
    found = []

    def see(module, args, kwargs):
        mask = kwargs.get("mask")
        found.append(mask is not None and len(mask) * len(x) != len(args[0]))

    hooks = [
        block.attn.register_forward_pre_hook(see, with_kwargs=True)
        for stage in backbone.layers
        for block in stage.blocks
    ]
    try:
        backbone(x)
    except RuntimeError:  # the windows of the batch are no multiple of the mask's
        found.append(True)
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)


def built(version, case):
    """The backbone of a case, which old versions of timm cannot all build."""
    try:
        return swin(version, **case)
    except RuntimeError as error:
        pytest.skip(f"timm {timm.__version__} cannot build it: {str(error)[:60]}")


def images(case, batch=3):
    size = case.get("called", case.get("size", 64))
    height, width = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).double()


def heads(version, module, tokens):
    """Queries and keys whose products are the logits, and values, each [H, n, d]."""
    bias = module.qkv.bias
    if version == 2:
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
    q, k, v = (
        (tokens @ module.qkv.weight.T + bias)
        .unflatten(-1, (3, module.num_heads, -1))
        .permute(1, 2, 0, 3)
    )
    if version == 1:
        return q * q.shape[-1] ** -0.5, k, v
    scale = module.logit_scale.clamp(max=math.log(100)).exp()
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v


def positions(version, module):
    """The bias of relative positions, [H, N, N]."""
    area = module.window_size[0] * module.window_size[1]
    index = module.relative_position_index.view(-1)
    if version == 1:
        return module.relative_position_bias_table[index].view(area, area, -1).permute(2, 0, 1)
    table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
    return 16 * table[index].view(area, area, -1).permute(2, 0, 1).sigmoid()


def regions(height, width, window, shift):
    """A number for each place of the rolled map; windows mask attention between numbers."""
    found = torch.zeros(height, width)
    count = 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            found[rows, columns] = count
            count += 1
    return found


def attend_literally(version, block, x, prompts):
    """x [H, W, C], what the block's attention reads, and prompts [m, C], as it reads them.

    Returns:
        The attention's output [H, W, C], and the outputs of the prompts in each window [W, m, C].
    """
    module, window, shift = block.attn, block.window_size, block.shift_size
    height, width, dim = x.shape
    shifted = any(shift)
    if shifted:
        x = x.roll((-shift[0], -shift[1]), (0, 1))
    padded = [-(-n // w) * w for n, w in zip((height, width), window, strict=True)]
    whole = x.new_zeros(*padded, dim)
    whole[:height, :width] = x
    region = regions(*padded, window, shift) if shifted else torch.zeros(*padded)
    out, m, of_prompts = torch.zeros_like(whole), len(prompts), []
    for top in range(0, padded[0], window[0]):
        for left in range(0, padded[1], window[1]):
            place = (slice(top, top + window[0]), slice(left, left + window[1]))
            tokens = torch.cat([prompts, whole[place].reshape(-1, dim)])
            q, k, v = heads(version, module, tokens)
            number = region[place].reshape(-1)
            mask = torch.where(number[:, None] != number, -100.0, 0.0).to(x.dtype)
            logits = q @ k.transpose(1, 2)
            logits[:, m:, m:] += positions(version, module) + mask
            found = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
            found = found @ module.proj.weight.T + module.proj.bias
            of_prompts.append(found[:m])
            out[place] = found[m:].view(*window, dim)
    out = out[:height, :width]
    if shifted:
        out = out.roll(tuple(shift), (0, 1))
    return out, torch.stack(of_prompts)


def literally(version, backbone, x, prompts, heads_of):
    """The logits of the backbone with prompts [m, C] of each block for each image."""
    logits = []
    for b, image in enumerate(x):
        t = backbone.patch_embed(image[None])
        i = 0
        for stage in backbone.layers:
            t = stage.downsample(t)
            for block in stage.blocks:
                own = prompts[i] if prompts[i].dim() == 2 else prompts[i][b]
                t, i = block_literally(version, block, t, own), i + 1
        logits.append(F.linear(backbone.norm(t).mean((1, 2)), heads_of.weight, heads_of.bias))
    return torch.cat(logits)


def block_literally(version, block, t, prompts):
    if version == 1:
        read = [block.norm1(t[0]), block.norm1(prompts)]
        t = t + attend_literally(version, block, *read)[0]
        return t + block.mlp(block.norm2(t))
    t = t + block.norm1(attend_literally(version, block, t[0], prompts)[0])
    return t + block.norm2(block.mlp(t))


def shallow_literally(version, backbone, x, prompts, heads_of, merges=False):
    """As `literally`, with prompts of the first block that travel, each image's own."""
    logits = []
    for b, image in enumerate(x):
        t, own = backbone.patch_embed(image[None]), prompts if prompts.dim() == 2 else prompts[b]
        for number, stage in enumerate(backbone.layers):
            t = stage.downsample(t)
            if number and own is not None:  # a 2 x 2 map of copies of one prompt
                alone = [stage.downsample(p.expand(1, 2, 2, -1))[0, 0, 0] for p in own]
                own = torch.stack(alone) if merges else None
            for block in stage.blocks:
                t, own = both_literally(version, block, t, own)
        logits.append(F.linear(backbone.norm(t).mean((1, 2)), heads_of.weight, heads_of.bias))
    return torch.cat(logits)


def both_literally(version, block, t, own):
    beside = t.new_zeros(0, t.shape[-1]) if own is None else own
    if version == 1:
        out, each = attend_literally(version, block, block.norm1(t[0]), block.norm1(beside))
        t = t + out
        t = t + block.mlp(block.norm2(t))
        if own is not None:
            own = own + each.mean(0)
            own = own + block.mlp(block.norm2(own))
        return t, own
    out, each = attend_literally(version, block, t[0], beside)
    t = t + block.norm1(out)
    t = t + block.norm2(block.mlp(t))
    if own is not None:
        own = own + block.norm1(each.mean(0))
        own = own + block.norm2(block.mlp(own))
    return t, own


def prompted(backbone, m=3, **more):
    torch.manual_seed(0)
    model = pcx.VPT(backbone, m, **more)
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.normal_()
    return model


def close(found, expected, bound=2e-14):
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


def differentiate(run, x, prompts):
    x = x.clone().requires_grad_()
    prompts = [p.detach().clone().requires_grad_() for p in prompts]
    out = run(x, prompts)
    grads = torch.autograd.grad(out.square().sum(), [x, *prompts])
    return [out.detach(), *grads]


def swapped_in(model, x, prompts):
    return functional_call(model, {f"prompts.{i}": p for i, p in enumerate(prompts)}, (x,))


@pytest.mark.parametrize("of_samples", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_deep_prompts_are_in_every_window(case, version, backend, of_samples, monkeypatch):
    case = CASES[case]
    monkeypatch.setattr(vpt_block, "prefix_attention", partial(prefix_attention, backend=backend))
    backbone, x = built(version, case), images(case)
    model = prompted(backbone)
    if stale_masks(backbone, x):
        with pytest.raises(ValueError, match=r"^x: .*shift mask for \d+ windows"):
            model(x)
        return
    prompts = list(model.prompts)
    if of_samples:
        prompts = [torch.stack([p, p.flip(0), 2 * p]) for p in prompts]
    found = differentiate(partial(swapped_in, model), x, prompts)
    oracle = partial(literally, version, backbone, heads_of=model.heads[0])
    expected = differentiate(oracle, x, prompts)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        close(a, b, {1: 2e-14, 2: 1e-12}[version])


@pytest.mark.parametrize("version", [1, 2])
def test_every_image_is_by_itself_and_sets_belong_to_images(version):
    backbone, x = swin(version), images({}, batch=4)
    model = prompted(backbone)
    whole = model(x)
    for i in range(4):
        close(model(x[i : i + 1]), whole[i : i + 1], 1e-14)
    two = [torch.stack([p, -p]) for p in model.prompts]  # a set for each half of the batch
    found = swapped_in(model, x, two)
    close(found[:2], whole[:2], 1e-14)
    assert (found[2:] - whole[2:]).norm() > 1e-3 * whole.norm()
    close(found[2:], swapped_in(model, x[2:], [t[1] for t in two]), 1e-14)


@pytest.mark.parametrize("version", [1, 2])
def test_windows_of_another_number_than_the_masks_are_an_error(version):
    model = prompted(swin(version, size=64))
    block = model.backbone.layers[0].blocks[1].block
    with pytest.raises(ValueError, match=r"a shift mask for 16 windows an image; build"):
        block.attn(torch.randn(17, 16, 24).double(), mask=block.attn_mask)


@pytest.mark.parametrize("version", [1, 2])
def test_the_fused_classes_are_timms(version):
    for case in CASES.values():
        try:
            backbone, x = swin(version, **case), images(case, 2)
        except RuntimeError:  # old versions of timm cannot build all
            continue
        if stale_masks(backbone, x):
            continue
        fused = swin(version, **case)
        attention.fuse(fused)
        assert type(fused.layers[0].blocks[0].attn).__module__ == "pcx.backbones.fused_forms"
        assert fused.state_dict().keys() == backbone.state_dict().keys()
        close(fused(x), backbone(x), 2e-15)
        assert type(backbone.layers[0].blocks[0].attn).__module__.startswith("timm.")


def loader_of(x, y):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)


@pytest.mark.parametrize("version", [1, 2])
def test_scores_are_of_each_samples_own_gradient(version):
    backbone, x = swin(version), images({}, batch=3)
    y = torch.tensor([0, 4, 2])
    model = prompted(backbone, [3, 0, 2, 1])
    prompts = [p.detach().requires_grad_() for p in model.prompts]
    expected = {"taylor": [], "taylor-inner": []}
    for image, label in zip(x, y, strict=True):
        logits = literally(version, backbone, image[None], prompts, model.heads[0])
        loss = F.cross_entropy(logits, label[None])
        used = [p for p in prompts if len(p)]
        parts = [g * p for g, p in zip(torch.autograd.grad(loss, used), used, strict=True)]
        expected["taylor"].append(torch.cat([p.norm(dim=-1) for p in parts]))
        expected["taylor-inner"].append(torch.cat([p.sum(-1).abs() for p in parts]))
    methods = ["taylor", "taylor-inner", "gate", "exact", "magnitude"]
    found = pcx.score(model, loader_of(x, y), method=methods, progress=False)
    for name, rows in expected.items():
        assert [len(s) for s in found[name]] == [3, 0, 2, 1]
        close(torch.cat(found[name]), torch.stack(rows).mean(0), 1e-10)
    # A gate's slope is what a small change of the prompts' logits does to the loss.
    slopes = by_differences(model, x, y)
    close(torch.cat(found["gate"]), slopes, 1e-5)
    without = removed(version, backbone, model, x, y)
    close(torch.cat(found["exact"]), without, 1e-10)
    with pytest.raises(ValueError, match="'cls-attention' needs a .CLS. token in every"):
        pcx.score(model, loader_of(x, y), method="cls-attention")


def by_differences(model, x, y, step=1e-6):
    """|dL / d logit| of each prompt, mean over samples: keys' logits moved through the lse."""
    found = []
    for layer, m in zip(model.layers, model.counts, strict=True):
        for i in range(m):
            losses = []
            for sign in (1, -1):
                with moved_logits(layer, i, sign * step):
                    losses.append(F.cross_entropy(model(x), y, reduction="none"))
            found.append(((losses[0] - losses[1]) / (2 * step)).abs().mean())
    return torch.stack(found)


class moved_logits:  # noqa: N801
    """Adds a number to one prompt's logits in all windows: by attending over concatenated keys."""

    def __init__(self, layer, prompt, by):
        self.layer, self.prompt, self.by = layer, prompt, by

    def __enter__(self):
        def attend(call, key, value, sets):
            k = torch.cat([key.expand(*call.k.shape[:-3], *key.shape), call.k], -2)
            v = torch.cat([value.expand(*call.v.shape[:-3], *value.shape), call.v], -2)
            bias = F.pad(call.bias, (key.shape[-2], 0))
            bias[..., self.prompt] += self.by
            return attention.Call(call.q, k, v, bias, call.scale).output()

        self.layer._attend = attend

    def __exit__(self, *error):
        del self.layer._attend


def removed(version, backbone, model, x, y):
    def losses(prompts):
        logits = literally(version, backbone, x, prompts, model.heads[0])
        return F.cross_entropy(logits, y, reduction="none")

    prompts = [p.detach() for p in model.prompts]
    whole, found = losses(prompts), []
    for layer, own in enumerate(prompts):
        for i in range(len(own)):
            fewer = list(prompts)
            fewer[layer] = torch.cat([own[:i], own[i + 1 :]])
            found.append((losses(fewer) - whole).abs().mean())
    return torch.stack(found)


@pytest.mark.parametrize("version", [1, 2])
def test_condensing_keeps_other_counts_in_each_stage_and_freezing_keeps_the_function(version):
    backbone, x = swin(version), images({}, batch=4)
    model = prompted(backbone, 6)
    loader = loader_of(x, torch.tensor([0, 1, 2, 3]))
    small = pcx.condense(model, loader, keep=0.4, epochs=0, progress=False)
    assert sum(small.counts) == 10  # of 24
    assert len(set(small.counts)) > 1
    expected = literally(version, backbone, x, list(small.prompts), small.heads[0])
    close(small(x), expected, {1: 2e-14, 2: 1e-12}[version])
    frozen = pcx.freeze(small)
    with torch.no_grad():
        close(frozen(x), expected, {1: 2e-14, 2: 1e-12}[version])


@pytest.mark.parametrize("of_samples", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("merging", ["drop", "merge"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", ["divisible", "padded", "window-3-5", "called-at-80-36"])
def test_shallow_prompts_travel_beside_each_image(case, version, merging, of_samples):
    case = CASES[case]
    backbone, x = built(version, case), images(case)
    model = prompted(backbone, kind="shallow", merging=merging)
    assert model.counts == (3, 0, 0, 0)
    prompts = [model.prompts[0]]
    if of_samples:
        prompts = [torch.stack([p, p.flip(0), 2 * p]) for p in prompts]
    found = differentiate(partial(swapped_in, model), x, prompts)

    def oracle(x, prompts):
        return shallow_literally(
            version, backbone, x, prompts[0], model.heads[0], merging == "merge"
        )

    expected = differentiate(oracle, x, prompts)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        close(a, b, {1: 5e-14, 2: 1e-12}[version])
    whole = model(x)
    for i in range(3):
        close(model(x[i : i + 1]), whole[i : i + 1], 1e-14)
    with torch.no_grad():
        close(pcx.freeze(model)(x), whole, 1e-14)


@pytest.mark.parametrize("merging", ["drop", "merge"])
def test_shallow_prompts_are_scored_and_condensed(merging):
    backbone, x = swin(1), images({}, batch=3)
    y = torch.tensor([0, 4, 2])
    model = prompted(backbone, kind="shallow", merging=merging)
    own = model.prompts[0].detach().requires_grad_()
    rows = []
    for image, label in zip(x, y, strict=True):
        logits = shallow_literally(
            1, backbone, image[None], own, model.heads[0], merging == "merge"
        )
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, label[None]), own)
        rows.append((grad * own).norm(dim=-1))
    found = pcx.score(model, loader_of(x, y), method=["taylor", "gate"], progress=False)
    close(found["taylor"][0], torch.stack(rows).mean(0), 1e-10)
    assert (found["gate"][0] > 0).all()
    small = pcx.condense(model, loader_of(x, y), keep=0.4, epochs=0, progress=False)
    assert small.counts == (1, 0, 0, 0)
    assert small.variant.merging == merging


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "concat"}, "path: 'concat' needs one sequence of tokens of one width, and Swin"),
        ({"share": "inter"}, "share: 'inter' needs one sequence"),
        ({"project": 8}, "project: 8 needs one sequence"),
        ({"num_prompts": 0, "location": "add"}, "location: 'add' needs one sequence"),
        ({"pool": "image"}, "pool: 'image' needs one sequence"),
        ({"merging": "merge"}, "merging: 'merge' is for kind='shallow' over a backbone that"),
        ({"merging": "split"}, "merging: got 'split', expected one of"),
    ],
)
def test_what_has_no_meaning_in_stages_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pcx.VPT(swin(1), **{"num_prompts": 3, **arguments})


def test_shallow_prompts_of_other_models_with_stages_are_refused():
    model = timm.create_model("pit_ti_224", num_classes=3)
    with pytest.raises(ValueError, match="^kind: 'shallow' needs .* or timm's Swin"):
        pcx.VPT(model, 3, kind="shallow")
