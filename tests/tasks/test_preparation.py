"""How a transform is divided into what is kept and what runs on each read."""

import json

import pytest
import timm.data
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torch import nn
from torchvision import transforms as t
from torchvision.transforms import v2

from pcx.tasks.preparation import RATIO, applied, preparation_of

NORMAL = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SETTINGS = {"input_size": (3, 32, 48), "mean": NORMAL.mean, "std": NORMAL.std}


def photo(width=75, height=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


TRANSFORMS = {
    "timm, centre": timm.data.create_transform(**SETTINGS, crop_pct=0.9),
    "timm, border": timm.data.create_transform(**SETTINGS, crop_pct=1.0, crop_mode="border"),
    "timm, squash": timm.data.create_transform(**SETTINGS, crop_pct=0.9, crop_mode="squash"),
    "timm, uint8": timm.data.create_transform(**SETTINGS, normalize=False),
    "vtab": t.Compose([t.Resize((32, 48)), t.ToTensor(), NORMAL]),
    "fgvc": t.Compose(
        [t.Resize(40), t.RandomCrop(32), t.RandomHorizontalFlip(), t.ToTensor(), NORMAL]
    ),
    "nested": t.Compose([t.Compose([t.Resize(40), t.CenterCrop(32)]), t.ToTensor()]),
    "sequential": nn.Sequential(v2.CenterCrop((20, 60)), v2.PILToTensor()),
    "v2": v2.Compose(
        [v2.Resize(40), v2.RandomCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    ),
    "an image": t.Compose([t.Resize((32, 32))]),
    "an unknown part behind": t.Compose([t.Resize((32, 32)), t.ToTensor(), torch.square]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(75, 50), (50, 75), (20, 21), (301, 40)])
def test_both_parts_give_the_bits_of_the_whole(name, size):
    transform, image = TRANSFORMS[name], photo(*size)
    found = preparation_of(transform)
    torch.manual_seed(0)
    expected = transform(image)
    pixels = found.pixels_of(applied(found.fixed, image))
    assert pixels.dtype == "uint8"
    for _ in range(2):  # reading changes nothing that is kept
        torch.manual_seed(0)
        given = found.finished(pixels)
        assert type(given) is type(expected)
        if isinstance(given, torch.Tensor):
            assert given.dtype == expected.dtype
            assert torch.equal(given, expected)
        else:
            assert given.tobytes() == expected.tobytes()
    if size != (301, 40):
        assert pixels.nbytes <= found.limit


def test_the_default_dtype_is_that_of_the_transform():
    found = preparation_of(TRANSFORMS["vtab"])
    pixels = found.pixels_of(applied(found.fixed, photo()))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(found.finished(pixels), TRANSFORMS["vtab"](photo()))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("parts", "kept", "limit"),
    [
        ([t.Resize(40), t.CenterCrop(32), t.ToTensor()], 2, 3 * 32 * 32),
        ([t.Resize(40), t.RandomCrop(32), t.ToTensor()], 1, 3 * 40 * RATIO * 40),
        ([t.Resize(40, max_size=60), t.RandomCrop(32)], 1, 3 * 40 * 60),
        ([t.Resize((8, 9)), t.Grayscale(3), t.ToTensor()], 1, 3 * 8 * 9),
        ([t.CenterCrop(30), t.Resize((8, 9)), t.ToTensor()], 2, 3 * 8 * 9),
        ([v2.Resize(None, max_size=50), t.ToTensor()], 1, 3 * 50 * 50),
    ],
)
def test_the_longest_part_of_bounded_size_is_kept(parts, kept, limit):
    found = preparation_of(t.Compose(parts))
    assert [repr(part) for part in found.fixed] == [repr(part) for part in parts[:kept]]
    assert list(found.rest) == parts[kept:]
    assert found.limit == limit


class MyResize(t.Resize):
    """May do anything."""


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (timm.data.create_transform(**SETTINGS, is_training=True), "begins with RandomResizedCrop"),
        (t.Compose([t.ToTensor(), NORMAL]), "begins with ToTensor"),
        (t.Compose([MyResize((32, 32)), t.ToTensor()]), "begins with MyResize"),
        (t.Compose([ResizeKeepRatio(32, random_scale_prob=0.5)]), "begins with ResizeKeepRatio"),
        (t.Compose([ResizeKeepRatio(32), t.ToTensor()]), "begins with ResizeKeepRatio"),
        (t.Compose([]), "begins with nothing"),
        (lambda image: image, "begins with function"),
        (None, "it has no transform"),
    ],
)
def test_a_transform_that_cannot_be_divided_has_a_reason(transform, reason):
    assert reason in preparation_of(transform)


def test_the_description_tells_transforms_apart():
    same = [t.Compose([t.Resize((32, 32)), t.ToTensor(), after]) for after in (NORMAL, nn.ReLU())]
    assert len({preparation_of(transform).description for transform in same}) == 1
    different = [
        [t.Resize((32, 32)), t.ToTensor()],
        [t.Resize((32, 32))],  # another layout
        [t.Resize((32, 33)), t.ToTensor()],
        [t.Resize((32, 32), t.InterpolationMode.BICUBIC), t.ToTensor()],
        [t.CenterCrop((32, 32)), t.ToTensor()],
        [t.Resize((40, 40)), t.CenterCrop(32), t.ToTensor()],
    ]
    found = {preparation_of(t.Compose(parts)).description for parts in different}
    assert len(found) == len(different)
    assert {"pillow", "torchvision", "timm"} <= set(json.loads(found.pop()))
