"""The first section of docs/quickstart.md, typed as it stands, on a folder of photos."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pcx

QUICKSTART = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text()
SECTION = QUICKSTART.split("## ")[1]
COMMANDS = re.search(r"^```\n(.*?)^```", SECTION, re.M | re.S)[1].splitlines()
PYTHON = re.search(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of two classes, and what the commands left beside them."""
    place = tmp_path_factory.mktemp("stranger")
    generator = np.random.default_rng(0)
    for name, colour in {"cat": (190, 120, 60), "dog": (70, 110, 190)}.items():
        (place / "photos" / name).mkdir(parents=True)
        for i in range(20):
            noise = generator.normal(0, 45, (60, 80, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{i}.jpg")
    (place / "photos" / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    said = {}
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        assert name == "pcx"
        done = subprocess.run(
            [sys.executable, "-c", "from pcx.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            cwd=place,
        )
        said[arguments[0]] = done
    return place, said


@pytest.mark.slow
def test_the_commands_run_as_they_stand(folder):
    place, said = folder
    assert list(said) == ["train", "predict", "condense", "export"]
    codes = {name: done.returncode for name, done in said.items()}
    assert codes == {"train": 0, "predict": 4, "condense": 0, "export": 0}, said
    assert "2 classes, photos: train 32, val 4, test 4" in said["train"].stdout.replace("\n", " ")
    assert "broken.jpg" in said["train"].stdout.replace("\n", "")
    assert re.search(r"photos test: \d+\.\d+ ± .* on 4 images", said["train"].stdout)
    assert "skipped photos/dog/broken.jpg" in said["predict"].stderr
    assert (place / "photos.safetensors.ckpt" / "history.csv").is_file()
    assert (place / "photos-condensed.safetensors").is_file()


@pytest.mark.slow
def test_command_python_onnx_and_pipeline_agree(folder, monkeypatch, capsys):
    place, _ = folder
    monkeypatch.chdir(place)
    with open("predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 * 2
    model = pcx.load("photos.safetensors")
    found = pcx.predict(model, ["photos/cat", "photos/dog"], top=2)
    given = [
        (p.source, name, probability)
        for p in found
        for name, probability in zip(p.names, p.probabilities, strict=True)
    ]
    for row, (source, name, probability) in zip(rows, given, strict=True):
        assert (row["image"], row["class"]) == (source, name)
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)
    assert sum(p.name == Path(p.source).parent.name for p in found) >= 38
    exec(PYTHON, {"pcx": pcx})
    assert capsys.readouterr().out.splitlines()[0].startswith("photos/cat/0.jpg ")

    small = pcx.load("photos-condensed.safetensors")
    expected = pcx.predict(small, "photos/cat", top=2)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession("photos.onnx")
    about = session.get_modelmeta().custom_metadata_map
    names = json.loads(about["class_names"])
    images = torch.stack([small.transform()(Image.open(p.source)) for p in expected])
    (logits,) = session.run(None, {"images": images.numpy()})
    for row, p in zip(torch.from_numpy(logits).softmax(-1), expected, strict=True):
        order = row.argsort(descending=True).tolist()
        assert [names[i] for i in order] == p.names
        assert row[order].tolist() == pytest.approx(p.probabilities, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_agrees(folder):
    transformers = pytest.importorskip("transformers")
    from pcx.deployment.hugging_face import PcxForImageClassification

    place, _ = folder
    small = pcx.load(place / "photos-condensed.safetensors")
    PcxForImageClassification(small).save_pretrained(place / "hub")
    pipe = transformers.pipeline("image-classification", model=str(place / "hub"))
    expected = pcx.predict(small, place / "photos" / "dog", top=2)
    for said, p in zip(pipe([p.source for p in expected]), expected, strict=True):
        assert [row["label"] for row in said] == p.names
        assert [row["score"] for row in said] == pytest.approx(p.probabilities, abs=1e-4)


@pytest.mark.slow
def test_a_package_of_aotinductor_agrees(folder):
    place, _ = folder
    small = pcx.load(place / "photos-condensed.safetensors")
    pcx.export(small, place / "photos.pt2", format="aoti")
    run = torch._inductor.aoti_load_package(str(place / "photos.pt2"))
    expected = pcx.predict(small, place / "photos" / "cat", top=None)
    images = torch.stack([small.transform()(Image.open(p.source)) for p in expected])
    with torch.no_grad():
        found = run(images).softmax(-1)
    for row, p in zip(found, expected, strict=True):
        assert [float(row[i]) for i in p.labels] == pytest.approx(p.probabilities, abs=1e-4)
