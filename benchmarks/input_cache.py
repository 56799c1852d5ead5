"""Reads photos with and without a cache: `python benchmarks/input_cache.py` writes a CSV.

`results/input_cache_cpu.csv` has images a second through a DataLoader, its workers' start included.

- plain: every image is decoded, resized and transformed;
- filling: the first pass with a cache, which also writes;
- cached: the passes after it.

The photos are JPEGs of 500 x 375 that the script draws. What both forms give is compared bit for
bit before anything is timed. The files are in the operating system's memory.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from pathlib import Path

import PIL
import timm
import torch
import torchvision
from machine import cpu_name
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from pcx.tasks import FileImages, cached

FILE = Path(__file__).parent / "results" / "input_cache_cpu.csv"
IMAGES, BATCH, PASSES, WORKERS = 1000, 64, 5, (1, 2)
SIZE, SIDE = (500, 375), 224
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BICUBIC = transforms.InterpolationMode.BICUBIC
TENSOR = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
TRANSFORMS = {
    "resize (VTAB-1k)": transforms.Compose([transforms.Resize((SIDE, SIDE), BICUBIC), *TENSOR]),
    "resize, centre crop (timm)": create_transform(
        SIDE, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.9
    ),
    "resize, random crop, flip (FGVC)": transforms.Compose(
        [
            transforms.Resize(256, BICUBIC),
            transforms.RandomCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            *TENSOR,
        ]
    ),
}


def photos(folder: Path) -> list[tuple[Path, int]]:
    """JPEGs of about 36 kB: coloured noise at three scales."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(IMAGES):
        pixels: Tensor = torch.zeros(1, 3, SIZE[1], SIZE[0])
        for side, weight in ((4, 0.6), (24, 0.3), (160, 0.1)):
            noise = torch.rand(1, 3, side, side, generator=generator)
            pixels += weight * torch.nn.functional.interpolate(
                noise, (SIZE[1], SIZE[0]), mode="bilinear"
            )
        image = pixels[0].permute(1, 2, 0).mul(255).byte().numpy()
        samples.append((folder / f"{i:06d}.jpg", i % 10))
        Image.fromarray(image).save(samples[-1][0], quality=90)
    return samples


def check(plain: FileImages, dataset) -> None:
    for _ in range(2):  # from the files, and from the cache
        for i in range(20):
            torch.manual_seed(i)
            expected, label = plain[i]
            torch.manual_seed(i)
            found = dataset[i]
            assert torch.equal(found[0], expected)
            assert found[1] == label


def rate(dataset, workers: int) -> float:
    """Images a second of one pass."""
    start, images = time.perf_counter(), 0
    for batch, _ in DataLoader(dataset, BATCH, shuffle=True, num_workers=workers):
        images += len(batch)
    return images / (time.perf_counter() - start)


def rows(name: str, samples: list, folder: Path) -> list[dict]:
    plain = FileImages(samples, TRANSFORMS[name])
    check(plain, cached(plain, folder / "checked"))
    table = []
    for workers in WORKERS:
        dataset = cached(plain, folder / f"{workers} workers")
        found = {"filling": [rate(dataset, workers)], "plain": [], "cached": []}
        for _ in range(PASSES):
            found["plain"].append(rate(plain, workers))
            found["cached"].append(rate(dataset, workers))
        kept = sum(f.stat().st_blocks * 512 for f in (folder / f"{workers} workers").iterdir())
        for form in ("plain", "filling", "cached"):
            rates = sorted(found[form])
            table.append(
                {
                    "transform": name,
                    "form": form,
                    "workers": workers,
                    "images": len(samples),
                    "images_per_s_median": round(statistics.median(rates)),
                    "images_per_s_lowest": round(rates[0]),
                    "images_per_s_highest": round(rates[-1]),
                    "kept_kb_per_image": round(kept / len(samples) / 1000),
                }
            )
    return table


def main() -> None:
    torch.set_num_threads(1)
    facts = {
        "machine": cpu_name(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }
    table = []
    with tempfile.TemporaryDirectory() as folder:
        samples = photos(Path(folder))
        size = sum(file.stat().st_size for file, _ in samples) / len(samples) / 1000
        print(f"{len(samples)} photos of {size:.0f} kB")
        for number, name in enumerate(TRANSFORMS):
            table += [
                {**row, "jpeg_kb": round(size), **facts}
                for row in rows(name, samples, Path(folder) / str(number))
            ]
    with open(FILE, "w", newline="") as output:
        writer = csv.DictWriter(output, table[0])
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        name, form, rates = row["transform"], row["form"], row["images_per_s_median"]
        print(f"{name:34} {row['workers']} workers {form:8} {rates:6} images/s")


if __name__ == "__main__":
    main()
