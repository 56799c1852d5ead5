"""Objectives other than one class per image: losses, metrics, and what targets may be."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.training import OBJECTIVES
from pcx.training.objectives import SingleLabel, objective_for


def targets(name, labels):
    one_hot = F.one_hot(labels, 3)
    return {
        "single-label": labels,
        "multi-label": (one_hot + one_hot.roll(1, 0)).clamp(max=1),
        "soft": (one_hot.double() + 0.1) / 1.3,
        "regression": one_hot.double() * 2 - 0.5,
        "segmentation": labels[:, None, None].expand(-1, 2, 2).contiguous(),
    }[name]


METRICS = {
    "single-label": {"accuracy"},
    "multi-label": {"mean_average_precision"},
    "soft": {"accuracy"},
    "regression": {"mean_absolute_error", "r2"},
    "segmentation": {"mean_iou"},
}


class PerPixel(nn.Module):
    """Logits of four pixels in place of one image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[:, :, None, None].expand(-1, -1, 2, 2)


def test_every_objective_is_tested_here():
    assert set(METRICS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", METRICS)
def test_each_objective_trains_and_is_measured(backbone, dataset, name):
    images, labels = dataset.tensors
    loader = DataLoader(TensorDataset(images, targets(name, labels)), batch_size=4)
    model = pcx.VPT(backbone, 2, head_init="keep")
    trained = PerPixel(model) if name == "segmentation" else model
    before = pcx.evaluate(trained, loader, objective=name)
    assert set(before) == METRICS[name] | {"loss", "samples"}
    rows = pcx.fit(
        trained,
        loader,
        epochs=12,
        lr=0.05,
        clip_grad=1.0,
        objective=name,
        val_loader=loader,
        progress=False,
    )
    after = pcx.evaluate(trained, loader, objective=name)
    assert after["loss"] < before["loss"]
    assert after["samples"] == 10
    assert rows[-1]["val_loss"] == pytest.approx(after["loss"], rel=1e-9)
    for metric in METRICS[name]:
        assert rows[-1][f"val_{metric}"] == pytest.approx(after[metric], rel=1e-9)
        assert metric in rows[0]
    first = next(iter(METRICS[name] - {"mean_absolute_error"}))
    assert after[first] > before[first]


def test_losses_and_metrics_are_what_libraries_say():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    several = targets("multi-label", labels)
    found = objective_for("multi-label").losses(logits, several)
    expected = F.binary_cross_entropy_with_logits(logits, several.double(), reduction="none")
    torch.testing.assert_close(found, expected.mean(1))
    metric = objective_for("multi-label").metrics()
    metric.update(logits, several > 0)
    from sklearn.metrics import average_precision_score, r2_score

    precision = average_precision_score(several.numpy(), logits.numpy())
    assert metric.compute()["mean_average_precision"] == pytest.approx(100 * precision, rel=1e-5)

    wanted = targets("regression", labels)
    errors = objective_for("regression")
    measured = errors.metrics()
    measured.update(*errors.observed(logits, wanted))
    assert measured.compute()["r2"] == pytest.approx(r2_score(wanted, logits), rel=1e-9)
    one = objective_for("regression").losses(logits[:, :1], wanted[:, 0])
    torch.testing.assert_close(one, (logits[:, 0] - wanted[:, 0]).square())

    pixels = torch.randn(2, 3, 4, 4, generator=generator)
    mask = torch.randint(3, (2, 4, 4), generator=generator)
    mask[0, 0] = 255
    dense = objective_for("segmentation")
    expected = [
        F.cross_entropy(p[None], m[None], ignore_index=255)
        for p, m in zip(pixels, mask, strict=False)
    ]
    torch.testing.assert_close(dense.losses(pixels, mask), torch.stack(expected))
    iou = dense.metrics()
    iou.update(*dense.observed(pixels, mask))
    seen, classes = pixels.argmax(1)[mask != 255], mask[mask != 255]
    shares = [
        ((seen == c) & (classes == c)).sum() / ((seen == c) | (classes == c)).sum()
        for c in range(3)
    ]
    assert iou.compute()["mean_iou"] == pytest.approx(float(100 * torch.stack(shares).mean()))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("single-label", torch.zeros(4, 3), r"expected one class per image, integers \[B\]"),
        ("single-label", torch.tensor([0, 1, 2, 3]), r"labels 0\.\.3 for a head of 3 classes"),
        ("multi-label", torch.zeros(4, dtype=torch.int64), "expected 0 or 1 for each class"),
        ("multi-label", torch.full((4, 3), 2), r"labels 2\.\.2, expected 0 or 1"),
        ("soft", torch.zeros(4, 3, dtype=torch.int64), "expected a probability for each class"),
        ("regression", torch.zeros(4), r"expected numbers \[B\] or \[B, K\]"),
        ("segmentation", torch.zeros(4, 2, 2), "expected a class per pixel"),
    ],
)
def test_targets_that_do_not_fit_are_named(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        objective_for(name).losses(torch.zeros(4, 3), wrong)


def test_what_is_no_objective_is_named(backbone, loader):
    model = pcx.VPT(backbone, 1)
    with pytest.raises(ValueError, match=r"got 'multilabel'.*Did you mean 'multi-label'"):
        pcx.evaluate(model, loader, objective="multilabel")
    with pytest.raises(ValueError, match="criterion: the objective has its own"):
        pcx.fit(model, loader, epochs=1, lr=0.1, objective=SingleLabel(), criterion=F.cross_entropy)


def test_scores_are_of_the_objectives_loss(backbone, dataset):
    images, labels = dataset.tensors
    loader = DataLoader(TensorDataset(images, targets("soft", labels)), batch_size=4)
    model = pcx.VPT(backbone, 2, head_init="keep").eval()
    found = pcx.score(model, loader, objective="soft", progress=False)
    by_sample = []
    for x, y in zip(images, targets("soft", labels), strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.prompts))
        by_sample.append([(g * p).norm(dim=1) for g, p in zip(grads, model.prompts, strict=False)])
    for layer, scores in enumerate(found):
        mean = torch.stack([rows[layer] for rows in by_sample]).mean(0)
        torch.testing.assert_close(scores, mean.detach(), rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:model. mean and std")
def test_outputs_of_libraries_are_unwrapped(dataset):
    class Pair(timm.models.VisionTransformer):
        def forward(self, x):
            features = self.forward_features(x)
            return self.forward_head(features), features

    class Dict(timm.models.VisionTransformer):
        def forward(self, x):
            return {"logits": super().forward(x)}

    class Odd(timm.models.VisionTransformer):
        def forward(self, x):
            return {"scores": super().forward(x)}

    loader = DataLoader(dataset, batch_size=4)
    for kind in (Pair, Dict):
        model = kind(img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3).double()
        assert pcx.evaluate(model, loader)["samples"] == 10
        tuned = pcx.VPT(model, 2)
        assert pcx.fit(tuned, loader, epochs=1, lr=0.01, warmup_epochs=0, progress=False)
    odd = Odd(img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3).double()
    with pytest.raises(TypeError, match=r"model: its forward gave a dict of \['scores'\]"):
        pcx.evaluate(odd, loader)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("soft", torch.full((4, 3), 0.5), "sum to 1.5..1.5 an image, expected 0 or more"),
        ("soft", torch.tensor([[-0.5, 1.0, 0.5]]).expand(4, -1), "soft labels from -0.5"),
        ("soft", torch.full((4, 3), float("nan")), "soft labels from nan"),
        ("segmentation", torch.full((4, 2, 2), 3), "classes 3..3 for a head of 3 classes"),
        ("segmentation", torch.full((4, 2, 2), -1), "classes -1..-1 for a head of 3 classes"),
        ("segmentation", torch.full((4, 2, 2), -1, dtype=torch.int8), "classes -1..-1"),
    ],
)
def test_values_of_targets_are_checked(name, wrong, message):
    logits = torch.zeros(4, 3, 2, 2) if name == "segmentation" else torch.zeros(4, 3)
    with pytest.raises(ValueError, match=f"loader: .*{message}"):
        objective_for(name).losses(logits, wrong)


def test_logits_without_classes_are_named():
    with pytest.raises(ValueError, match=r"model: it gives \(4,\), expected logits \[B, C\]"):
        SingleLabel().losses(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
