"""LoRA by peft, trained, saved and loaded by pcx.

peft puts the adapters into the backbone. pcx trains any model of peft, saves its adapters and its
head in one file, and puts them back onto the backbone.

    python examples/lora.py --epochs 3
"""

import argparse
import tempfile
from pathlib import Path

import peft
import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


def main(epochs: int) -> None:
    torch.manual_seed(0)
    # In real use:
    # backbone = timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True,
    #                              num_classes=10)
    backbone = scenes_vit(num_classes=10)
    task = load_task("digits", data_config(backbone))
    train, test = task.loader("trainval", 32), task.loader("test", 256)

    config = peft.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
    model = pcx.PeftModel(peft.get_peft_model(backbone, config))
    pcx.fit(model, train, epochs=epochs, lr=0.1, opt="sgd", clip_grad=1.0, progress=False)
    trained = sum(p.numel() for p in model.trainable().values())
    print(f"LoRA: {pcx.evaluate(model, test)['accuracy']:.1f}%, {trained} trained parameters")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.safetensors"
        pcx.save(model, file)
        again = pcx.load(file, scenes_vit())
        size = file.stat().st_size
    images = next(iter(test))[0]
    with torch.no_grad():
        same = torch.equal(again(images), model.eval()(images))
    print(
        f"loaded from a file of {size // 1024} KiB: the logits are {'equal' if same else 'other'}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
