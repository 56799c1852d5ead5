"""Models over backbones of 16 bits: what is trained is float32, so that no update rounds away."""

import warnings

import pytest
import timm
import torch
from families import randomise
from torch.utils.data import DataLoader, TensorDataset

import pcx

KINDS = ["deep", "shallow", "prefix"]


def backbone_of(dtype):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )
    randomise(model)
    return model.to(dtype)


def loader_of(dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 3
    images = torch.randn(16, 3, 32, 32, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(images.to(dtype), labels), batch_size=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_computes_what_a_float32_one_does(kind, dtype):
    narrow = pcx.VPT(backbone_of(dtype), 3, kind=kind, head_init="keep").eval()
    assert {p.dtype for p in narrow.own_state().values()} == {torch.float32}
    assert {p.dtype for p in narrow.frozen_state().values()} == {dtype}
    wide = pcx.VPT(backbone_of(dtype).float(), 3, kind=kind, head_init="keep").eval()
    wide.load_state_dict(narrow.state_dict())
    images = torch.randn(4, 3, 32, 32).to(dtype)
    with torch.no_grad():
        expected, found = wide(images.float()), narrow(images)
        assert found.dtype == torch.float32
        scale = expected.abs().max()
        assert (found - expected).abs().max() < 0.03 * scale
        if kind == "deep":
            narrow.path = "concat"
            assert (narrow(images) - found).abs().max() < 0.03 * scale
        if kind != "shallow":
            frozen = pcx.freeze(narrow)(images)
            assert frozen.dtype == torch.float32
            assert (frozen - found).abs().max() < 0.03 * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_small_updates_are_kept(kind, amp):
    model = pcx.VPT(backbone_of(torch.bfloat16), 3, kind=kind)
    before = {n: p.detach().clone() for n, p in model.trainable().items()}
    loader = loader_of(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pcx.fit(model, loader, epochs=2, lr=1e-6, opt="adamw", amp=amp, progress=False)
    for name, parameter in model.trainable().items():
        step = (parameter - before[name]).abs()
        assert (step > 0).float().mean() > 0.95, name
        assert step.max() < 1e-5, name


def test_training_says_so(capsys):
    pcx.fit(pcx.VPT(backbone_of(torch.bfloat16), 3), loader_of(torch.bfloat16), epochs=1, lr=0.1)
    assert "trained in float32 over bfloat16" in capsys.readouterr().out


def test_training_in_16_bits_is_warned_of():
    loader = loader_of(torch.bfloat16)
    arguments = {"epochs": 1, "lr": 0.01, "progress": False}
    converted = pcx.VPT(backbone_of(torch.float32), 3).bfloat16()
    for model, first in [(pcx.Full(backbone_of(torch.bfloat16)), "cls_token"), (converted, "head")]:
        with pytest.warns(UserWarning, match=f"{first}.*bfloat16.*amp='bf16'"):
            pcx.fit(model, loader, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_float32_and_fits_both(tmp_path, kind):
    model = pcx.VPT(backbone_of(torch.bfloat16), 3, kind=kind)
    pcx.fit(model, loader_of(torch.bfloat16), epochs=1, lr=0.01, progress=False)
    pcx.save(model, tmp_path / "model.safetensors")
    loaded = pcx.load(tmp_path / "model.safetensors", backbone_of(torch.bfloat16))
    for name, tensor in model.own_state().items():
        assert torch.equal(loaded.own_state()[name], tensor), name
    images = torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
        model.float()  # a conversion reaches all of it
        assert model(images.float()).dtype == torch.float32
        model.bfloat16()
        assert model(images).dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["folded", "concat"])
def test_scoring_and_condensing(path):
    model = pcx.VPT(backbone_of(torch.bfloat16), 4, path=path)
    loader = loader_of(torch.bfloat16)
    for method in ("taylor", "taylor-inner", "gate", "cls-attention", "exact", "exact-zero"):
        scores = pcx.score(model, loader, method=method)
        assert all(s.isfinite().all() for s in scores), method
    wide = pcx.VPT(backbone_of(torch.bfloat16).float(), 4, path=path)
    wide.load_state_dict(model.state_dict())
    for a, b in zip(
        pcx.score(model, loader), pcx.score(wide, loader_of(torch.float32)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.max()))
    small = pcx.condense(model, loader, keep=0.5, epochs=1, lr=0.01, progress=False)
    assert sum(small.counts) == 4
    assert {p.dtype for p in small.prompts} == {torch.float32}


def test_training_from_cached_tokens():
    model = pcx.VPT(backbone_of(torch.bfloat16), 3)
    loader = loader_of(torch.bfloat16)
    history = pcx.fit(model, loader, epochs=2, lr=0.1, cache="tokens", progress=False)
    assert history[-1]["loss"] < history[0]["loss"]


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, num_labels=3,
    )  # fmt: skip
    backbone = transformers.ViTForImageClassification(config).to(torch.bfloat16)
    model = pcx.VPT(backbone, 3, head_init="keep")
    logits = model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None for p in model.trainable().values())
