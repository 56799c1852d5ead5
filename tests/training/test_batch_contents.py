"""What came and what was expected: mistakes in loaders, labels and images are named."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import pcx
from pcx.training.class_names import class_names_of

X, Y = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 3


def fit(backbone, loader, **more):
    model = pcx.VPT(backbone, 2)
    pcx.fit(model, loader, epochs=1, lr=0.1, warmup_epochs=0, progress=False, **more)
    return model


def evaluate(backbone, loader):
    return pcx.evaluate(pcx.VPT(backbone, 2), loader)


def score(backbone, loader):
    return pcx.score(pcx.VPT(backbone, 2), loader, progress=False)


@pytest.mark.parametrize("call", [fit, evaluate, score])
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (TensorDataset(X, Y), r"loader: a TensorDataset, .* wrap it in torch\.utils\.data\.Data"),
        ((X, Y), "loader: a single batch, expected a DataLoader"),
        ("photos", "loader: a str, expected a DataLoader"),
        (5, "loader: a int, expected a DataLoader"),
        ([(X[:, :1], Y)], r"loader: .* float64 \[6, 1, 32, 32\], and the backbone expects .*3, 32"),
        ([(X[..., :16], Y)], r"loader: .* they are float64 \[6, 3, 32, 16\]"),
        ([(X[0], Y[:1])], r"loader: .* they are float64 \[3, 32, 32\]"),
        ([(X.float(), Y)], r"loader: .* they are float32 \[6, .* expects float64 \[B, 3, 32, 32\]"),
        (
            [((X * 99).to(torch.uint8), Y)],
            r"loader: the model cannot take .* they are uint8; scale",
        ),
        ([(["a.jpg"] * 6, Y)], r"loader: its images are of type str, expected a tensor"),
        ([(None, Y)], r"loader: its images are of type NoneType, expected a tensor"),
        ([(X, Y.tolist())], "loader: its labels are a list, expected a tensor"),
        ([(X, ["cat"] * 6)], r"loader: its labels are text \('cat'.*set model\.record\.class_na"),
        ([(X, Y, Y)], r"loader: it yields .* of 3, expected \(images, labels\)"),
        ([(X, Y + 1)], r"loader: labels 1\.\.3 for a head of 3 classes"),
        ([(X, Y - 1)], r"loader: labels -1\.\.1 for a head of 3 classes"),
        ([(X, Y[:5])], r"loader: a batch of 6 images has labels of shape \(5,\)"),
        ([(X, torch.rand(6, 3))], r"loader: .*; objective='multi-label' or .*'soft'.* takes them"),
        ([], "loader: it yielded no sample"),
    ],
)
def test_a_mistake_is_named(backbone, call, loader, message):
    with pytest.raises(ValueError, match=message):
        call(backbone, loader)


def broken_images(rows):
    images = X.clone()
    for row, value in rows.items():
        images[row, 1, 2, 3] = value
    return [(images[:4], Y[:4]), (images[4:], Y[4:])]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_named(backbone, value):
    model, loader = pcx.VPT(backbone, 2), broken_images({5: value})
    before = [p.detach().clone() for p in model.parameters()]
    message = "loader: image 1 of the batch has values that are NaN or infinite, in epoch 1, step"
    with pytest.raises(pcx.NonFiniteLoss, match=message):
        pcx.fit(model, loader, epochs=1, lr=0.1, warmup_epochs=0, progress=False)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(pcx.NonFiniteLoss, match=r"image 1 .* in the evaluation, step 2 \(sample 5"):
        pcx.evaluate(model, loader)
    with pytest.raises(ValueError, match="loader: the image of sample 5 is not finite"):
        pcx.score(model, loader, progress=False)


def test_a_loss_that_is_not_finite_for_finite_images_is_the_models(backbone):
    model = pcx.VPT(backbone, 2)
    with torch.no_grad():
        model.heads[0].bias[1] = float("nan")
    with pytest.raises(pcx.NonFiniteLoss, match="nan in the evaluation, step 1"):
        pcx.evaluate(model, [(X, Y)])


def test_a_criterion_may_take_other_labels(backbone):
    def coarse(logits, labels):
        return torch.nn.functional.cross_entropy(
            logits, labels.where(labels == 255, labels // 2), reduction="none", ignore_index=255
        )

    fine = torch.tensor([0, 5, 255, 3, 4, 1])
    fit(backbone, [(X, fine)], criterion=coarse)


def test_a_model_may_take_integers(backbone):
    class Scales(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vpt = pcx.VPT(backbone, 2)

        def forward(self, images):
            return self.vpt(images.double() / 255)

    images = (X * 50).clamp(0, 255).to(torch.uint8)
    assert pcx.evaluate(Scales(), [(images, Y)])["samples"] == 6


class Named(Dataset):
    """Samples whose labels are text, or integers with names beside them."""

    def __init__(self, names, text=False):
        self.classes, self.text = names, text

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i], self.classes[i % 3] if self.text else i % 3


PETS = ["cat", "dog", "owl"]


def test_names_of_classes_are_kept(backbone, tmp_path):
    model = fit(backbone, DataLoader(Named(PETS), batch_size=3))
    assert model.class_names == PETS
    pcx.save(model, tmp_path / "m")
    assert pcx.load(tmp_path / "m", backbone).class_names == PETS
    assert fit(backbone, [(X, Y)]).class_names is None


def test_labels_that_are_text_train_as_their_places_do(backbone):
    torch.manual_seed(0)
    numbers = fit(backbone, DataLoader(Named(PETS), batch_size=3))
    torch.manual_seed(0)
    text = fit(backbone, DataLoader(Named(PETS, text=True), batch_size=3))
    assert all(map(torch.equal, numbers.parameters(), text.parameters()))
    found = [pcx.evaluate(text, [(X, y)]) for y in (Y, [PETS[i] for i in Y])]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="label 'cow' is none of the classes 'cat', 'dog', 'owl'"):
        pcx.evaluate(text, [(X, ["cow"] * 6)])


def test_other_classes_than_the_models_are_refused(backbone):
    model = fit(backbone, DataLoader(Named(PETS), batch_size=3))
    other = DataLoader(Named(["cat", "owl", "dog"]), batch_size=3)
    message = r"loader: its classes are 'cat', 'owl', 'dog', and the model's are .* from label 1 on"
    for call in (pcx.evaluate, lambda m, d: pcx.score(m, d, progress=False)):
        with pytest.raises(ValueError, match=message):
            call(model, other)
    with pytest.raises(ValueError, match=message):
        pcx.fit(model, other, epochs=1, lr=0.1, progress=False)
    with pytest.raises(ValueError, match=r"val_loader: its classes .* and the loader's are"):
        fit(backbone, DataLoader(Named(PETS), batch_size=3), val_loader=other)
    model.record.class_names = None
    pcx.fit(model, other, epochs=1, lr=0.1, progress=False)
    assert model.class_names == ["cat", "owl", "dog"]


def test_names_are_found_in_what_wraps_a_data_set():
    named = Named(PETS)
    for dataset in (named, Subset(named, [0]), ConcatDataset([named, Subset(named, [1])])):
        assert class_names_of(DataLoader(dataset, batch_size=1)) == PETS
    mixed = ConcatDataset([named, Named(["a", "b", "c"])])
    assert class_names_of(DataLoader(mixed, batch_size=1)) is None
    assert class_names_of([(X, Y)]) is None
    named = TensorDataset(X, Y)
    named.class_to_idx = {"b": 0, "a": 1}
    assert class_names_of(DataLoader(named)) == ["b", "a"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "^val_loader: it yielded no sample"),
        ([(X, Y + 1)], r"^val_loader: labels 1\.\.3 for a head of 3 classes"),
        ([(X * torch.nan, Y)], "^val_loader: image 0 of the batch has values"),
    ],
)
def test_what_is_wrong_with_the_validation_data_is_named_so(backbone, batches, message):
    with pytest.raises((ValueError, pcx.NonFiniteLoss), match=message):
        fit(backbone, [(X, Y)], val_loader=batches)
