"""Prompt Condensation: a trained VPT keeps the 30% of its prompts that matter most.

The prompts are scored by their effect on the loss, the best of all layers are kept, and the rest of
the training budget fine-tunes what is left.

    python examples/condense.py --epochs 4
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
    settings = {"opt": "sgd", "clip_grad": 1.0, "progress": False}

    model = pcx.VPT(backbone, num_prompts=20, num_classes=task.num_classes, head_init="keep")
    pcx.fit(model, train, epochs=epochs, lr=0.3, **settings)

    # The three steps of the paper's Algorithm 1, one by one.
    scores = pcx.score(model, train, progress=False)  # a tensor of each layer, one number a prompt
    kept = pcx.select(scores, 0.3)  # the places of the prompts that stay, of each layer
    print(f"prompts kept of each layer: {[len(layer) for layer in kept]} of {model.counts}")

    # The same in one call, with the scores that are there already.
    small = pcx.condense(model, train, 0.3, scores=scores, epochs=max(1, epochs // 4), **settings)
    for name, each in (("all prompts", model), ("30% of the prompts", small)):
        print(f"{name}: {pcx.evaluate(each, test)['accuracy']:.1f}%, {sum(each.counts)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
