"""Shared small things: a tiny backbone and loaders over made-up images."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from families import randomise
from torch.utils.data import DataLoader, TensorDataset

from pcx.models.vpt import block

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def device_of_the_test(request, monkeypatch):
    """Training runs on the CPU, bitwise repeatable, where the test is not one of the GPU's."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def blocks_compute_as_large_ones():
    """Small models of the tests fold prompts and leave tokens out, which does not pay for them."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo those of its own
        patch.setattr(block, "WORTH", {})
        patch.setattr(block, "AMONG", {})
        yield


@pytest.fixture
def backbone():
    """A random ViT of 2 blocks, width 24, on 32x32 images, with 3 classes, float64."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).double()
    randomise(model)
    return model.eval()


@pytest.fixture
def dataset():
    """10 made-up images of 3 classes that a model can learn, float64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10) % 3
    images = torch.randn(10, 3, 32, 32, generator=generator, dtype=torch.float64)
    return TensorDataset(images + labels[:, None, None, None], labels)


@pytest.fixture
def loader(dataset):
    return DataLoader(dataset, batch_size=4, shuffle=True)
