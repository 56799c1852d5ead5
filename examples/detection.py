"""Detection: prompts in the windows of a ViTDet, whose maps torchvision's RetinaNet reads.

A ViTDet attends within windows in most blocks. `features` gives the map behind its last block, in
which no prompt is; a pyramid of three scales is made from it (Li et al. 2022, Sec. 3). Prompts and
detector are trained, the transformer is frozen. Here it is small and random, and finds a disc.

    python examples/detection.py --epochs 3
"""

import argparse

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import pcx
from pcx.tasks.render import SHAPES, Objects, render

SIZE, CHANNELS = 128, 32


class Pyramid(nn.Module):
    """Maps of strides 8, 16 and 32 out of one of stride 16."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.out_channels = model, CHANNELS
        width = model.features(torch.zeros(1, 3, SIZE, SIZE), [-1])[0].shape[1]
        self.up = nn.ConvTranspose2d(width, CHANNELS, 2, stride=2)
        self.same = nn.Conv2d(width, CHANNELS, 1)
        self.down = nn.Conv2d(width, CHANNELS, 2, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        (tokens,) = self.model.features(x, [-1])
        return {"8": self.up(tokens), "16": self.same(tokens), "32": self.down(tokens)}


def discs(count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of a white disc, and its box and label as torchvision takes them."""
    place, radius = torch.rand(2, count, 1) * 0.5 + 0.25, torch.rand(count, 1) * 0.1 + 0.1
    shape, angle = torch.full((count, 1), SHAPES.index("disc")), torch.zeros(count, 1)
    drawn = Objects(shape, *place, radius, angle, torch.ones(count, 1, 3), shape == shape)
    boxes = SIZE * torch.cat([*(place - radius), *(place + radius)], 1)
    label = torch.zeros(1, dtype=torch.int64)
    targets = [{"boxes": box[None], "labels": label} for box in boxes]
    return render(drawn, torch.zeros(1, 3, 1, 1), SIZE) / 255, targets


def main(epochs: int) -> None:
    torch.manual_seed(0)
    # In real use: timm.create_model("samvit_base_patch16.sa1b", pretrained=True)
    vitdet = timm.create_model(
        "samvit_base_patch16", img_size=SIZE, embed_dim=48, depth=4, num_heads=4, window_size=4,
        global_attn_indexes=(3,), num_classes=0,
    )  # fmt: skip
    model = pcx.VPT(vitdet, num_prompts=4)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    size = {"min_size": SIZE, "max_size": SIZE}
    detector = RetinaNet(Pyramid(model), 1, anchor_generator=anchors, **size)
    before = [p.clone() for p in model.prompts]
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    detector.train()
    for epoch in range(epochs):
        for _ in range(20):
            loss = sum(detector(*discs(8)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    moved = all(not torch.equal(a, b) for a, b in zip(before, model.prompts, strict=True))
    print(f"prompts of all {len(before)} blocks were trained: {moved}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
