"""SETR: a backbone whose head is a decoder of pixels, with every method on it."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, build, images, randomise
from torch import nn

import pcx
from pcx.backbones.outputs import feature_maps
from pcx.token_pruning import ats, tome, zero_tprune

CLASSES = 5
METHODS = {
    "vpt": lambda b: pcx.VPT(b, 3),
    "vpt, shallow": lambda b: pcx.VPT(b, 3, kind="shallow"),
    "vpt, prefix": lambda b: pcx.VPT(b, 3, kind="prefix"),
    "linear": pcx.Linear,
    "full": pcx.Full,
    "bias": pcx.Bias,
    "partial": pcx.Partial,
    "adapter": pcx.Adapter,
    "sct": lambda b: pcx.SCT(b, loader(), k=8, selection="class-agnostic"),
    "border": lambda b: pcx.Border(b, inside=True),
}


def setr(family="vit", **arguments):
    found = pcx.SETR(build(family), CLASSES, channels=8, **arguments)
    randomise(found.decoder)
    for module in found.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return found


def loader(family="vit", batches=2):
    x = images(family)
    return [(x, torch.randint(CLASSES, (len(x), *x.shape[-2:])))] * batches


def decoded_by_hand(decoder, x):
    """The paper's decoder, step by step: norm, then conv, BatchNorm, ReLU and twice the size."""
    x = F.layer_norm(
        x.movedim(1, -1), x.shape[1:2], decoder.norm.weight, decoder.norm.bias, 1e-6
    ).movedim(-1, 1)
    for conv, norm, _ in decoder.stages:
        x = F.conv2d(x, conv.weight, padding=1 if decoder.kind == "pup" else 0)
        x = (x - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        x = F.relu(norm.weight[:, None, None] * x + norm.bias[:, None, None])
        if decoder.kind == "pup":
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias)


@pytest.mark.parametrize("kind", ["pup", "naive"])
def test_vpt_is_the_literal_form(kind):
    """Prompts are concatenated in every block of timm's model and dropped behind it."""
    backbone, x = setr(decoder=kind), images("vit")
    model = pcx.VPT(backbone, 3, head_init="keep").eval()
    vit = backbone.tower
    tokens = vit._pos_embed(vit.patch_embed(x))
    for block, prompts in zip(vit.blocks, model.prompts, strict=True):
        among = torch.cat([tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        tokens = block(among)[:, [0, *range(1 + len(prompts), among.shape[1])]]
    maps = vit.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = decoded_by_hand(backbone.decoder, maps)
    if kind == "naive":
        expected = F.interpolate(expected, x.shape[-2:], mode="bilinear")
    assert expected.shape == (2, CLASSES, 64, 64)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_equals_concatenated(family):
    x = images(family)
    model = pcx.VPT(setr(family), 3, head_init="keep").eval()
    found = [model(x)]
    found.append(torch.autograd.grad(found[0].square().sum(), model.prompts[0])[0])
    frozen = pcx.freeze(model)(x)
    model.path = "concat"
    expected = model(x)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(frozen, expected)
    gradient = torch.autograd.grad(expected.square().sum(), model.prompts[0])[0]
    torch.testing.assert_close(found[1], gradient)


@pytest.mark.parametrize("family", ["vit", "vit-avg", "dinov2-reg", "eva02"])
def test_the_decoder_reads_what_features_gives(family):
    x, model = images(family), pcx.VPT(setr(family), 3).eval()
    (maps,) = model.features(x, [-1], norm=True)
    decoded = model.backbone.decoder(maps)
    decoded = F.interpolate(decoded, x.shape[-2:], mode="bilinear")
    torch.testing.assert_close(model(x), decoded)
    plain = build(family)
    expected = feature_maps(plain, pcx.Linear(plain).spec, x, [-1], True)[0]
    torch.testing.assert_close(pcx.Linear(setr(family)).features(x, [-1], norm=True)[0], expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_saves_and_freezes(name, tmp_path):
    plain = build("vit")
    before = copy.deepcopy(plain.state_dict())
    backbone = pcx.SETR(plain, CLASSES, channels=8)
    model = METHODS[name](backbone).double()
    pcx.fit(model, loader(), epochs=2, lr=0.05, objective="segmentation", progress=False)
    found = pcx.evaluate(model, loader(), objective="segmentation")
    assert 0 < found["mean_iou"] <= 100
    assert any("running_mean" in name for name in model.own_state())
    pcx.save(model, tmp_path / "model.safetensors")
    again = pcx.load(tmp_path / "model.safetensors", pcx.SETR(build("vit"), 2, channels=8))
    x = images("vit")
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(pcx.freeze(model)(x), model(x))
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())
    assert not any(backbone.tower.patch_embed.proj.weight is p for p in plain.parameters())
    assert plain.head.out_features == 7


def test_a_file_names_the_backbone_and_its_decoder(tmp_path):
    backbone = pcx.backbones.scenes_vit()
    model = pcx.VPT(pcx.SETR(backbone, CLASSES, decoder="naive", channels=8), 2).eval()
    pcx.save(model, tmp_path / "model.safetensors")
    again = pcx.load(tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert again.backbone.decoder.kind == "naive"
    for given in (backbone, pcx.SETR(backbone, 2)):  # any head or decoder
        again = pcx.load(tmp_path / "model.safetensors", given)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    classifier = pcx.VPT(backbone, 2, num_classes=3).eval()
    pcx.save(classifier, tmp_path / "classifier.safetensors")
    again = pcx.load(tmp_path / "classifier.safetensors", pcx.SETR(backbone, 5))
    torch.testing.assert_close(again(x), classifier(x), rtol=0, atol=0)


def test_prompts_are_scored_and_condensed():
    model = pcx.VPT(setr(), 4, head_init="keep")
    data = loader()
    scores = pcx.score(model, data, objective="segmentation")
    by_hand = torch.zeros(3, 4, dtype=torch.float64)
    model.eval()
    for x, y in data:
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            found = torch.autograd.grad(loss, list(model.prompts))
            products = zip(found, model.prompts, strict=True)
            by_hand += torch.stack([(g * p).norm(dim=-1) for g, p in products]) / 4
    torch.testing.assert_close(torch.stack(list(scores)), by_hand.to(scores[0].dtype))
    small = pcx.condense(
        model, data, keep=0.5, epochs=1, lr=0.01, objective="segmentation", progress=False
    )
    assert sum(small.counts) == 6


def test_it_compiles_and_exports():
    x, model = images("vit"), pcx.VPT(setr(), 3).eval()
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(pcx.freeze(model).backbone, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def swin():
    sizes = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, **sizes
    ).double()


def resnet():
    return timm.create_model("resnet18").double()


@pytest.mark.parametrize(("make", "method"), [(swin, METHODS["vpt"]), (resnet, pcx.Linear)])
def test_backbones_with_stages(make, method):
    plain, x = make().eval(), images("vit")
    model = method(pcx.SETR(plain, CLASSES, channels=8)).eval()
    assert model(x).shape == (2, CLASSES, 64, 64)
    assert len(model.backbone.decoder.stages) == 5  # a step of 32 pixels
    plain = model.backbone.tower.forward_features(x)  # with the prompts in its windows
    maps = plain.movedim(-1, 1) if make is swin else plain
    torch.testing.assert_close(model(x), model.backbone.decoder(maps))


HUGGING_FACE = {
    "ViTModel": "ViTConfig",
    "ViTForImageClassification": "ViTConfig",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersConfig",
    "CLIPVisionModel": "CLIPVisionConfig",
    "BeitForImageClassification": "BeitConfig",
}


@pytest.mark.filterwarnings("ignore:model. mean and std")
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, HUGGING_FACE[name])(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=64, patch_size=16,
    )  # fmt: skip
    plain = getattr(transformers, name)(config).double().eval()
    randomise(plain)
    x = images("vit")
    model = pcx.VPT(pcx.SETR(plain, CLASSES, channels=8), 3).eval()
    pcx.save(model, tmp_path / "model.safetensors")
    again = pcx.load(tmp_path / "model.safetensors", pcx.SETR(plain, CLASSES, channels=8))
    folded = model(x)
    torch.testing.assert_close(again(x), folded, rtol=0, atol=0)
    torch.testing.assert_close(pcx.freeze(model)(x), folded)
    model.path = "concat"
    torch.testing.assert_close(model(x), folded)
    assert folded.shape == (2, CLASSES, 64, 64)


def test_another_image_size_and_number_of_classes():
    backbone = pcx.SETR(
        timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1), CLASSES
    )
    model = pcx.VPT(backbone, 2, num_classes=9).eval()
    assert model.num_classes == 9
    assert backbone.num_classes == CLASSES
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 9, 96, 64)


def test_without_classes_the_decoder_gives_features(tmp_path):
    backbone = pcx.SETR(build("vit"), 0, channels=8)
    for model in (pcx.VPT(backbone, 2).eval(), pcx.VPT(setr(), 2, num_classes=0).eval()):
        features = model(images("vit"))
        assert features.shape == (2, 8, 64, 64)
        assert model.num_classes == 0
        pcx.save(model, tmp_path / "model.safetensors")
        again = pcx.load(tmp_path / "model.safetensors", build("vit"))
        torch.testing.assert_close(again(images("vit")), features, rtol=0, atol=0)
        with pytest.raises(ValueError, match="it has no head"):
            pcx.fit(model, loader(), epochs=1, lr=0.1, objective="segmentation", progress=False)


class Places(nn.Module):
    """A decoder whose one number says how far right a pixel of the map lies, in tokens."""

    def forward(self, x):
        row = torch.arange(x.shape[-1], dtype=x.dtype)
        found = row.expand(len(x), 1, x.shape[-2], -1)
        return F.interpolate(found, scale_factor=16, mode="bilinear")


def test_pixels_of_padded_images_stay_where_they_are():
    tower = build("vit", dynamic_img_size=True, dynamic_img_pad=True)
    backbone = pcx.SETR(tower, CLASSES, channels=8)
    backbone.decoder = Places()
    whole = backbone(torch.zeros(1, 3, 48, 48).double())
    part = backbone(torch.zeros(1, 3, 34, 40).double())  # padded to 48 x 48
    torch.testing.assert_close(part, whole[..., :34, :40])


@pytest.mark.parametrize("inside", [False, True])
def test_pixels_within_a_border_stay_where_they_are(inside):
    backbone = setr() if inside else pcx.SETR(build("vit", dynamic_img_size=True), CLASSES)
    model = pcx.Border(backbone, 16, inside=inside).eval()
    model.backbone.inner.decoder = Places()
    found = model(images("vit"))
    assert found.shape == (2, 1, 64, 64)
    middle = found[0, 0, 0, 31:33].mean()  # of an image of 4 tokens, or of 6 with its border
    torch.testing.assert_close(middle, torch.tensor(1.5 if inside else 2.5).double())
    flipped = found.flip(-1)
    torch.testing.assert_close(found + flipped, torch.full_like(found, 2 * float(middle)))


def test_all_that_is_left_of_the_backbone_has_a_gradient():
    """As a copy on several processes needs it; what the map does not need is left out."""
    towers = [build("siglip"), build("vit-map"), build("vit-avg"), swin(), resnet()]
    for tower in towers:
        model = pcx.Full(pcx.SETR(tower, CLASSES, channels=8)).double()
        model(images("vit")).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert hasattr(towers[0].attn_pool, "mlp")  # the given backbone has all of it


def test_hugging_face_s_names_and_labels_leave_pixels_of_255_out():
    model, (x, y) = pcx.VPT(setr(), 3).eval(), loader()[0]
    y[:, :20] = 255
    out = model(pixel_values=x, labels=y)
    counted = out.logits.movedim(1, -1)[y != 255]
    torch.testing.assert_close(out.loss, F.cross_entropy(counted, y[y != 255]))


def test_what_has_no_meaning_is_refused():
    backbone = setr()
    with pytest.raises(ValueError, match="decoder: got 'mla', expected one of"):
        pcx.SETR(build("vit"), CLASSES, decoder="mla")
    with pytest.raises(ValueError, match="num_classes: -1"):
        pcx.SETR(build("vit"), -1)
    with pytest.raises(ValueError, match=r"a SETR already; give its \.tower"):
        pcx.SETR(backbone, CLASSES)
    for tuned in (pcx.VPT(build("vit"), 2), pcx.freeze(pcx.VPT(build("vit"), 2))):
        with pytest.raises(ValueError, match=r"already; give its \.backbone"):
            pcx.SETR(tuned, CLASSES)
    with pytest.raises(ValueError, match="backbone: got a str"):
        pcx.SETR("vit_tiny_patch16_224", CLASSES)
    with pytest.raises(ValueError, match="Linear is not supported"):
        pcx.SETR(nn.Linear(3, 3), CLASSES)
    with pytest.raises(ValueError, match="of Hiera was found"):
        pcx.SETR(timm.create_model("hiera_tiny_224"), CLASSES)
    with pytest.raises(ValueError, match="side-tuning mixes"):
        pcx.Sidetune(backbone, pretrained=False)
    with pytest.raises(ValueError, match="heads are"):
        pcx.MLP(backbone)
    model = pcx.VPT(backbone, 3)
    with pytest.raises(ValueError, match="objective='segmentation'"):
        pcx.fit(model, loader(), epochs=1, lr=0.1, progress=False)
    with pytest.raises(ValueError, match=r"argmax\(1\) for a class per pixel"):
        pcx.predict(model, images("vit"))
    for reduce in (
        lambda: zero_tprune(model, layers=[1], keep=0.7, iters=3),
        lambda: tome(model, r=2),
        lambda: ats(model, layers=[1], tokens=4),
    ):
        with pytest.raises(ValueError, match="map of all image tokens, of which none may go"):
            reduce()
