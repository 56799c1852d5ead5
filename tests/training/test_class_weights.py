"""Weights of classes, and labels that are counted without reading an image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import pcx
from pcx.tasks import FileImages
from pcx.training.class_weights import ClassWeights, balanced_weights, labels_in
from pcx.training.objectives import SingleLabel

QUIET = {"progress": False}


def test_a_samples_loss_is_its_classes_weight_times_the_cross_entropy():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 1, 2, 2, 1, 0]), [0.5, 2.0, 0.0]
    found = SingleLabel(class_weights=weights).losses(logits, labels)
    plain = SingleLabel().losses(logits, labels)
    torch.testing.assert_close(found, plain * torch.tensor(weights)[labels])
    # torch's mean divides by the sum of the weights, ours by the number of samples.
    whole = F.cross_entropy(logits, labels, weight=torch.tensor(weights))
    torch.testing.assert_close(found.sum() / torch.tensor(weights)[labels].sum(), whole)
    assert not torch.isclose(found.mean(), whole)


def test_weights_are_where_the_logits_are():
    weights = ClassWeights([1, 2, 3])
    with torch.inference_mode():
        first = weights.beside(torch.zeros(2, 3))
    assert weights.beside(torch.zeros(4, 3)) is first
    assert not first.is_inference()
    assert weights.beside(torch.zeros(4, 3, device="meta")).device.type == "meta"
    assert weights.beside(torch.zeros(4, 3, dtype=torch.float64)).dtype == torch.float64


def test_training_with_weights_is_training_with_such_a_criterion(backbone, loader, tmp_path):
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    rows = []
    for arguments in (
        {"objective": SingleLabel(class_weights=weights)},
        {"criterion": lambda x, y: F.cross_entropy(x, y, reduction="none") * weights[y]},
        {},
    ):
        torch.manual_seed(0)
        model = pcx.VPT(backbone, 2)
        arguments = {"epochs": 2, "lr": 0.1, "val_loader": loader, **arguments}
        rows.append(pcx.fit(model, loader, **arguments, **QUIET))
    assert rows[0][-1]["loss"] == pytest.approx(rows[1][-1]["loss"])
    assert rows[0][-1]["val_loss"] == pytest.approx(rows[1][-1]["val_loss"])
    assert rows[0][-1]["loss"] != pytest.approx(rows[2][-1]["loss"])


def test_a_run_with_other_weights_is_not_resumed(backbone, loader, tmp_path):
    def run(weights, **more):
        objective = SingleLabel(class_weights=weights)
        model = pcx.VPT(backbone, 2)
        arguments = {"epochs": 1, "lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
        pcx.fit(model, loader, objective=objective, **arguments, **more)
        return model

    assert "class weights 1, 2, 0.5" in run([1, 2, 0.5]).record.recipe["criterion"]
    assert "class weights 1, 2, 0.5" in (tmp_path / "config.json").read_text()
    run([1, 2, 0.5], resume=True)
    for other in ([1, 2, 0.25], None):
        with pytest.raises(ValueError, match=r"resume: .*class weights 1, 2, 0.5"):
            run(other, resume=True)
    many = [1.0] * 1000
    assert str(ClassWeights(many)) != str(ClassWeights([*many[1:], 1.5]))
    assert len(str(ClassWeights(many))) < 120


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1, 1], r"class_weights\[1\]: got -1"),
        ([1, float("nan"), 1], r"class_weights\[1\]: got nan"),
        ([1, 1, float("inf")], r"class_weights\[2\]: got inf"),
        ([0, 0, 0], r"class_weights: got \[0.0, 0.0, 0.0\], expected .* not all 0"),
        ([], r"class_weights: got \[\]"),
        (3.0, "class_weights: got 3.0, expected a number for each class"),
        ("balanced", "class_weights: got 'balanced'"),
        ([1, "x", 1], r"class_weights\[1\]: got 'x'"),
        ([1, 2], "class_weights: 2 weights for a head of 3 classes"),
        ([1, 2, 3, 4], "class_weights: 4 weights for a head of 3 classes"),
    ],
)
def test_bad_weights_are_named(backbone, loader, weights, message):
    with pytest.raises(ValueError, match=message):
        pcx.evaluate(pcx.VPT(backbone, 1), loader, objective=SingleLabel(class_weights=weights))


def test_a_criterion_weighs_by_itself():
    with pytest.raises(ValueError, match="class_weights: the criterion has its own"):
        SingleLabel(F.cross_entropy, class_weights=[1, 2])


def test_balanced_weights_are_scikit_learns():
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 0, 1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    found = balanced_weights(labels, 3)
    assert found == pytest.approx(expected.tolist())
    assert torch.tensor(found)[labels].mean() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"class_weights: .* each of the 4 .* \[4, 2, 2, 0\]"):
        balanced_weights(labels, 4)


class Columns:
    """A data set of Hugging Face's, whose images must not be read."""

    def __init__(self, labels):
        self.column_names, self._labels = ["image", "label"], labels

    def __getitem__(self, key):
        assert key == "label"
        return self._labels


def test_labels_are_read_without_images(tmp_path):
    samples = [(tmp_path / f"{i}.png", i % 3) for i in range(6)]  # there is no such file
    files = FileImages(samples, transform=None)
    expected = [0, 1, 2, 0, 1, 2]
    assert labels_in(files).tolist() == expected
    assert labels_in(Subset(files, [2, 0, 4])).tolist() == [2, 0, 1]
    assert labels_in(ConcatDataset([files, Subset(files, [5])])).tolist() == [*expected, 2]
    assert labels_in(TensorDataset(torch.zeros(2, 3), torch.tensor([1, 0]))).tolist() == [1, 0]
    assert labels_in(Columns([1, 1, 0])).tolist() == [1, 1, 0]

    class Unlisted(Dataset):
        def __getitem__(self, i):
            raise AssertionError("an image is read")

    with pytest.raises(ValueError, match="class_weights: a Unlisted does not list its labels"):
        labels_in(Unlisted())


def test_the_k_highest(backbone, dataset):
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 2, 1]])
    objective, labels = SingleLabel(top=2), torch.tensor([0, 0, 1, 3])
    metrics = objective.metrics()
    assert metrics.compute() == {}
    for rows in (slice(0, 3), slice(3, 4)):
        metrics.update(*objective.observed(logits[rows], labels[rows]))
    assert metrics.compute() == {"accuracy": 25.0, "accuracy_top2": 50.0}
    loader = DataLoader(dataset, batch_size=4)
    history = pcx.fit(
        pcx.VPT(backbone, 2), loader, epochs=1, lr=0.1, val_loader=loader, objective=objective,
        best="val_accuracy_top2", **QUIET,
    )  # fmt: skip
    assert {"accuracy", "accuracy_top2", "val_accuracy_top2"} <= set(history[0])
    assert history[0]["val_accuracy_top2"] >= history[0]["val_accuracy"]
    with pytest.raises(ValueError, match="top: 3, expected less than the head's 3 classes"):
        pcx.evaluate(pcx.VPT(backbone, 2), loader, objective=SingleLabel(top=3))
    with pytest.raises(ValueError, match="top: 1"):
        SingleLabel(top=1)
