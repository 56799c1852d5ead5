"""Below the cost of the plain backbone: VPT, its prompts condensed, tokens pruned, then frozen.

Each step prints its accuracy, its multiply-adds and its time, both against the backbone as it is.
On a backbone this small, choosing tokens takes about as long as it saves; docs/performance.md has
the times of a ViT-B/16.

    python examples/below_plain.py --epochs 8
"""

import argparse
import statistics
import time

import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


@torch.no_grad()
def milliseconds(models: dict, images: torch.Tensor) -> dict[str, float]:
    """Of a batch; the models take turns, so that a busy machine slows all of them."""
    times = {name: [] for name in models}
    for _ in range(12):
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def main(epochs: int) -> None:
    torch.manual_seed(0)
    # In real use:
    # backbone = timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True)
    backbone = scenes_vit().eval()
    task = load_task("digits", data_config(backbone))
    train, test = task.loader("trainval", 32), task.loader("test", 256)
    settings = {"opt": "sgd", "clip_grad": 1.0, "progress": False}

    model = pcx.VPT(backbone, num_prompts=20, num_classes=task.num_classes, head_init="keep")
    pcx.fit(model, train, epochs=epochs, lr=0.3, **settings)
    small = pcx.condense(model, train, 0.3, epochs=max(1, epochs // 4), **settings)
    pruned = small.copy()
    pcx.zero_tprune(pruned, layers=(2, 4), keep=0.7, iters=(5, 5), similar=2)
    pcx.fit(pruned, train, epochs=max(1, epochs // 4), lr=0.1, warmup_epochs=0, **settings)

    models = {"VPT": model, "30% of its prompts": small, "and pruned": pruned}
    frozen = {name: pcx.freeze(each) for name, each in models.items()}
    images = next(iter(test))[0][:64]
    times = milliseconds({"backbone": backbone, **frozen}, images)
    whole = pcx.multiply_adds(backbone)
    for name, each in models.items():
        accuracy = pcx.evaluate(each, test)["accuracy"]
        work, took = pcx.multiply_adds(each) / whole, times[name] / times["backbone"]
        print(f"{name}: {accuracy:.1f}%, {work:.2f} of the backbone's multiply-adds, "
              f"{took:.2f} of its time")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    main(parser.parse_args().epochs)
