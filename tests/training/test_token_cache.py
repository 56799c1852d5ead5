"""Training from kept tokens is training from images, or is refused by name."""

import copy

import pytest
import timm
import torch
from families import build
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset
from torchvision import transforms

import pcx
from pcx.training.token_cache import FromTokens, TokenSet, tokens_of

RUN = {"epochs": 3, "lr": 0.1, "progress": False}


class Counted(Dataset):
    """Counts how often each sample is read."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, [0] * len(dataset)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.reads[i] += 1
        return self.dataset[i]


def trained(make, loader, **arguments):
    torch.manual_seed(0)
    model = make()
    history = pcx.fit(model, loader, **{**RUN, **arguments})
    return model, history


def lora(backbone):
    import peft

    return peft.get_peft_model(
        copy.deepcopy(backbone), peft.LoraConfig(r=2, target_modules=["qkv"])
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda backbone: pcx.VPT(backbone, 3, dropout=0.2),
        lambda backbone: pcx.VPT(backbone, 3, kind="shallow"),
        lambda backbone: pcx.VPT(backbone, 3, path="concat"),
        pcx.Linear,
        lora,
    ],
    ids=["deep", "shallow", "concat", "linear", "lora"],
)
def test_the_weights_are_those_of_training_from_images(backbone, dataset, make):
    counted = Counted(dataset)

    def loader(data):
        return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))

    plain, rows = trained(lambda: make(backbone), loader(dataset))
    again, kept_rows = trained(lambda: make(backbone), loader(counted), cache="tokens")
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(rows, kept_rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["samples"] == b["samples"] == 10
    assert max(counted.reads) <= 4  # three for the checks of the first samples, and one
    assert counted.reads[-1] == 1
    x = dataset.tensors[0]  # afterwards it is a model of images
    torch.testing.assert_close(again.eval()(x), plain.eval()(x))
    assert not [m for m in again.modules() if m._forward_pre_hooks]


def test_compiled_and_validated(backbone, dataset, loader):
    plain, rows = trained(lambda: pcx.VPT(backbone, 3), loader, val_loader=loader, seed=3)
    again, kept = trained(
        lambda: pcx.VPT(backbone, 3),
        loader,
        val_loader=loader,
        seed=3,
        cache="tokens",
        execution="compile",
    )
    assert kept[-1]["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_resumed_run_goes_on_with_or_without_it(backbone, dataset, tmp_path):
    def run(folder, *caches):
        for count, cache in enumerate(caches, 1):
            torch.manual_seed(0)
            model = pcx.VPT(backbone, 3)
            order = DataLoader(dataset, 4, shuffle=True)
            if count < len(caches):
                with pytest.raises(KeyboardInterrupt):
                    pcx.fit(model, Stopping(order, count), **RUN, checkpoint_dir=folder)
                continue
            pcx.fit(model, order, **RUN, cache=cache, checkpoint_dir=folder, resume=count > 1)
        return model

    whole = run(tmp_path / "a", None)
    parts = run(tmp_path / "b", None, "tokens")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class Stopping:
    """A loader that is interrupted after some passes."""

    def __init__(self, loader, passes):
        self.loader, self.left, self.batch_size = loader, passes, loader.batch_size

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return iter(self.loader)


def test_batch_samplers_of_ones_own_and_labels_of_several_numbers(backbone, dataset):
    images, labels = dataset.tensors
    soft = torch.nn.functional.one_hot(labels, 3).double()
    data = Subset(torch.utils.data.TensorDataset(images, soft), [1, 4, 7, 2, 9])

    class Own(BatchSampler):
        pass

    def loader():
        return DataLoader(data, batch_sampler=Own(RandomSampler(data), 2, drop_last=True))

    arguments = {"objective": "soft"}
    plain, rows = trained(lambda: pcx.VPT(backbone, 3), loader(), **arguments)
    again, kept = trained(lambda: pcx.VPT(backbone, 3), loader(), cache="tokens", **arguments)
    assert rows[-1]["samples"] == kept[-1]["samples"] == 4
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tokens_are_what_the_first_block_reads(backbone, dataset):
    model, x = pcx.VPT(backbone, 3).eval(), dataset.tensors[0][:4]
    tokens = tokens_of(model, x)
    assert tokens.shape == (4, 5, 24)
    run = FromTokens(model, x[:1])
    torch.testing.assert_close(run(tokens), model(x))
    run.remove()
    kept = TokenSet(tokens, torch.arange(4))
    found, labels = kept.__getitems__([2, 0])
    assert torch.equal(found, tokens[[2, 0]])
    assert labels.tolist() == [2, 0]


class Drawn(Dataset):
    def __init__(self, dataset, transform=None, names=("transform",)):
        self.dataset = dataset
        for name in names:
            setattr(self, name, transform)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, label = self.dataset[i]
        return image + torch.randn(()) * (self.transform is None), label


def test_what_is_not_the_same_in_every_epoch_is_refused(backbone, dataset):
    model = pcx.VPT(backbone, 3)

    def refused(data, message, model=model, **arguments):
        loader = data if not isinstance(data, Dataset) else DataLoader(data, 4)
        with pytest.raises(ValueError, match=message):
            pcx.fit(model, loader, **RUN, cache="tokens", **arguments)
        assert not [m for m in model.modules() if m._forward_pre_hooks]

    flips = transforms.Compose([transforms.RandomHorizontalFlip(0.01)])
    refused(Subset(Drawn(dataset, flips), [0, 1]), "cache: .*transform has random parts")
    refused(Drawn(dataset), r"cache: .*dataset\[0\] gave two different samples")
    refused(Stopping(DataLoader(dataset, 4), 1), "cache: 'tokens' needs a DataLoader")
    refused(dataset, "cache: .*everything before the first block to be frozen", pcx.Full(backbone))
    noisy = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, pos_drop_rate=0.5
    ).double()
    adapted = lora(noisy)
    refused(dataset, "cache: .*nothing before the first block is random", adapted)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3).double())
    refused(dataset, "cache: 'tokens' needs a tuned model", plain)
    with pytest.raises(ValueError, match="cache: got 'images', expected one of"):
        pcx.fit(model, DataLoader(dataset, 4), **RUN, cache="images")


def test_too_many_tokens_are_refused_before_training(backbone, dataset, monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    with pytest.raises(ValueError, match=r"cache: 'tokens' of 10 images take 0.0 GiB, 0.0 GiB are"):
        pcx.fit(pcx.VPT(backbone, 3), DataLoader(dataset, 4), **RUN, cache="tokens")


def test_a_model_that_reads_the_image_elsewhere_is_refused(dataset):
    backbone = build("vit").float()
    first = type(backbone).forward_features

    class Both(type(backbone)):
        def forward_features(self, x, *args, **kwargs):
            return first(self, x, *args, **kwargs) + x.mean((1, 2, 3))[:, None, None]

    backbone.__class__ = Both
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4))
    with pytest.raises(ValueError, match="cache: the model reads more than its first block's"):
        pcx.fit(pcx.VPT(backbone, 3), DataLoader(data, 2), **RUN, cache="tokens")
