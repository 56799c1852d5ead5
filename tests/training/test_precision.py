"""Weights that are cast once, as autocast would in every call."""

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

from pcx.training.precision import cast_weights, weights_cast


def test_what_computes_with_its_weight_first_is_left_to_autocast():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3), StdConv2d(8, 8, 3)
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        before = cast_weights(model, torch.bfloat16)
        assert [name for _, name, _ in before] == ["weight", "bias"] * 2
        assert model[1].weight.dtype == torch.float32
        assert torch.equal(model(images), expected)


def test_nothing_is_replaced_unless_all_can_be(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    weights = list(model.parameters())
    casts = []

    def full(*arguments, **options):
        casts.append(arguments)
        if len(casts) == 3:
            raise torch.OutOfMemoryError
        return torch.Tensor.to(*arguments, **options)

    monkeypatch.setattr(nn.Parameter, "to", full)
    with pytest.raises(torch.OutOfMemoryError), weights_cast(model, torch.bfloat16):
        raise AssertionError("not reached")
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
