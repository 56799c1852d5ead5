"""Every variant of VPT against a literal form, and through training, saving and freezing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import build, images
from own_states import assert_same, weights
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.models.vpt.variants import Variant

CLASSES = 4
VARIANTS = {
    "depth-first": {"num_prompts": 3, "depth": 2},
    "depth-last": {"num_prompts": 3, "depth": slice(-2, None)},
    "intra": {"num_prompts": 3, "share": "intra"},
    "inter": {"num_prompts": 3, "share": "inter"},
    "all": {"num_prompts": 3, "share": "all"},
    "project": {"num_prompts": 3, "project": 5},
    "project-inter": {"num_prompts": 3, "project": 5, "share": "inter"},
    "shallow": {"num_prompts": 3, "kind": "shallow"},
    "shallow-intra": {"num_prompts": 3, "kind": "shallow", "share": "intra"},
    "shallow-project": {"num_prompts": 3, "kind": "shallow", "project": 5},
    "add": {"num_prompts": 0, "location": "add"},
    "add-shallow": {"num_prompts": 0, "location": "add", "kind": "shallow"},
    "add-one": {"num_prompts": 0, "location": "add-one"},
    "prepend-pixel": {"num_prompts": 3, "location": "prepend-pixel", "kind": "shallow"},
    "concat-channel": {"num_prompts": 0, "location": "concat-channel", "kind": "shallow"},
    "pool-image": {"num_prompts": 3, "pool": "image"},
    "pool-prompt": {"num_prompts": 3, "pool": "prompt"},
    "pool-global": {"num_prompts": 3, "pool": "global"},
    "pool-global-shallow": {"num_prompts": 3, "pool": "global", "kind": "shallow"},
    "fixed": {"num_prompts": 3, "freeze_prompts": True},
    "cls": {"num_prompts": 0, "learn_cls": True},
    "bias": {"num_prompts": 3, "bias": True},
    "everything": {
        "num_prompts": 3,
        "share": "inter",
        "project": 5,
        "pool": "global",
        "learn_cls": True,
        "bias": True,
        "dropout": 0.1,
    },
}


def variant(name, backbone=None):
    torch.manual_seed(0)
    return pcx.VPT(backbone or build("vit"), **VARIANTS[name], num_classes=CLASSES)


def tokens_of(backbone, x):
    return backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(x)))


def literal(model, backbone, x, *, per_layer=None, added=None, embedded=None, pool="cls"):
    """Concatenates, drops, adds and pools as the paper says it."""
    plain = copy.deepcopy(backbone).requires_grad_(False)
    own = {
        n.removeprefix("backbone."): t
        for n, t in model.own_state().items()
        if n.startswith("backbone.")
    }
    plain.load_state_dict(own, strict=False) if "head.weight" not in own else None
    tokens = tokens_of(plain, x) if embedded is None else embedded(plain, x)
    deep, count = model.kind == "deep", 0
    for i, block in enumerate(plain.blocks):
        if added is not None and i < len(added):
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + added[i]], 1)
        if per_layer is not None and (deep or i == 0):
            count = len(per_layer[i])
            prompts = per_layer[i].expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
        tokens = block(tokens)
        if deep and i < len(plain.blocks) - 1:
            tokens = torch.cat([tokens[:, :1], tokens[:, 1 + count :]], 1)
    tokens = plain.norm(tokens)
    rows = {
        "cls": tokens[:, :1],
        "image": tokens[:, 1 + count :],
        "prompt": tokens[:, 1 : 1 + count],
        "global": tokens[:, 1:],
    }[pool]
    return model.heads[0](rows.mean(1))


@pytest.fixture
def x():
    return images("vit", 3)


@pytest.mark.parametrize("path", ["folded", "concat"])
@pytest.mark.parametrize(
    "name",
    ["depth-first", "depth-last", "intra", "inter", "all", "project", "project-inter"]
    + ["shallow-intra", "shallow-project", "pool-image", "pool-prompt", "pool-global"]
    + ["pool-global-shallow"],
)
def test_prompts_among_tokens_equal_the_literal_form(name, path, x):
    backbone = build("vit")
    model = variant(name, backbone).eval()
    if path == "folded" and model.kind == "shallow":
        pytest.skip("kind='shallow' does not fold")
    model.path = path
    source = dict(model.prompts.named_parameters())
    depth = len(backbone.blocks)
    given = VARIANTS[name]
    if "share" not in given and "project" not in given:
        per_layer = [source[str(i)] for i in range(depth)]
    else:
        sources = [source[n] for n in source if n.startswith("sources.")]
        assert len(sources) == (1 if given.get("share") in ("inter", "all") else depth)
        per_layer = sources * depth if len(sources) == 1 else sources
        if "project" in given:
            linear = source["projection.weight"], source["projection.bias"]
            per_layer = [F.linear(each, *linear) if len(each) else each for each in per_layer]
        if given.get("share") in ("intra", "all"):
            assert {len(each) for each in sources} <= {0, 1}
            per_layer = [each.repeat(3, 1) for each in per_layer]
    expected = literal(model, backbone, x, per_layer=per_layer, pool=given.get("pool", "cls"))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    leaves = [p for p in model.prompts.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    bare = pcx.VPT(backbone, 0, num_classes=CLASSES).eval()
    bare.heads[0].load_state_dict(model.heads[0].state_dict())
    assert (bare(x) - found).norm() > 1e-4 * found.norm()


def test_layers_without_prompts_by_depth():
    assert variant("depth-first").counts == (3, 3, 0)
    assert variant("depth-last").counts == (0, 3, 3)
    assert pcx.VPT(build("vit"), 2, depth=-1).counts == (0, 0, 2)
    assert pcx.VPT(build("vit"), 2, depth=slice(1, 2)).counts == (0, 2, 0)
    assert pcx.VPT(build("vit"), [4, 5, 6], depth=2).counts == (4, 5, 0)


@pytest.mark.parametrize("name", ["add", "add-shallow", "add-one"])
def test_added_prompts_equal_the_literal_form(name, x):
    backbone = build("vit")
    model = variant(name, backbone).eval()
    layers = 1 if name == "add-shallow" else len(backbone.blocks)
    assert [tuple(p.shape) for p in model.added] == [(1 if name == "add-one" else 16, 48)] * layers
    expected = literal(model, backbone, x, added=list(model.added))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_pixels_equal_the_literal_form(x):
    backbone = build("vit")
    model = variant("prepend-pixel", backbone).eval()
    pixels = dict(model.prompts.named_parameters())["sources.0"]
    assert pixels.shape == (3, 3, 16, 16)
    prompts = backbone.patch_embed.proj(pixels).flatten(1)
    per_layer = [prompts, *[prompts[:0]] * 2]
    expected = literal(model, backbone, x, per_layer=per_layer)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)

    model = variant("concat-channel", backbone).eval()
    assert model.channel.pixels.shape == (1, 1, 64, 64)
    owned = model.own_state()
    rgb = owned["backbone.patch_embed.proj.weight"]
    assert rgb.requires_grad

    def embedded(plain, x):
        whole = torch.cat([x, model.channel.pixels.expand(len(x), -1, -1, -1)], 1)
        weight = torch.cat([rgb, model.channel.weight], 1)  # [D, 4, 16, 16]
        tokens = F.conv2d(whole, weight, plain.patch_embed.proj.bias, stride=16)
        return plain._pos_embed(tokens.flatten(2).transpose(1, 2))

    expected = literal(model, backbone, x, embedded=embedded)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_prototypes_are_means_and_centres():
    backbone = build("vit")
    x, y = images("vit", 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    model = pcx.VPT(backbone, 4, init="cls-prototype", images=loader, num_classes=4)
    tokens = tokens_of(backbone, x)
    for prompts, block in zip(model.prompts, backbone.blocks, strict=True):
        wanted = torch.stack([tokens[y == c, 0].mean(0) for c in range(4)])
        torch.testing.assert_close(prompts.detach(), wanted)
        tokens = block(tokens)
    model = pcx.VPT(backbone, 3, init="patch-prototype", images=loader)
    tokens = tokens_of(backbone, x)[:, 1:].flatten(0, 1)
    nearest = torch.cdist(tokens, model.prompts[0].detach()).argmin(1)
    centres = torch.stack([tokens[nearest == c].mean(0) for c in range(3)])
    torch.testing.assert_close(centres, model.prompts[0].detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="num_prompts: 5, and init='cls-prototype' gives one"):
        pcx.VPT(backbone, 5, init="cls-prototype", images=loader)
    with pytest.raises(ValueError, match=r"init: 'cls-prototype', and .* has no \[CLS\]"):
        pcx.VPT(build("siglip"), 4, init="cls-prototype", images=loader)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_trained_saved_copied_resumed_and_frozen(name, tmp_path):
    backbone = build("vit", num_classes=CLASSES)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    data = images("vit", 8)
    labels = torch.arange(8) % CLASSES
    data = data + labels[:, None, None, None]
    loader = DataLoader(TensorDataset(data, labels), 4)
    settings = {"epochs": 6, "lr": 0.02, "clip_grad": 1.0, "progress": False}
    model = variant(name, backbone)
    start = weights(model)
    rows = pcx.fit(model, loader, **settings)
    assert rows[-1]["loss"] < rows[0]["loss"]
    moved = {n for n, t in model.own_state().items() if not torch.equal(t, start[n])}
    assert moved == {n for n, p in model.own_state().items() if p.requires_grad and p.numel()}
    if name == "fixed":
        assert not any(n.startswith("prompts") for n in moved)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} of the user's backbone was written"
    expected = model.eval()(data)
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", build("vit"))
    assert loaded.variant == model.variant
    assert {n for n in loaded.trainable()} == {n for n in model.trainable()}
    for other in (loaded, model.copy(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(data), expected)
    frozen = pcx.freeze(model)
    torch.testing.assert_close(frozen(data), expected, rtol=1e-9, atol=1e-10)
    moved_to = copy.deepcopy(frozen).to(torch.float32)
    torch.testing.assert_close(moved_to(data.float()), expected.float(), rtol=1e-2, atol=1e-3)
    assert pcx.multiply_adds(model) > 0
    # An interrupted training ends with the same bits.
    halves = variant(name, backbone)
    half = {**settings, "checkpoint_dir": tmp_path / "run"}

    class Stop(pcx.training.callbacks.Callback):
        def on_epoch(self, history):
            return len(history) == 3

    pcx.fit(halves, loader, **half, callbacks=Stop())
    again = variant(name, backbone)
    pcx.fit(again, loader, **half, resume=True)
    assert_same(weights(again), weights(model))


@pytest.mark.parametrize("name", ["inter", "project-inter", "intra", "project", "all"])
def test_condensing_keeps_the_tie(name, tmp_path):
    backbone = build("vit", num_classes=CLASSES)
    data, labels = images("vit", 8), torch.arange(8) % CLASSES
    loader = DataLoader(TensorDataset(data, labels), 4)
    model = variant(name, backbone)
    pcx.fit(model, loader, epochs=1, lr=0.02, progress=False)
    scores = pcx.score(model, loader, progress=False)
    assert [len(row) for row in scores] == [3, 3, 3]
    small = pcx.condense(model, loader, keep=0.67, scope="local", epochs=1, progress=False)
    assert small.counts == (2, 2, 2)
    if model.prompts.tied:
        kept = [index.tolist() for index in small.condensation.kept]
        assert kept[0] == kept[1] == kept[2]
        assert len(small.prompts.sources) == 1
        with pytest.raises(ValueError, match="the layers share their prompts"):
            model.keep([[0, 1], [0, 2], [0, 1]])
    x = images("vit", 3)
    expected = small.eval()(x)
    pcx.save(small, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), expected)


def test_an_ensemble_of_variants():
    backbone = build("vit")
    x = images("vit", 2)
    members = [variant(name, backbone).eval() for name in ("inter", "project", "depth-first")]
    found = pcx.ensemble(members)(x)
    for row, member in zip(found, members, strict=True):
        torch.testing.assert_close(row, member(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"location": "append"}, "location: got 'append'"),
        ({"share": "inner"}, "share: got 'inner'"),
        ({"pool": "max"}, "pool: got 'max'"),
        ({"init": "zeros"}, "init: got 'zeros'"),
        ({"project": 0}, "project: 0, expected a whole number"),
        ({"learn_cls": 1}, "learn_cls: 1, expected True or False"),
        ({"depth": 7}, "depth: 7, expected a whole number, -3 to 3"),
        ({"depth": slice(3, None)}, "depth: .* leaves none with prompts"),
        ({"depth": 1, "kind": "shallow"}, "depth: 1, and kind='shallow'"),
        ({"share": "inter", "kind": "shallow"}, "share: 'inter' has no meaning here"),
        ({"share": "intra", "kind": "prefix"}, "share: 'intra' has no meaning here"),
        ({"project": 4, "kind": "prefix"}, "project: 4 has no meaning here"),
        ({"location": "add", "kind": "prefix"}, "location: 'add' has no meaning here"),
        ({"location": "add", "share": "inter"}, "share: 'inter' has no meaning here"),
        ({"location": "add", "pool": "prompt"}, "pool: 'prompt' has no meaning here"),
        ({"location": "add"}, "num_prompts: 2, and location='add' .* give 0"),
        ({"location": "prepend-pixel"}, "location: 'prepend-pixel' has no meaning here"),
        ({"share": "inter", "num_prompts": [2, 3, 2]}, "num_prompts: .* give one number"),
        ({"init": "cls-prototype"}, "images: none, and init='cls-prototype'"),
        ({"images": []}, "images: a loader, and init='published'"),
        (
            {"init": "patch-prototype", "images": [], "share": "inter"},
            "init: 'patch-prototype' has no meaning here",
        ),
    ],
)
def test_bad_combinations_are_named(arguments, message):
    given = {"num_prompts": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        pcx.VPT(build("vit"), **given)


def test_a_pooling_that_the_backbone_cannot_do_is_refused():
    for family in ("siglip", "vit-avg"):
        with pytest.raises(ValueError, match="pool: 'image' needs a head that reads"):
            pcx.VPT(build(family), 2, pool="image")
    with pytest.raises(ValueError, match=r"learn_cls: .* has no \[CLS\] token"):
        pcx.VPT(build("siglip"), 2, learn_cls=True)


def test_what_is_kept_of_a_variant_stays_that_variant(tmp_path):
    for share in (None, "inter"):
        fixed = pcx.VPT(build("vit"), 4, freeze_prompts=True, share=share)
        kept = fixed.keep([[0, 2]] * 3)
        assert not [n for n in kept.trainable() if n.startswith("prompts")]
    intra = pcx.VPT(build("vit"), 4, share="intra").eval()
    small = intra.keep([[0, 1], [0], []])
    pcx.save(small, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", build("vit"))
    assert loaded.counts == (2, 1, 0)
    x = images("vit", 2)
    assert torch.equal(loaded(x), small.eval()(x))
    assert "prompts.sources.2" not in small.trainable()
    pixels = variant("prepend-pixel")
    assert [n for n in pixels.trainable() if n.startswith("prompts")] == ["prompts.sources.0"]


def test_a_pool_of_prompts_needs_prompts_to_read():
    for arguments in ({"num_prompts": 0}, {"num_prompts": 3, "depth": 2}):
        with pytest.raises(ValueError, match="pool: 'prompt' reads the last layer's prompts"):
            pcx.VPT(build("vit"), **arguments, pool="prompt")
    with pytest.raises(ValueError, match="pool: 'prompt' reads the last layer's prompts"):
        pcx.VPT(build("vit"), 2, pool="prompt").keep([[0], [0], []])
    with pytest.raises(ValueError, match="norm: True, and pool='image' leaves no map"):
        pcx.VPT(build("vit"), 2, pool="image").features(images("vit", 1), norm=True)


def test_the_defaults_are_the_papers_own():
    assert pcx.VPT(build("vit"), 2).variant == Variant()
    assert Variant().as_json() == {}
