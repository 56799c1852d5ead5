"""Serving: a saved model is loaded, frozen, and asked for classes and probabilities.

`pcx.freeze` makes the prompts' keys and values constants, so that a call computes only the image.

    python examples/serve.py --epochs 3
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


def train(file: Path, epochs: int) -> None:
    """Writes the file that is served below; in real use it is there already."""
    backbone = scenes_vit()
    task = load_task("digits", data_config(backbone))
    model = pcx.VPT(backbone, num_prompts=10, num_classes=task.num_classes, head_init="keep")
    loader = task.loader("trainval", 32)
    pcx.fit(model, loader, epochs=epochs, lr=0.3, opt="sgd", clip_grad=1.0, progress=False)
    pcx.save(model, file)


@torch.no_grad()
def serve(file: Path) -> None:
    # The file names its backbone, so `pcx.load(file)` builds it.
    # In real use: pcx.load("cars.safetensors", timm.create_model(..., pretrained=True))
    model = pcx.load(file)
    frozen = pcx.freeze(model)
    test = load_task("digits", data_config(model)).loader("test", 16)
    images, labels = next(iter(test))
    probabilities = frozen(images).softmax(dim=-1)
    best, classes = probabilities.max(dim=-1)
    for place in range(4):
        print(f"image {place}: class {classes[place]} with probability {best[place]:.2f}, "
              f"label {labels[place]}")  # fmt: skip
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        frozen(images)
        seconds.append(time.perf_counter() - start)
    print(f"{1000 * sorted(seconds)[2] / len(images):.2f} ms per image, batch {len(images)}")


def main(epochs: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.safetensors"
        train(file, epochs)
        serve(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
