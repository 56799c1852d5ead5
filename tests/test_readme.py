"""What README.md shows runs: its code, its commands, its links."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from pcx.backbones import scenes_vit
from pcx.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_a_screen_and_a_bit():
    assert len(README.splitlines()) <= 80


def test_its_code_runs(tmp_path, monkeypatch):
    """With the embedded backbone, small images and one epoch in place of a download and 100."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 1
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(8)), batch_size=4)
    named = []

    def create_model(name, pretrained, num_classes):
        named.append(name)
        return scenes_vit(num_classes)

    code = blocks[0].replace("epochs=100", "epochs=1")
    code = code.replace("num_prompts=200", "num_prompts=4").replace("lr=0.1", "lr=0.001")
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    names = {"train_loader": loader}
    exec(code, names)
    assert timm.is_model(named[0])
    assert sum(names["small"].counts) == 7  # 30% of 24
    assert (tmp_path / "cars.safetensors").is_file()


def test_its_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake (\w[\w-]*)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`pcx ([a-z]+)", README))))
def test_its_commands_answer_help(command):
    found = CliRunner().invoke(app, [command, "--help"])
    assert found.exit_code == 0, found.output


def test_its_scripts_and_links_are_there():
    scripts = re.findall(r"python ([\w/]+\.py)", README)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", README)]
    assert scripts
    assert links
    for path in (*scripts, *links):
        assert (ROOT / path).exists(), path
