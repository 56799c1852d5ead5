"""Training from kept tokens is training from images, or is refused by name."""

import copy

import pytest
import timm
import torch
from families import build
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
)
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


def assert_same_weights(found, expected, tolerance=1e-9):
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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
    assert_same_weights(again, plain)
    for a, b in zip(rows, kept_rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["samples"] == b["samples"] == 10
    assert sorted(set(counted.reads)) == [1, 4]  # eight samples are read three times more
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
    assert_same_weights(again, plain, 1e-6)


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
    assert_same_weights(parts, whole)


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
    assert_same_weights(again, plain)


def test_tokens_are_what_the_first_block_reads(backbone, dataset):
    model, x = pcx.VPT(backbone, 3).eval(), dataset.tensors[0][:4]
    tokens = tokens_of(model, x)
    assert tokens.shape == (4, 5, 24)
    run = FromTokens(model, x[:1])
    run.attach()
    torch.testing.assert_close(run(tokens), model(x))
    run.remove()
    kept = TokenSet(tokens, torch.arange(4))
    found, labels = kept.__getitems__([2, 0])
    assert torch.equal(found, tokens[[2, 0]])
    assert labels.tolist() == [2, 0]


class Drawn(Dataset):
    def __init__(self, dataset, transform=None):
        self.dataset, self.transform = dataset, transform

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
    refused(Drawn(dataset), "cache: .*two reads of the same samples differ")
    refused(
        Stopping(DataLoader(dataset, 4), 1),
        "cache: 'tokens' needs a torch.utils.data.DataLoader.*got a Stopping",
    )
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


def mixed(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return images + images.flip(0), labels


def flipped(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return (images.flip(-1) if torch.rand(()) < 0.5 else images), labels


def listed(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return images, labels.tolist()


def halved(samples):
    images, labels = torch.utils.data.default_collate(samples)
    return images[: len(images) // 2 + 1], labels[: len(labels) // 2 + 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collate_fn": mixed}, "cache: .*gives a sample otherwise in another batch"),
        ({"collate_fn": flipped}, "cache: .*two reads of the same samples differ"),
        ({"collate_fn": listed}, "loader: its labels are a list"),
        ({"collate_fn": halved}, "cache: .*gives a sample otherwise in another batch"),
        ({"batch_size": None}, "loader: it yields single samples; give it a batch_size"),
    ],
    ids=["mixed", "flipped", "listed", "halved", "single"],
)
def test_batches_that_are_not_their_samples_are_refused(backbone, dataset, arguments, message):
    model = pcx.VPT(backbone, 3).eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(2)
    with pytest.raises(ValueError, match=message):
        pcx.fit(model, DataLoader(dataset, **{"batch_size": 4, **arguments}), **RUN, cache="tokens")
    assert [module.training for module in model.modules()] == modes


def test_noise_on_some_samples_alone_is_seen(backbone, dataset):
    class Late(Drawn):
        def __getitem__(self, i):
            return super().__getitem__(i) if i > 8 else self.dataset[i]

    with pytest.raises(ValueError, match="cache: .*two reads of the same samples differ"):
        pcx.fit(pcx.VPT(backbone, 3), DataLoader(Late(dataset), 4), **RUN, cache="tokens")


def test_statistics_before_the_first_block_are_refused_and_stay(dataset):
    backbone = build("vit").float()
    projection = backbone.patch_embed.proj
    backbone.patch_embed.proj = nn.Sequential(projection, nn.BatchNorm2d(48))
    model = lora(backbone)
    before = {n: b.clone() for n, b in model.named_buffers()}
    data = torch.utils.data.TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6))
    with pytest.raises(ValueError, match=r"cache: .*each image's own, but .*running_mean changes"):
        pcx.fit(model, DataLoader(data, 2), **RUN, cache="tokens")
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("batch", [1, 4])
def test_blocks_that_are_computed_again_are_refused(backbone, dataset, batch):
    model = lora(backbone)
    model.get_base_model().set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"cache: .*again in its backward pass \(gradient check"):
        pcx.fit(model, DataLoader(dataset, batch), **RUN, cache="tokens")


def test_prompted_blocks_that_are_computed_again(backbone, dataset):
    def prompted():
        model = pcx.VPT(backbone, 3)
        model.set_grad_checkpointing(True)
        return model

    plain, _ = trained(prompted, DataLoader(dataset, 4))
    again, _ = trained(prompted, DataLoader(dataset, 4), cache="tokens")
    assert_same_weights(again, plain)


def test_images_of_several_sizes_are_refused(dataset):
    backbone = build("vit", dynamic_img_size=True).float()

    class Sizes(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.full((3, 32, 64) if i == 4 else (3, 64, 32), float(i)), i % 3

    assert 4 not in [i * 19 // 7 for i in range(8)]  # those that are read first
    with pytest.raises(ValueError, match=r"cache: images \(3, 32, 64\) and \(3, 64, 32\)"):
        pcx.fit(pcx.VPT(backbone, 3), DataLoader(Sizes(), 1), **RUN, cache="tokens")


@pytest.mark.parametrize("way", ["subset", "batches", "numpy"])
def test_other_loaders(backbone, dataset, way):
    counted, arrays = Counted(dataset), [(x.numpy(), y.numpy()) for x, y in dataset]

    def loader():
        if way == "subset":
            return DataLoader(counted, 2, sampler=SubsetRandomSampler([8, 9, 2]))
        if way == "numpy":
            return DataLoader(arrays, 4, shuffle=True)
        batches = BatchSampler(RandomSampler(dataset), 4, drop_last=True)
        return DataLoader(dataset, batch_sampler=batches)

    plain, _ = trained(lambda: pcx.VPT(backbone, 3), loader())
    counted.reads[:] = [0] * 10
    again, _ = trained(lambda: pcx.VPT(backbone, 3), loader(), cache="tokens")
    assert_same_weights(again, plain)
    if way == "subset":
        assert [i for i, reads in enumerate(counted.reads) if reads] == [2, 8, 9]


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
    torch.nn.init.zeros_(backbone.head.weight)
    torch.nn.init.zeros_(backbone.head.bias)
    model = pcx.VPT(backbone, 3, head_init="keep")
    with pytest.raises(ValueError, match="cache: the model reads more than its first block's"):
        pcx.fit(model, DataLoader(data, 2), **RUN, cache="tokens")
