"""SCT against each library's own block with one line inserted, and its channels against a loop."""

import copy
import inspect
import re
import textwrap
import types

import pytest
import timm
import torch
from families import build, images, randomise
from torch import nn

import pcx
from pcx.models.salience import SELECTIONS, channel_importance

# The line behind which x + attention(x) is whole, in the source of each block.
SUMS = {
    "ParallelThingsBlock": r"x = x \+ torch\.stack\(.*attn.*",
    "ViTLayer": r"hidden_states = hidden_states \+ residual",
    "Dinov2Layer": r"hidden_states = self\.drop_path\(hidden_states\) \+ residual",
}
TIMM = r"x = x \+ self\.drop_path1\(.*"


def swin(version):
    def make():
        name = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}[version]
        model = timm.create_model(
            name,
            img_size=32,
            window_size=4,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=5,
            drop_path_rate=0.3,
        ).double()
        randomise(model)
        return model.eval()

    return make


def of_hugging_face(name, **more):
    def make():
        transformers = pytest.importorskip("transformers")
        size = {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 64,
            "patch_size": 16,
        }
        config = getattr(transformers, f"{name}Config")(**size, **more)
        model = getattr(transformers, f"{name}ForImageClassification")(config).double()
        randomise(model)
        return model.eval()

    return make


def of_timm(family):
    def make():
        return build(family, drop_path_rate=0.3)

    return make


FAMILIES = [
    "vit",
    "deit3",
    "dinov2-reg",
    "dinov3",
    "eva02",
    "beit",
    "clip",
    "siglip",
    "vit-relpos",
    "vit-post-norm",
    "vit-18x2",
]
MAKE = {
    **{family: of_timm(family) for family in FAMILIES},
    "swin": swin(1),
    "swinv2": swin(2),
    "hf-vit": of_hugging_face("ViT"),
    "hf-dinov2": of_hugging_face("Dinov2", drop_path_rate=0.3),
}


def inputs_of(name):
    if name in FAMILIES:
        return images(name, 3)
    size = 32 if name.startswith("swin") else 64
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def channels_of(model_or_spec, k=5):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randperm(block.dim, generator=generator)[:k].tolist()
        for block in model_or_spec.blocks
    ]


def sct_of(backbone, **more):
    spec = pcx.Linear(backbone).spec
    torch.manual_seed(0)
    model = pcx.SCT(backbone, channels_of(spec), **more)
    with torch.no_grad():
        for salient in model.salient["attn"]:
            salient.weight.normal_(0, 0.3)
            salient.bias.normal_(0, 0.3)
    return model


class Inserted(nn.Module):
    """The line that is inserted: u = x_I, x_I <- u + scale * (W u + b), in a new tensor."""

    def __init__(self, salient):
        super().__init__()
        self.index, self.scale = salient.index, salient.scale
        self.weight = nn.Parameter(salient.weight.detach().clone())
        self.bias = nn.Parameter(salient.bias.detach().clone())

    def forward(self, x):
        u = x[..., self.index]
        out = x.clone()
        out[..., self.index] = u + self.scale * (u @ self.weight.T + self.bias)
        return out


def literal(model, backbone):
    """The library's own model, whose blocks' source has one line more."""
    plain = copy.deepcopy(backbone)
    head = dict(zip(model.spec.heads, model.heads, strict=True))
    for name, module in head.items():
        plain.set_submodule(name, copy.deepcopy(module))
    plain.requires_grad_(False)
    for spec, salient in zip(model.spec.blocks, model.salient["attn"], strict=True):
        block = plain.get_submodule(spec.name)
        block.inserted = Inserted(salient)
        forward = type(block).forward
        source = textwrap.dedent(inspect.getsource(forward))
        line = rf"^( +)({SUMS.get(type(block).__name__, TIMM)})$"
        name = "hidden_states" if type(block).__name__ in ("ViTLayer", "Dinov2Layer") else "x"
        again = rf"\1\2\n\1{name} = self.inserted({name})"
        hugging_face = name == "hidden_states"
        source, count = re.subn(line, again, source, count=int(hugging_face), flags=re.MULTILINE)
        assert count
        names = dict(vars(inspect.getmodule(forward)))
        exec(source, names)
        block.forward = types.MethodType(names["forward"], block)
    return plain


def run(model, x, parameters, seed=0):
    for p in parameters:
        p.grad = None
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    out = getattr(out, "logits", out)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_it_is_the_librarys_own_block_with_one_line_inserted(name, training):
    backbone = MAKE[name]()
    model = sct_of(backbone, scale=0.7)
    oracle = literal(model, backbone)
    model.train(training)
    for module in oracle.modules():  # what SCT's training turns on
        if type(module).__name__.endswith("DropPath"):
            module.training = training
    maps = [m for m in oracle.modules() if isinstance(m, Inserted)]
    own = [p for s in model.salient["attn"] for p in (s.weight, s.bias)]
    theirs = [p for s in maps for p in (s.weight, s.bias)]
    x = inputs_of(name)
    found, expected = run(model, x, own), run(oracle, x, theirs)
    assert len(found) == len(expected) == 2 + 2 * len(model.spec.blocks)
    for a, b in zip(found, expected, strict=True):  # a few roundings of float64, no more
        torch.testing.assert_close(a, b, rtol=0, atol=5e-15 * float(b.abs().max()))
    plain = copy.deepcopy(backbone)
    plain_logits = getattr(plain(x), "logits", plain(x))
    assert (plain_logits - found[0]).norm() > 1e-3 * plain_logits.norm()
    if training and "hf-vit" not in name:
        other = run(model, x, own, seed=1)
        assert not torch.equal(other[0], found[0])  # drop path draws anew


@pytest.mark.parametrize("name", ["vit", "swin", "hf-dinov2", "eva02"])
@pytest.mark.parametrize("position", ["mlp", "both"])
def test_position_mlp_changes_what_the_mlp_gives(name, position):
    backbone = MAKE[name]()
    spec = pcx.Linear(backbone).spec
    channels = channels_of(spec)
    places = {"attn": channels, "mlp": channels} if position == "both" else channels
    model = pcx.SCT(backbone, places, position=position).eval()
    with torch.no_grad():
        for salient in (m for maps in model.salient.values() for m in maps):
            salient.weight.normal_(0, 0.3)
            salient.bias.normal_(0, 0.3)
    plain = copy.deepcopy(model.backbone)
    x, seen = inputs_of(name), []
    for block, salient in zip(spec.blocks, model.salient["mlp"], strict=True):
        plain.set_submodule(block.mlp, plain.get_submodule(block.mlp).inner)
        literally = Inserted(salient)

        def change(module, args, out, literally=literally):
            seen.append(out)
            return literally(out)

        plain.get_submodule(block.mlp).register_forward_hook(change)
    out = plain(x)
    torch.testing.assert_close(model(x), getattr(out, "logits", out), rtol=1e-10, atol=1e-12)
    assert len(seen) == len(spec.blocks)
    frozen = pcx.freeze(model)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-11)
    folded = [m for m in frozen.modules() if type(m).__name__ == "OnOutput"]
    assert not folded  # the map is in the MLP's last linear layer: free
    if name == "vit" and position == "both":  # sum, map and norm are one call
        assert all("read_sum" in block._source for block in frozen.backbone.blocks)


def dataset(classes=(0, 1, 1, 2, 2, 2, 0)):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(classes), 3, 64, 64, generator=generator).double()
    return x, torch.tensor(classes)


def by_loop(backbone, spec, x, y, position, layers):
    """Eq. 1 and 2 literally: a vector of all activations of a class, its norm, the mean."""
    found = []
    for layer in layers:
        block, seen = spec.blocks[layer], []
        name = block.reader if position == "attn" else block.name
        module = backbone.get_submodule(name)
        if position == "attn":
            hook = module.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
        else:
            hook = module.register_forward_hook(lambda _, args, out, s=seen: s.append(out))
        with torch.no_grad():
            backbone(x)
        hook.remove()
        tokens = seen[0].flatten(1, -2)
        if block.layout == "BNC":
            tokens = tokens[:, spec.prefix_tokens :]
        norms = []
        for label in y.unique():
            of_class = tokens[y == label].flatten(0, 1)  # [n * N, D]
            norms.append([of_class[:, d].norm() for d in range(tokens.shape[-1])])
        found.append(torch.tensor(norms).mean(0))
    return found


@pytest.mark.parametrize("name", ["vit", "dinov2-reg", "swin"])
@pytest.mark.parametrize("position", ["attn", "mlp"])
def test_importance_equals_a_literal_loop_over_classes(name, position):
    backbone = MAKE[name]()
    spec = pcx.Linear(backbone).spec
    size = inputs_of(name).shape[-1]
    x, y = dataset()
    x = x[..., :size, :size]
    layers = range(len(spec.blocks))
    expected = by_loop(backbone, spec, x, y, position, layers)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    for batches in (1, 3, 7):
        for places in (torch.arange(len(x)), order):
            loader = list(zip(x[places].chunk(batches), y[places].chunk(batches), strict=True))
            found = channel_importance(backbone, spec, loader, position, layers)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b.double(), rtol=1e-12, atol=1e-12)


def test_selections():
    backbone = MAKE["vit"]()
    x, y = dataset()
    loader = [(x, y)]
    models = {s: pcx.SCT(backbone, loader, k=6, selection=s) for s in SELECTIONS}
    spec = models["salient"].spec
    layers = range(len(spec.blocks))
    salient = channel_importance(backbone, spec, loader, "attn", layers)
    for layer, importance in enumerate(salient):
        highest = set(importance.topk(6).indices.tolist())
        lowest = set(importance.topk(6, largest=False).indices.tolist())
        index = {s: set(m.salient["attn"][layer].index.tolist()) for s, m in models.items()}
        assert index["salient"] == highest
        assert index["least"] == lowest
        assert index["random"] not in (highest, lowest)
    assert models["random"].salient["attn"][0].index.tolist() == (
        pcx.SCT(backbone, None, k=6, selection="random").salient["attn"][0].index.tolist()
    )
    other = pcx.SCT(backbone, None, k=6, selection="random", seed=1)
    assert other.salient["attn"][0].index.tolist() != (
        models["random"].salient["attn"][0].index.tolist()
    )
    # Of one image per class, and of one class, the norms are those of single images.
    whole = channel_importance(backbone, spec, loader, "attn", [0], selection="class-agnostic")
    one = channel_importance(backbone, spec, [(x, torch.zeros(len(x)).long())], "attn", [0])
    torch.testing.assert_close(whole, one)
    balanced = channel_importance(backbone, spec, loader, "attn", [0], selection="balanced")
    twice = (torch.cat([x, x[y == 0]]), torch.cat([y, y[y == 0]]))  # the first class twice
    again = channel_importance(backbone, spec, [twice], "attn", [0], selection="balanced")
    torch.testing.assert_close(balanced, again)
    published = channel_importance(backbone, spec, [twice], "attn", [0])
    assert (published[0] - salient[0]).abs().max() > 1e-3


def test_both_positions_are_found_in_one_pass():
    backbone, (x, y) = MAKE["vit"](), dataset()
    reads = []

    def batches():
        reads.append(1)
        yield x[:3], y[:3]
        yield x[3:], y[3:]

    both = pcx.SCT(backbone, batches(), k=6, position="both")
    assert len(reads) == 1
    for position in ("attn", "mlp"):
        alone = pcx.SCT(backbone, [(x, y)], k=6, position=position)
        for a, b in zip(both.salient[position], alone.salient[position], strict=True):
            assert torch.equal(a.index, b.index)


@pytest.mark.parametrize("name", ["swinv2", "vit-post-norm", "vit"])
def test_a_frozen_model_holds_all_of_its_maps(name):
    backbone = MAKE[name]()
    channels = channels_of(pcx.Linear(backbone).spec)
    model = pcx.SCT(backbone, {"attn": channels, "mlp": channels}, position="both").eval()
    with torch.no_grad():
        for parameter in model.salient.parameters():
            parameter.normal_(0, 0.3)
    x = inputs_of(name)
    expected, frozen = model(x), pcx.freeze(model)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-9, atol=1e-10)
    narrow = copy.deepcopy(frozen).float()
    torch.testing.assert_close(narrow(x.float()), expected.float(), rtol=1e-2, atol=1e-3)
    moved = copy.deepcopy(frozen).to("meta")
    maps = [m for m in moved.modules() if type(m).__name__ == "Salient"]
    assert maps
    assert all(t.is_meta for m in maps for t in (m.weight, m.bias, m.index))
    reached = [m._change[0] for m in moved.modules() if hasattr(m, "_change")]
    assert all(m.weight.is_meta for m in reached)


def test_labels_may_be_text():
    backbone = MAKE["vit"]()
    x, y = dataset()
    spec = pcx.Linear(backbone).spec
    named = [(x, [f"class {label}" for label in y.tolist()])]
    a = channel_importance(backbone, spec, named, "attn", [0, 2])
    b = channel_importance(backbone, spec, [(x, y)], "attn", [0, 2])
    torch.testing.assert_close(a, b)


def test_parameters_of_the_paper():
    def tuned(name, k):
        backbone = timm.create_model(name, num_classes=0)
        layers = [*range(4 + 9, 4 + 18), 22, 23] if name.startswith("swin") else None
        model = pcx.SCT(backbone, None, k=k, selection="random", layers=layers)
        return sum(p.numel() for p in model.trainable().values())

    vit = "vit_base_patch16_224"
    assert [tuned(vit, k) for k in (32, 96, 192)] == [12_672, 111_744, 444_672]
    assert tuned(vit, [192] * 4 + [96] * 8) == 222_720
    assert tuned(vit, [96] * 4 + [32] * 8) == 45_696
    assert tuned("swin_base_patch4_window7_224", 96) == 102_432  # stage 3 from block 9 on, stage 4


@pytest.mark.parametrize("name", ["vit", "swin", "hf-dinov2", "dinov3"])
def test_compiled_exported_checkpointed_and_in_16_bits(name):
    backbone = MAKE[name]()
    model = sct_of(backbone).eval()
    x = inputs_of(name)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.salient.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, b in zip(grads, model.salient.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    if hasattr(model.backbone, "set_grad_checkpointing"):
        model.backbone.set_grad_checkpointing()
        model.zero_grad()
        model(x).square().sum().backward()
        for a, b in zip(grads, model.salient.parameters(), strict=True):
            torch.testing.assert_close(a, b.grad)
        model.backbone.set_grad_checkpointing(False)
    narrow = sct_of(copy.deepcopy(backbone).bfloat16()).eval()
    assert next(narrow.salient.parameters()).dtype == torch.float32
    logits = narrow(x.bfloat16())
    assert (logits.double() - narrow.double()(x)).norm() < 0.1 * logits.double().norm()


def test_a_norm_that_is_trained_is_not_fused():
    backbone = MAKE["vit"]()
    model = sct_of(backbone)
    frozen = model.eval()(inputs_of("vit"))
    model.own("blocks.0.norm2")
    found = model.eval()(inputs_of("vit"))
    torch.testing.assert_close(found, frozen)
    found.square().sum().backward()
    norms = {n: p.grad for n, p in model.trainable().items() if "norm2" in n}
    assert len(norms) == 2
    assert all(gradient.norm() > 1e-3 for gradient in norms.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 49}, "k: 49 channels of layer 0, which has 48"),
        ({"k": 0}, "k: 0, expected a whole number"),
        ({"k": [4, 4]}, "k: 2 numbers for 3 layers"),
        ({"k": "4"}, "k: '4', expected"),
        ({"layers": [3]}, "layers: 3, expected a whole number, -3 to 2"),
        ({"layers": []}, "layers: .*at least one index"),
        ({"layers": [0, -3]}, "none twice"),
        ({"layers": "012"}, "layers: '012', expected a list"),
        ({"position": "norm"}, "position: got 'norm'"),
        ({"selection": "best"}, "selection: got 'best'"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"channels": None, "k": 4}, "channels: None, and selection 'salient' needs images"),
        ({"channels": [], "k": 4}, "the loader yields no images"),
        ({"channels": 3, "k": 4}, "channels: a int, expected a DataLoader"),
        ({"channels": [[0, 1]]}, "channels: 1 lists for 3 layers"),
        ({"channels": [[0, 0], [1], [2]]}, "channels: layer 0: .*distinct"),
        ({"channels": [[0, 48], [1], [2]]}, "channels: layer 0: 48, expected"),
        ({"channels": [[0], [1], [2]], "k": 1}, "k: the channels are given; leave k out"),
        ({"channels": [[0], [1], [2]], "position": "both"}, "for position 'both' a dict"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    backbone = build("vit")
    given = {"channels": [dataset()], **arguments}
    with pytest.raises(ValueError, match=message):
        pcx.SCT(backbone, given.pop("channels"), **given)


def test_labels_that_are_no_classes_are_refused():
    x, _ = dataset()
    for labels in (torch.rand(len(x)), torch.ones(len(x), 2).long()):
        with pytest.raises(ValueError, match="channels: labels of shape"):
            pcx.SCT(build("vit"), [(x, labels)], k=4)
        pcx.SCT(build("vit"), [(x, labels)], k=4, selection="class-agnostic")


def test_blocks_that_run_attention_and_mlp_in_parallel_have_no_sum():
    with pytest.raises(ValueError, match=r"position: blocks\.0 .*'attn' has no place"):
        pcx.SCT(build("vit-xp"), None, k=4, selection="random")
