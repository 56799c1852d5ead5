"""Every example runs as it stands, in few lines, and prints what its docstring says."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTS = {
    "vpt": (r"VPT-Deep: [\d.]+% of 1397 test images", r"linear probe: [\d.]+%"),
    "condense": (r"prompts kept of each layer: \[", r"all prompts: .* 120 ", r"30% .* 36 prompts"),
    "lora": (r"LoRA: [\d.]+%, 19402 trained", r"the logits are equal"),
    "below_plain": (
        r"VPT: .*0.9. of the backbone",
        r"30% of its prompts: ",
        r"and pruned: .* 0.6. of",
    ),
    "prune": (r"all tokens: ", r"pruned: ", r"patches left of 64: \[52, 37\]", r"removed: "),
    "lightning_module": (r"Lightning: [\d.]+%, 6730 trained", r"loaded by pcx: [\d.]+%"),
    "segmentation": (
        r"masks \[200, 64, 64\], 9 classes",
        r"VPT-Deep: mIoU [\d.]+% on 1000 test images",
        r"decoder alone: mIoU [\d.]+%",
        r"features: \[\[2, 96, 8, 8\], \[2, 96, 8, 8\]\]",
    ),
    "detection": (r"epoch 1: loss \d\.\d+", r"prompts of all 4 blocks were trained: True"),
    "serve": (r"image 3: class \d with probability [01]\.\d\d", r"[\d.]+ ms per image, batch 16"),
    "prefix_attention": (r"of the outputs: \S+", r"of the gradients: \S+"),
}


def test_every_example_is_listed_and_short():
    files = {file.stem: file for file in EXAMPLES.glob("*.py")}
    assert set(files) == set(PRINTS)
    for file in files.values():
        assert len(file.read_text().splitlines()) < 80, file.name


@pytest.fixture(scope="module")
def output():
    """What an example prints, in one epoch where it trains."""

    def run(name: str) -> str:
        short = [] if name == "prefix_attention" else ["--epochs", "1"]
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *short]
        done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTS)
def test_example_prints_what_it_says(name, output):
    if name == "lightning_module" and find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    said = output(name)
    for pattern in PRINTS[name]:
        assert re.search(pattern, said), said
    if name == "prefix_attention":
        assert all(float(number) < 1e-10 for number in re.findall(r": (\S+)", said))
    if name == "lightning_module":
        trained, loaded = re.findall(r": ([\d.]+)%", said)
        assert trained == loaded
    if name == "prune":
        whole, pruned, removed = (float(n) for n in re.findall(r"([\d.]+) million", said))
        assert pruned < whole == removed
