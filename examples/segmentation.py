"""Segmentation: a class for every pixel, by prompts and SETR's decoder on a frozen backbone.

The embedded backbone learns to mark shapes in rendered scenes. The last line trains the decoder
alone, just as long. The features of the blocks are maps that any other decoder can read.

    python examples/segmentation.py --epochs 20
"""

import argparse

import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


def main(epochs: int) -> None:
    # In real use:
    # backbone = timm.create_model("vit_base_patch16_384", pretrained=True)
    plain = scenes_vit()
    task = load_task("masks", data_config(plain))
    train, test = task.loader("trainval", 32), task.loader("test", 200)
    images, masks = next(iter(test))
    print(f"images {list(images.shape)}, masks {list(masks.shape)}, {task.num_classes} classes")

    torch.manual_seed(0)
    backbone = pcx.SETR(plain, task.num_classes)
    prompted, decoder_alone = pcx.VPT(backbone, num_prompts=10), pcx.Linear(backbone)
    for name, model in (("VPT-Deep", prompted), ("decoder alone", decoder_alone)):
        pcx.fit(
            model, train, objective="segmentation", epochs=epochs, lr=0.003, opt="adamw",
            clip_grad=1.0, progress=False,
        )  # fmt: skip
        found = pcx.evaluate(model, test, objective="segmentation")
        print(f"{name}: mIoU {found['mean_iou']:.1f}% on {found['samples']} test images")

    maps = prompted.features(images[:2], layers=[1, -1])
    print("features:", [list(each.shape) for each in maps])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    main(parser.parse_args().epochs)
