"""Token pruning: a trained VPT drops image tokens, without training (Zero-TPrune).

Accuracy and multiply-adds per image are printed before, with tokens dropped, and after `remove`.

    python examples/prune.py --epochs 4
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
    model = pcx.VPT(backbone, num_prompts=10, num_classes=task.num_classes, head_init="keep")
    pcx.fit(model, train, epochs=epochs, lr=0.3, opt="sgd", clip_grad=1.0, progress=False)

    def report(name: str) -> None:
        found = pcx.evaluate(model, test)
        millions = pcx.multiply_adds(model.eval()) / 1e6
        print(f"{name}: {found['accuracy']:.1f}%, {millions:.1f} million multiply-adds per image")

    report("all tokens")
    # After layers 3 and 5 of six, 80% and then 70% of the patches stay.
    pruning = pcx.zero_tprune(model, layers=(3, 5), keep=(0.8, 0.7), iters=(5, 1))
    report("pruned")
    print(f"patches left of 64: {[kept.shape[1] for kept in pruning.kept]}")
    pruning.remove()
    report("removed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
