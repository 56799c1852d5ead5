"""Tasks: their questions, their splits, and clear words about bad data."""

import json

import pytest
import timm
import torch
from families import CONFIG
from PIL import Image

from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task, masks
from pcx.tasks.render import SHAPES, Objects, render, render_shapes
from pcx.tasks.scenes import COLOURS, scenes
from pcx.tasks.sprites import draw_sprites
from pcx.training.loaders import plain_loader


def one(shape, **changes):
    factors = {"x": 0.5, "y": 0.5, "radius": 0.3, "angle": 0.0, **changes}
    return Objects(
        shape=torch.tensor([[SHAPES.index(shape)]]),
        colour=torch.ones(1, 1, 3),
        visible=torch.ones(1, 1, dtype=torch.bool),
        **{k: torch.tensor([[v]]) for k, v in factors.items()},
    )


def mass_centre(image):
    weights = image[0, 0].double()
    steps = (torch.arange(64) + 0.5) / 64
    return [float((weights.sum(d) * steps).sum() / weights.sum()) for d in (0, 1)]  # x, y


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_where_its_factors_say(shape):
    black = torch.zeros(1, 3, 1, 1)
    at = mass_centre(render(one(shape), black))
    moved = mass_centre(render(one(shape, x=0.6, y=0.35), black))
    assert moved[0] - at[0] == pytest.approx(0.1, abs=0.01)
    assert moved[1] - at[1] == pytest.approx(-0.15, abs=0.01)
    large = render(one(shape, radius=0.4), black).double().mean()
    small = render(one(shape, radius=0.2), black).double().mean()
    assert large / small == pytest.approx(4, rel=0.1)


def test_shapes_differ_from_each_other_at_every_angle():
    black = torch.zeros(1, 3, 1, 1)
    drawn = {
        s: [render(one(s, angle=a), black).double() / 255 for a in torch.arange(0, 6.28, 0.3)]
        for s in SHAPES
    }
    for a in SHAPES:
        for b in SHAPES:
            if a != b:
                assert min((drawn[a][0] - other).abs().mean() for other in drawn[b]) > 0.01


def test_a_turn_turns():
    black = torch.zeros(1, 3, 1, 1)
    up, right = render(one("heart"), black), render(one("heart", angle=torch.pi / 2), black)
    turned = torch.rot90(up, -1, (2, 3)).double()
    assert (turned - right.double()).abs().mean() < 2


@pytest.mark.parametrize(("question", "classes"), [("count", 8), ("ori", 16), ("loc", 16)])
def test_sprites(question, classes):
    splits = draw_sprites(question)
    assert {k: len(v[1]) for k, v in splits.items()} == {"train": 800, "val": 200, "test": 2000}
    for images, labels in splits.values():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 64, 64)
        assert set(labels.tolist()) == set(range(classes))
    assert torch.equal(draw_sprites(question)["val"][0], splits["val"][0])
    assert not torch.equal(splits["train"][0][:200], splits["val"][0])


def test_location_is_the_horizontal_centre():
    images, labels = draw_sprites("loc")["val"]
    centres = torch.tensor([mass_centre(image[None])[0] for image in images])
    assert torch.corrcoef(torch.stack([centres, labels.float()]))[0, 1] > 0.98


def test_count_is_the_number_of_objects():
    from scipy.ndimage import label

    images, labels = draw_sprites("count")["val"]
    grey = images[:, :, 0, 0]
    counted = []
    for image, background in zip(images, grey, strict=True):
        object_pixels = (image.int() - background[:, None, None].int()).abs().sum(0) > 24
        counted.append(label(object_pixels.numpy())[1])
    near = (torch.tensor(counted) - (labels + 3)).abs() <= 1
    assert near.double().mean() > 0.9  # a cross's arms or touching neighbours may miscount by one


def test_scenes_name_the_shape_and_colour_of_the_largest_object():
    images, labels = scenes(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 64, 64)
    assert labels.max() < len(SHAPES) * len(COLOURS)
    again, _ = scenes(64, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_the_embedded_backbone_solves_its_upstream_task():
    images, labels = scenes(512, torch.Generator().manual_seed(123))
    with torch.no_grad():
        found = scenes_vit(64)(images.float() / 127.5 - 1).argmax(1)
    assert (found == labels).double().mean() > 0.94


def test_digits_are_split_once():
    task = load_task("digits", data_config(scenes_vit()))
    sizes = {name: len(split) for name, split in task.splits.items()}
    assert sizes == {"train": 200, "val": 200, "test": 1397, "trainval": 400}
    images, labels = next(iter(task.loader("test", 8)))
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.max() < 10
    assert [type(task.loader(s).sampler).__name__ for s in ("train", "val")] == [
        "RandomSampler",
        "SequentialSampler",
    ]


@pytest.fixture
def image_root(tmp_path):
    folder = tmp_path / "vtab-1k" / "eurosat"
    for split in ("train800", "val200", "test"):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(3):
            name = f"images/{split}/{i:06d}.jpg"
            Image.new("RGB", (40, 30), (i * 80, 0, 0)).save(folder / name)
            lines.append(f"{name} {i}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    both = (folder / "train800.txt").read_text() + (folder / "val200.txt").read_text()
    (folder / "train800val200.txt").write_text(both)
    return tmp_path


def test_vtab_layout(image_root):
    task = load_task("vtab:eurosat", CONFIG, root=image_root)
    assert task.num_classes == 10
    assert {k: len(v) for k, v in task.splits.items()} == {
        "train": 3,
        "val": 3,
        "trainval": 6,
        "test": 3,
    }
    image, label = task.splits["test"][2]
    assert image.shape == (3, 32, 32)
    assert label == 2
    assert image[0].mean() == pytest.approx(160 / 127.5 - 1, abs=0.05)
    assert load_task("vtab:eurosat", CONFIG, root=image_root).loader("val", 2)


def test_vtab_errors_name_path_line_and_what_was_expected(image_root):
    folder = image_root / "vtab-1k" / "eurosat"
    with pytest.raises(ValueError, match=r"name: 'vtab:mnist', expected one of"):
        load_task("vtab:mnist", CONFIG, root=image_root)
    with pytest.raises(FileNotFoundError, match=r"svhn: not found, expected .* pass root="):
        load_task("vtab:svhn", CONFIG, root=image_root)
    text = (folder / "val200.txt").read_text()
    for bad in ("images/x.jpg ten", "images/x.jpg 10", "images/x.jpg", "7"):
        (folder / "val200.txt").write_text(text + bad + "\n")
        with pytest.raises(ValueError, match=r"val200.txt, line 4: .* a label of 0\.\.9"):
            load_task("vtab:eurosat", CONFIG, root=image_root)
    (folder / "val200.txt").write_text("")
    with pytest.raises(ValueError, match=r"val200\.txt: no lines"):
        load_task("vtab:eurosat", CONFIG, root=image_root)


def test_a_corrupt_or_missing_image_is_named(image_root):
    folder = image_root / "vtab-1k" / "eurosat"
    task = load_task("vtab:eurosat", CONFIG, root=image_root)
    file = folder / "images" / "test" / "000001.jpg"
    whole = file.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"000001\.jpg: not a whole image file"):
            task.splits["test"][1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"000001\.jpg: listed in the split"):
        task.splits["test"][1]


@pytest.fixture
def fgvc_root(tmp_path):
    folder = tmp_path / "CUB"
    folder.mkdir()
    for split, classes in {"train": ("b", "a", "c"), "val": ("a",), "test": ("c", "b")}.items():
        table = {}
        for i, name in enumerate(classes):
            path = f"{split}{i}.png"
            Image.new("RGB", (300, 280), (i * 100, 50, 0)).save(folder / path)
            table[path] = name
        (folder / f"{split}.json").write_text(json.dumps(table))
    return tmp_path


def test_fgvc_splits(fgvc_root):
    task = load_task("fgvc:CUB", CONFIG, root=fgvc_root)
    assert task.num_classes == 3
    assert [label for _, label in task.splits["train"]] == [1, 0, 2]
    assert [label for _, label in task.splits["test"]] == [2, 1]
    assert len(task.splits["trainval"]) == 4
    assert all(image.shape == (3, 32, 32) for image, _ in task.splits["trainval"])
    plain = plain_loader(task.loader("train"), CONFIG)
    assert "evaluation transform" in plain.description
    first, again = (plain.loader.dataset[0][0] for _ in range(2))
    assert torch.equal(first, again)


def test_fgvc_errors(fgvc_root):
    folder = fgvc_root / "CUB"
    with pytest.raises(FileNotFoundError, match="Dogs: not found"):
        load_task("fgvc:Dogs", CONFIG, root=fgvc_root)
    (folder / "val.json").write_text('{"a.png": "zebra"}')
    with pytest.raises(ValueError, match=r"val\.json: classes \['zebra'\] are not in train\.json"):
        load_task("fgvc:CUB", CONFIG, root=fgvc_root)
    (folder / "val.json").write_text('{"a.png":\n "b"')
    with pytest.raises(ValueError, match=r"val\.json, line 2: not JSON"):
        load_task("fgvc:CUB", CONFIG, root=fgvc_root)
    (folder / "val.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_task("fgvc:CUB", CONFIG, root=fgvc_root)


class Reads:
    """What timm.data.create_dataset gives for the splits that a data set has."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def __call__(self, name, root, split, class_map=None):
        if split not in self.sizes:
            raise ValueError(f"no {split}")
        return FakeData(split, self.sizes[split])


class FakeData:
    def __init__(self, split, size):
        self.split, self.size, self.classes = split, size, ["ant", "bee"]

    def __len__(self):
        return self.size


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (
            {"train": 30, "validation": 6, "test": 5},
            {"trainval": 30, "train": 30, "val": 6, "test": 5},
        ),
        ({"train": 30, "val": 6}, {"trainval": 30, "train": 30, "val": 6}),
        ({"train": 30, "test": 5}, {"trainval": 30, "train": 27, "val": 3, "test": 5}),
    ],
)
def test_splits_of_timm_are_what_they_are_called(monkeypatch, tmp_path, there, expected):
    monkeypatch.setattr(timm.data, "create_dataset", Reads(**there))
    task = load_task("torch/insects", CONFIG, root=tmp_path)
    assert {k: len(v) for k, v in task.splits.items()} == expected
    assert task.held_out == ("test" if "test" in there else "val")
    if "test" not in there:
        assert task.splits["val"].split == "val"
        with pytest.raises(ValueError, match="no test split, and val is what no training"):
            task.loader("test")
    if len(there) == 2 and "test" in there:
        assert not set(task.splits["train"].indices) & set(task.splits["val"].indices)


def test_data_of_timm_without_a_second_split_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(timm.data, "create_dataset", Reads(train=3))
    with pytest.raises(ValueError, match="has no split .test. that timm"):
        load_task("torch/insects", CONFIG, root=tmp_path)


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="name: 'letters', expected one of: digits"):
        load_task("letters", CONFIG, root=tmp_path)
    with pytest.raises(ValueError, match=r"expected sprites:count\|ori\|loc"):
        load_task("sprites:size", CONFIG)
    with pytest.raises(ValueError, match="has no split .train. that timm"):
        load_task("torch/nothing", CONFIG, root=tmp_path)
    with pytest.raises(ValueError, match="split: got 'dev'"):
        load_task("digits", CONFIG).loader("dev")


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_say_which_shape_a_pixel_shows(shape):
    drawn = one(shape)
    covered = render(drawn, torch.zeros(1, 3, 1, 1))[0, 0] > 127
    expected = torch.where(covered, 1 + SHAPES.index(shape), 0)
    assert torch.equal(render_shapes(drawn)[0], expected)
    drawn.visible[:] = False
    assert not render_shapes(drawn).any()


def test_the_topmost_shape_counts():
    both = Objects(
        shape=torch.tensor([[SHAPES.index("square"), SHAPES.index("disc")]]),
        x=torch.tensor([[0.5, 0.5]]),
        y=torch.tensor([[0.5, 0.5]]),
        radius=torch.tensor([[0.4, 0.2]]),
        angle=torch.zeros(1, 2),
        colour=torch.ones(1, 2, 3),
        visible=torch.ones(1, 2, dtype=torch.bool),
    )
    found = render_shapes(both)[0]
    assert found[32, 32] == 1 + SHAPES.index("disc")
    assert found[32, 16] == 1 + SHAPES.index("square")


def test_the_task_of_masks(monkeypatch):
    monkeypatch.setattr(masks, "SPLITS", {"train": (1, 8), "val": (2, 4), "test": (3, 6)})
    task = load_task("masks", {**CONFIG, "input_size": (3, 64, 64)})
    assert (task.objective, task.num_classes, task.held_out) == ("segmentation", 9, "test")
    batches = {split: next(iter(task.loader(split, 99))) for split in ("val", "test", "trainval")}
    assert [len(x) for x, _ in batches.values()] == [4, 6, 12]
    for x, y in batches.values():
        assert x.shape[1:] == (3, 64, 64)
        assert (y.shape[1:], y.dtype) == ((64, 64), torch.int64)
        assert y.min() == 0
        assert y.max() < 9
    half = next(iter(load_task("masks", CONFIG).loader("val", 99)))  # images of 32 pixels
    shown = batches["val"][1]
    assert torch.equal(half[1], shown[:, 1::2, 1::2])
    again = next(iter(load_task("masks", {**CONFIG, "input_size": (3, 64, 64)}).loader("val", 99)))
    assert torch.equal(again[1], shown)
