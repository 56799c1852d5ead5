"""Hugging Face image classifiers as backbones."""

import pytest
import torch
from families import randomise
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.backbones.inputs import data_config

transformers = pytest.importorskip("transformers")

SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
    "num_labels": 3,
}


def vit(attention="sdpa"):
    config = transformers.ViTConfig(**SIZE, attn_implementation=attention)
    return transformers.ViTForImageClassification(config)


def deit():
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SIZE))


def dinov2():
    size = {k: v for k, v in SIZE.items() if k != "intermediate_size"}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**size))


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("make", [vit, deit, dinov2])
def test_folded_equals_concat(make, x):
    backbone = make().double().eval()
    randomise(backbone)
    model = pcx.VPT(backbone, 5)
    found = {}
    for path in ("folded", "concat"):
        model.path = path
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        found[path] = [logits.detach(), *(p.grad.clone() for p in model.prompts)]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    bare = pcx.VPT(backbone, 0, head_init="keep")
    torch.testing.assert_close(bare(x), backbone(x).logits)
    assert (bare(x) - found["folded"][0]).norm() > 1e-3


def test_eager_attention_is_switched_for_us_alone(x):
    backbone = vit("eager").double().eval()
    model = pcx.VPT(backbone, 5, head_init="keep")
    plain = backbone(x).logits
    assert (model(x) - plain).norm() > 1e-6
    assert backbone.config._attn_implementation == "eager"


def test_checkpointing_asked_for_in_the_backbone(x):
    backbone = vit().double()
    for layer in backbone.vit.layers:
        layer.gradient_checkpointing = True
    model = pcx.VPT(backbone, 5, dropout=0.2).train()
    assert model.layers[0].checkpoint
    torch.manual_seed(0)
    model(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.prompts]
    model.set_grad_checkpointing(False)
    model.zero_grad()
    torch.manual_seed(0)
    model(x).square().sum().backward()
    for a, b in zip(grads, model.prompts, strict=True):
        torch.testing.assert_close(a, b.grad)


def test_normalisation_is_the_checkpoint_s_own(tmp_path):
    vit().save_pretrained(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    transformers.ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    backbone = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    config = data_config(pcx.VPT(backbone, 2))
    assert (config["mean"], config["std"], config["input_size"]) == (mean, std, (3, 32, 32))
    with pytest.warns(UserWarning, match="mean and std of its images are taken to be 0.5"):
        data_config(pcx.VPT(vit(), 2))


def test_dict_batches_and_the_checkpoint_s_name(tmp_path):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    backbone = vit()
    backbone.config._name_or_path = checkpoint = str(tmp_path)
    model = pcx.VPT(backbone, 2, head_init="keep")
    quiet = {"epochs": 1, "lr": 0.1, "progress": False}
    with pytest.warns(UserWarning, match=f"{checkpoint} has no image processor"):
        assert pcx.fit(model, DataLoader(rows, batch_size=3), **quiet)[0]["samples"] == 6
    as_pairs = DataLoader(TensorDataset(images, labels), batch_size=3)
    with pytest.warns(UserWarning, match=f"{checkpoint} has no image processor"):
        found = pcx.score(model, DataLoader(rows, batch_size=3), progress=False)
    with pytest.warns(UserWarning, match=f"{checkpoint} has no image processor"):
        assert all(map(torch.equal, found, pcx.score(model, as_pairs, progress=False)))
    pcx.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=f"was trained on {checkpoint} with weights"):
        pcx.load(tmp_path / "m", vit())
