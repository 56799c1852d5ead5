"""What a model has of its own, copied and compared bit by bit."""

import torch


def weights(model):
    return {n: t.detach().clone() for n, t in model.own_state().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
