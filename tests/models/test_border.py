"""A learned border around the images of ConvNets."""

import pytest
import timm
import torch
import torch.nn.functional as F
from families import build

import pcx


def convnet(name="resnet18", **more):
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model(name, num_classes=5, pretrained_cfg_overlay=overlay, **more).double()
    for p in model.parameters():
        if p.dim() < 2:
            torch.nn.init.normal_(p, 1.0, 0.1)
    return model.eval()


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("width", [1, 5, 11])
def test_each_image_stands_in_the_middle_of_the_same_border(name, width, x):
    backbone = convnet(name)
    model = pcx.Border(backbone, width, head_init="keep").eval()
    side = 32 + 2 * width
    whole = torch.zeros(3, 3, side, side).double()
    rows, columns = model.backbone.border_rows, model.backbone.border_columns
    for image, place in zip(x, whole, strict=True):
        place[:, width:-width, width:-width] = image
        place[:, :width], place[:, -width:] = rows[0].detach(), rows[1].detach()
        place[:, width:-width, :width] = columns[0].detach()
        place[:, width:-width, -width:] = columns[1].detach()
    expected = backbone(whole)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert (expected - backbone(x)).norm() > 1e-3 * expected.norm()
    counted = sum(p.numel() for n, p in model.trainable().items() if "border" in n)
    assert counted == 3 * (side**2 - 32**2)
    maps = model.features(x)
    for found, own in zip(maps, backbone.forward_intermediates(whole)[1], strict=True):
        torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)


def test_inside_the_image_is_shrunk(x):
    backbone = build("vit", dtype=torch.float64)
    images = F.interpolate(x, (64, 64))
    model = pcx.Border(backbone, 8, inside=True, head_init="keep").eval()
    small = F.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.backbone.bordered(images)[:, :, 8:-8, 8:-8], small)
    assert model.backbone.bordered(images).shape == images.shape
    assert model(images).shape == (3, 7)


def test_images_of_16_bits_are_shrunk(x):
    model = pcx.Border(convnet().bfloat16(), 3, inside=True).eval()
    assert model(x.bfloat16()).shape == (3, 5)


def test_the_border_starts_between_black_and_white():
    model = pcx.Border(convnet(), 5)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for part in (model.backbone.border_rows, model.backbone.border_columns):
        colours = part.detach() * std + mean
        assert colours.min() >= -1e-6
        assert colours.max() <= 1 + 1e-6
        assert colours.std() > 0.2


def test_a_few_steps_train_it_and_it_is_saved_and_frozen(x, tmp_path):
    backbone = convnet()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    model = pcx.Border(backbone, 3)
    start = model.backbone.border_rows.detach().clone()
    loader = [(x, torch.tensor([0, 1, 2]))]
    rows = pcx.fit(model, loader, epochs=8, lr=0.01, clip_grad=1.0, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not torch.equal(model.backbone.border_rows, start)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    pcx.save(model.eval(), tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    assert torch.equal(loaded(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(pcx.freeze(model)(x), model(x), rtol=1e-9, atol=1e-9)
    small = pcx.multiply_adds(pcx.Linear(backbone))
    assert pcx.multiply_adds(model) > small  # the image is larger


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pcx.Border(convnet(), 0), "width: 0, expected"),
        (lambda: pcx.Border(convnet(), inside=1), "inside: 1, expected True or False"),
        (
            lambda: pcx.Border(convnet(), 16, inside=True),
            "width: 16 on both sides leaves nothing of an image of 32 x 32; give less than 16",
        ),
        (
            lambda: pcx.Border(build("vit"), 4),
            "backbone: VisionTransformer does not take images of 72 x 72 .*; give inside=True",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_images_of_another_size_are_named(x):
    model = pcx.Border(convnet(), 3)
    with pytest.raises(ValueError, match="^x: images of 40 x 32, and the border is for .* 32 x 32"):
        model(F.pad(x, (0, 0, 4, 4)))
