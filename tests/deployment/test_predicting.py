"""Predictions: of files, folders, PIL images and tensors, and what is no image."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import pcx
from pcx.backbones import scenes_vit
from pcx.cli import app
from pcx.tasks import load_task

COLOURS = {"blue": (40, 60, 220), "green": (50, 210, 60), "red": (220, 50, 40)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(12):
            noise = generator.normal(0, 30, (50, 70, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(photos):
    model = pcx.VPT(scenes_vit(), 4, num_classes=3)
    task = load_task(str(photos), model_config(model))
    torch.manual_seed(0)
    pcx.fit(model, task.loader("train", 16), epochs=4, lr=0.3, clip_grad=1.0, progress=False)
    return model.eval()


def model_config(model):
    from pcx.backbones.inputs import data_config

    return data_config(model)


def by_hand(model, path):
    with torch.no_grad(), Image.open(path) as image:
        return model(model.transform()(image.convert("RGB"))[None]).softmax(-1)[0]


def test_a_folder_gives_names_and_probabilities(model, photos):
    model.train()
    found = pcx.predict(model, photos, batch_size=7)
    assert model.training  # as it was
    model.eval()
    assert len(found) == 36
    assert found.skipped == []
    assert [row.source for row in found] == sorted(str(p) for p in photos.glob("*/*.png"))
    for row in found:
        expected = by_hand(model, row.source)
        assert row.labels == [int(expected.argmax())]
        assert row.name == sorted(COLOURS)[row.labels[0]]
        assert row.probability == pytest.approx(float(expected.max()), abs=1e-5)
    right = [row.name == row.source.split("/")[-2] for row in found]
    assert sum(right) >= 34


def test_predictions_are_those_of_evaluation(model, photos):
    task = load_task(str(photos), model_config(model))
    accuracy = pcx.evaluate(model, task.loader("test", 2))["accuracy"]
    samples = task.splits["test"].samples
    found = pcx.predict(model, [path for path, _ in samples])
    right = [row.labels[0] == label for row, (_, label) in zip(found, samples, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(accuracy)


def test_all_forms_of_an_image_give_the_same(model, photos):
    path = photos / "red" / "3.png"
    image = Image.open(path).convert("RGB")
    tensor = model.transform()(image)
    (expected,) = pcx.predict(model, path, top=None)
    assert sum(expected.probabilities) == pytest.approx(1)
    assert expected.probabilities == sorted(expected.probabilities, reverse=True)
    forms = [str(path), [path], image, [image], tensor, tensor[None], [tensor, tensor][:1]]
    for form in forms:
        (found,) = pcx.predict(model, form, top=None)
        assert found.names == expected.names
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    found = pcx.predict(model, [photos / "blue", str(photos / "red" / "1*.png"), image, tensor])
    sources = [row.source for row in found]
    assert len(sources) == 12 + 3 + 2
    assert sources[-2:] == ["[2]", "[3]"]


def test_files_that_are_no_images_are_skipped(model, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    Image.open(photos / "red" / "0.png").convert("LA").save(tmp_path / "grey.png")
    found = pcx.predict(model, [tmp_path, photos / "red" / "1.png"])
    assert [row.source for row in found] == [
        str(tmp_path / "grey.png"),
        str(photos / "red" / "1.png"),
    ]
    ((path, why),) = found.skipped
    assert path == str(tmp_path / "text.jpg")
    assert why.startswith("not a whole image file")
    with pytest.raises(
        ValueError, match=r"images: none of 1 is an image; the first is .*text\.jpg"
    ):
        pcx.predict(model, tmp_path / "text.jpg")


def test_probabilities_are_those_of_the_loss_trained_with():
    model = pcx.VPT(scenes_vit(), 2, num_classes=3)
    images = torch.randn(8, 3, 64, 64)
    several = DataLoader(TensorDataset(images, torch.randint(2, (8, 3)).float()), 4)
    pcx.fit(model, several, epochs=1, lr=0.01, objective="multi-label", progress=False)
    with torch.no_grad():
        expected = model.eval()(images).sigmoid().sort(-1, descending=True).values
    found = pcx.predict(model, images, top=None)
    assert [row.probabilities for row in found] == [
        pytest.approx(row, abs=1e-5) for row in expected.tolist()
    ]
    numbers = pcx.VPT(scenes_vit(), 2, num_classes=1)
    values = DataLoader(TensorDataset(images, torch.randn(8)), 4)
    pcx.fit(numbers, values, epochs=1, lr=0.01, objective="regression", progress=False)
    with pytest.raises(ValueError, match="trained for regression, and gives no classes"):
        pcx.predict(numbers, images)
    with pytest.raises(ValueError, match="model: it has no head"):
        pcx.predict(pcx.VPT(scenes_vit(), 2, num_classes=0), images)


def test_names_are_numbers_where_none_are_known():
    (found,) = pcx.predict(pcx.Linear(scenes_vit(), num_classes=3), torch.randn(3, 64, 64), top=9)
    assert sorted(found.names) == ["0", "1", "2"]


def test_the_command(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pcx.save(model, "m.safetensors")
    (tmp_path / "bad.jpg").write_text("no image")
    expected = pcx.predict(model, photos, top=2)
    base = ["predict", str(photos), "--model", "m.safetensors", "--top", "2"]
    done = CliRunner().invoke(app, base)
    assert done.exit_code == 0, done.output
    for line, row in zip(done.stdout.splitlines(), expected, strict=True):
        source, first, probability, second, _ = line.split("\t")
        assert (source, first, second) == (row.source, *row.names)
        assert float(probability.rstrip("%")) == pytest.approx(100 * row.probability, abs=0.06)
    done = CliRunner().invoke(app, [*base, "bad.jpg", "--out", "p.csv"])
    assert done.exit_code == 4
    assert "skipped bad.jpg: not a whole image file" in done.stderr
    with open("p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    assert rows[0] == {
        "image": expected[0].source,
        "rank": "1",
        "label": str(expected[0].labels[0]),
        "class": expected[0].name,
        "probability": f"{expected[0].probability:.6g}",
    }
    done = CliRunner().invoke(app, [*base, "--out", "p.json"])
    assert done.exit_code == 0
    (first, *_) = json.loads((tmp_path / "p.json").read_text())
    assert [c["class"] for c in first["classes"]] == expected[0].names


def test_probabilities_go_by_the_objective_whatever_the_criterion():
    def mine(logits, labels):
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels, reduction="none"
        ).sum(-1)

    model, images = pcx.VPT(scenes_vit(), 2, num_classes=3), torch.randn(4, 3, 64, 64)
    several = DataLoader(TensorDataset(images, torch.randint(2, (4, 3)).float()), 2)
    arguments = {"objective": "multi-label", "criterion": mine, "progress": False}
    pcx.fit(model, several, epochs=1, lr=0.01, **arguments)
    with torch.no_grad():
        expected = model.eval()(images).sigmoid().sort(-1, descending=True).values
    found = pcx.predict(model, images, top=None)
    assert [row.probabilities for row in found] == [
        pytest.approx(row, abs=1e-5) for row in expected.tolist()
    ]


def test_one_logit_gives_two_classes():
    model, images = pcx.VPT(scenes_vit(), 2, num_classes=1).eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        right = model(images)[:, 0].sigmoid()
    for row, p in zip(pcx.predict(model, images, top=None), right.tolist(), strict=True):
        assert dict(zip(row.names, row.probabilities, strict=True)) == {
            "0": pytest.approx(1 - p, abs=1e-5),
            "1": pytest.approx(p, abs=1e-5),
        }


def test_patterns_give_each_photo_once(model, photos):
    found = pcx.predict(model, str(photos / "**" / "*"))
    assert len(found) == len({row.source for row in found}) == 36


def test_images_that_do_not_fit_are_named(model):
    for images, said in [
        (torch.randn(3, 100, 100), r"images: the model cannot take them .*\[1, 3, 100, 100\]"),
        (torch.randn(1, 64, 64), r"images: the model cannot take them .*\[1, 1, 64, 64\]"),
        (torch.randn(3, 64, 64).double(), "images: the model cannot take them .*float64"),
        (torch.full((3, 64, 64), float("nan")), r"images: \[0\] gives NaN"),
        (Image.new("F", (8, 8)), r"images\[0\]: its pixels are of mode 'F'"),
        ("", "images: an empty path"),
    ]:
        with pytest.raises(ValueError, match=said):
            pcx.predict(model, images)
    narrow = pcx.Linear(scenes_vit().to(torch.bfloat16), num_classes=3)
    with pytest.raises(ValueError, match="give amp='bf16'"):
        pcx.predict(narrow, torch.randn(3, 64, 64))
    assert len(pcx.predict(narrow, torch.randn(3, 64, 64), amp="bf16")) == 1


def test_names_of_files_that_are_no_utf8_are_written(photos, model, tmp_path, monkeypatch):
    odd = os.fsdecode(b"gr\xfcn.png")
    (tmp_path / odd).write_bytes((photos / "green" / "0.png").read_bytes())
    (tmp_path / os.fsdecode(b"kein\xff.png")).write_text("no image")
    monkeypatch.chdir(tmp_path)
    pcx.save(model, "m.safetensors")
    files = ["predict", ".", "--model", "m.safetensors"]
    for out in ("p.json", "p.csv"):
        done = CliRunner().invoke(app, [*files, "--out", out])
        assert done.exit_code == 4, done.exception
    assert "skipped kein\\udcff.png" in done.stderr
    assert json.loads((tmp_path / "p.json").read_text("utf-8"))[0]["image"] == odd
    with open("p.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["image"], row["class"]) == ("gr\\udcfcn.png", "green")
    # To the standard output as a terminal in UTF-8 has it, which refuses surrogates.
    done = CliRunner(charset="utf-8").invoke(app, files)
    assert done.stdout.startswith("gr\\udcfcn.png\tgreen\t")
