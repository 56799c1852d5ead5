"""Visual Prompt Tuning: prompts and a head are trained, the backbone is not touched.

The embedded backbone learns to read scikit-learn's scanned digits. The last line compares VPT with
a linear probe that is trained just as long.

    python examples/vpt.py --epochs 5
"""

import argparse

import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


def main(epochs: int) -> None:
    torch.manual_seed(0)
    # In real use:
    # backbone = timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True)
    backbone = scenes_vit()
    task = load_task("digits", data_config(backbone))
    train, test = task.loader("trainval", 32), task.loader("test", 256)

    # The small backbone needs clipped gradients and timm's start of the head.
    shared = {"num_classes": task.num_classes, "head_init": "keep"}
    prompted = pcx.VPT(backbone, num_prompts=10, **shared)
    probe = pcx.Linear(backbone, **shared)
    settings = {"epochs": epochs, "opt": "sgd", "clip_grad": 1.0, "progress": False}
    pcx.fit(prompted, train, lr=0.3, **settings)
    pcx.fit(probe, train, lr=0.3, **settings)

    for name, model in (("VPT-Deep", prompted), ("linear probe", probe)):
        trained = sum(p.numel() for p in model.trainable().values())
        found = pcx.evaluate(model, test)
        print(f"{name}: {found['accuracy']:.1f}% of {found['samples']} test images, "
              f"{trained} trained parameters")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
