"""VPT in a LightningModule: Lightning trains, pcx saves and loads what was trained.

The optimiser gets prompts and head only, without weight decay on the head's bias. The file that
pcx writes holds these alone; Lightning's own checkpoint holds the backbone too.

    python examples/lightning_module.py --epochs 2
"""

import argparse
import tempfile
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task


class Prompted(lightning.LightningModule):
    """A tuned model with its loss, its accuracy and its optimiser."""

    def __init__(self, model: pcx.VPT, lr: float):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def test_step(self, batch: tuple, batch_idx: int) -> None:
        images, labels = batch
        hits = self.model(images).argmax(-1) == labels
        self.log("accuracy", 100 * hits.float().mean(), on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.model.param_groups(weight_decay=1e-3)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)


def main(epochs: int) -> None:
    torch.manual_seed(0)
    # In real use:
    # backbone = timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True)
    backbone = scenes_vit()
    task = load_task("digits", data_config(backbone))
    model = pcx.VPT(backbone, num_prompts=10, num_classes=task.num_classes, head_init="keep")
    module = Prompted(model, lr=0.3)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Lightning trains in the modes that it finds. The frozen backbone stays in eval mode.
    module.train()
    trainer.fit(module, task.loader("trainval", 32))
    test = task.loader("test", 256)
    (found,) = trainer.test(module, test, verbose=False)
    trained = sum(p.numel() for p in model.trainable().values())
    print(f"Lightning: {found['accuracy']:.1f}%, {trained} trained parameters")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.safetensors"
        pcx.save(model, file)
        again = pcx.load(file)
        print(f"loaded by pcx: {pcx.evaluate(again, test)['accuracy']:.1f}%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    main(parser.parse_args().epochs)
