"""What users write by hand: a concatenating VPT on timm, a training loop, and ways to time calls.

It imports torch and timm alone, so that the benchmarks of other libraries can use it too.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpu_timing import table

RESULTS = Path(__file__).parent.parent / "results"
CLASSES, PROMPTS, BATCHES = 100, 100, (1, 8, 64)
VITS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
FIELDS = ["work", "model", "way", "batch", "ms", "images_per_s", "peak_mib", "gpu", "torch", "timm"]


class HandWrittenVPT(nn.Module):
    """VPT-Deep as it is published: prompts among the tokens of every block, dropped behind it."""

    def __init__(self, backbone: nn.Module, prompts: Iterable[Tensor]):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.backbone.head.requires_grad_()
        self.prompts = nn.ParameterList([p.clone() for p in prompts])

    def forward(self, images: Tensor) -> Tensor:
        backbone = self.backbone
        x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
        for block, prompts in zip(backbone.blocks, self.prompts, strict=True):
            among = prompts.expand(len(x), -1, -1)
            x = block(torch.cat([x[:, :1], among, x[:, 1:]], 1))
            x = torch.cat([x[:, :1], x[:, 1 + len(prompts) :]], 1)
        return backbone.forward_head(backbone.norm(x))


def backbone_of(name: str, classes: int = CLASSES, **arguments) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):  # drawing a large model's weights on the CPU takes seconds
        return timm.create_model(name, num_classes=classes, **arguments).cuda().eval()


def per_call(call: Callable[[], object], calls: int, repeats: int = 15) -> float:
    """The median milliseconds of one of several calls in a row, the last one waited for."""
    return in_turns({"": call}, calls, repeats)[""]


def in_turns(
    ways: Mapping[str, Callable[[], object]], calls: int, repeats: int = 15
) -> dict[str, float]:
    """The median milliseconds of a call of each way; ways take turns, as hosts are not quiet."""
    for call in ways.values():
        for _ in range(4):
            call()
    torch.cuda.synchronize()
    times = defaultdict(list)
    for _ in range(repeats):
        for way, call in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            times[way].append(1000 * (time.perf_counter() - start) / calls)
    return {way: statistics.median(found) for way, found in times.items()}


def step_of(model: nn.Module, batch: int, size: int = 224) -> Callable[[], Tensor]:
    """A training step as users write it, on images that lie on the GPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-3, fused=True)
    images = torch.randn(batch, 3, size, size, device="cuda")
    labels = torch.randint(CLASSES, (batch,), device="cuda")
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        logits = getattr(logits, "logits", logits)  # of a Hugging Face model
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def inference_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A call as users write it, with an autocast of its own."""

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        return getattr(logits, "logits", logits)

    return call


class Rows:
    """The rows of this GPU's table, written after each.

    A row takes the place of an older one of the same work, model, way and batch; others stay.

    Args:
        folder: of the table.
        stem: the table is `<stem>_<gpu>.csv`.
    """

    def __init__(self, folder: Path, stem: str = "user_calls"):
        self.file, self.rows = table(folder, stem)
        self.machine = [torch.cuda.get_device_name(), torch.__version__, timm.__version__]

    def add(self, work: str, model: str, way: str, batch: int, ms: float, peak: float) -> None:
        """Adds a row: milliseconds of a call or step of `batch` images, and MiB at the peak."""
        values = [work, model, way, batch, f"{ms:.3f}", f"{1000 * batch / ms:.0f}", f"{peak:.0f}"]
        key = [str(value) for value in values[:4]]
        self.rows = [row for row in self.rows if [row[field] for field in FIELDS[:4]] != key]
        self.rows.append(dict(zip(FIELDS, [*values, *self.machine], strict=True)))
        print(*values, flush=True)
        with self.file.open("w", newline="") as out:
            writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def peak_of(call: Callable[[], object]) -> float:
    """MiB of memory at the peak of a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20
