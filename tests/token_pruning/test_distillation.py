"""The three-term loss by hand, and training under soft masks."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from families import build, images
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.token_pruning import Teacher, finetune, soft_prune, three_term_loss

SETTING = {"layers": (1, 2), "keep": 0.3, "iters": (3, 1)}
ONE_LAYER = {"layers": (1,), "keep": 0.5, "iters": 5}


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_the_loss_by_hand():
    logits, theirs = rand(2, 3), rand(2, 3, seed=1)
    tokens, taught, mask = rand(2, 4, 5), rand(2, 4, 5, seed=1), rand(2, 4, seed=2).sigmoid()
    labels = torch.tensor([2, 0])
    found = three_term_loss(logits, labels, tokens, mask, theirs, taught, distill=0.3, kl=2.0)
    for b in range(2):
        y = [math.exp(v) for v in logits[b].tolist()]
        y = [v / sum(y) for v in y]
        z = [math.exp(v) for v in theirs[b].tolist()]
        z = [v / sum(z) for v in z]
        divergence = sum(a * math.log(a / c) for a, c in zip(y, z, strict=True))
        distances = 0.0
        for i in range(4):
            mine, other = (
                (t[b, i] - t[b, i].mean()) / (t[b, i].var(correction=0) + 1e-5).sqrt()
                for t in (tokens, taught)
            )
            distances += mask[b, i].item() * ((mine - other) ** 2).sum().item() / 5
        distances /= mask[b].sum().item()
        expected = -math.log(y[labels[b]]) + 0.3 * distances + 2.0 * divergence
        assert found[b].item() == pytest.approx(expected, rel=1e-12)


def test_a_student_that_is_its_teacher_has_cross_entropy_alone():
    logits, tokens, labels = rand(2, 3), rand(2, 4, 5), torch.tensor([2, 0])
    mask = rand(2, 4).sigmoid().requires_grad_()
    found = three_term_loss(logits, labels, tokens, mask, logits, tokens, distill=7, kl=7)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))
    other = tokens.clone().requires_grad_()
    three_term_loss(logits, labels, other, mask, logits, -tokens).sum().backward()
    assert other.grad.any()
    assert mask.grad is None  # a mask that would fade what differs


def test_a_teacher_stays_as_the_model_was():
    model, x = pcx.VPT(build("vit"), 2, head_init="keep").eval(), images("vit")
    expected = model(x)
    teacher = Teacher(model)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(1)
    logits, tokens = teacher(x)
    torch.testing.assert_close(logits, expected)
    assert tokens.shape == (2, 17, 48)
    assert not logits.requires_grad
    assert model.layers[-1].read_tokens == 1
    weight, copied = (m.layers[0].block.mlp.fc1.weight for m in (model, teacher.model))
    assert copied.data_ptr() == weight.data_ptr()
    plain = build("vit")
    logits, tokens = Teacher(plain)(x)
    assert torch.equal(plain.forward_head(plain.norm(tokens)), logits)


def learnable(seed):
    """48 images of 3 classes, each a pattern under noise, and a VPT that has learnt them."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 3, 32, 32, generator=generator)
    labels = torch.arange(48) % 3
    noisy = patterns[labels] + 2 * torch.randn(48, 3, 32, 32, generator=generator)
    loader = DataLoader(TensorDataset(noisy, labels), batch_size=16, shuffle=True)
    torch.manual_seed(seed)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2
    )
    model = pcx.VPT(backbone, 4, num_classes=3, head_init="keep")
    pcx.fit(model, loader, epochs=10, lr=0.3, opt="sgd", clip_grad=1.0, progress=False)
    return model, loader


def pruned_loss(model, loader):
    pruning = pcx.zero_tprune(model, **SETTING)
    found = pcx.evaluate(model, loader)
    pruning.remove()
    return found["loss"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_under_soft_masks_makes_the_pruned_model_better(seed):
    model, loader = learnable(seed)
    before = pruned_loss(model, loader)
    rate, x = model.trained_lr, images("vit", dtype=torch.float32)[..., :32, :32]
    history = finetune(
        model, loader, **SETTING, epochs=12, lr=0.3, opt="sgd", clip_grad=1.0, progress=False
    )
    assert len(history) == 12
    assert history[-1]["loss"] < history[0]["loss"]
    assert pruned_loss(model, loader) < before
    assert model.trained_lr == rate
    assert not model._forward_hooks
    fresh = model.keep([range(m) for m in model.counts]).eval()
    assert torch.equal(model.eval()(x), fresh(x))  # nothing is left of the masks


def test_the_first_loss_and_the_weights_of_a_model_of_its_own(dataset):
    """A timm model without prompts: what requires gradients is trained."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=2,
        num_classes=3,
    ).double()  # fmt: skip
    model.patch_embed.requires_grad_(False)
    before = copy.deepcopy(model)
    x, labels = dataset.tensors
    teacher, soft = Teacher(model), soft_prune(model, **SETTING, temperature=0.5)
    logits = model(x)
    expected = three_term_loss(logits, labels, soft.tokens, soft.masks[-1], *teacher(x), kl=3)
    soft.remove()
    history = finetune(
        model, DataLoader(dataset, batch_size=10), **SETTING, epochs=1, lr=0.1, temperature=0.5,
        kl=3, progress=False,
    )  # fmt: skip
    assert history[0]["loss"] == pytest.approx(expected.mean().item())
    changed = {
        n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))
    }
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_an_exception_takes_masks_and_teacher_away(backbone, dataset):
    model = pcx.VPT(backbone, 2)
    x = dataset.tensors[0]
    expected = model(x)

    class Broken(TensorDataset):
        def __getitem__(self, i):
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        finetune(
            model,
            DataLoader(Broken(*dataset.tensors)),
            **ONE_LAYER,
            epochs=1,
            lr=0.1,
            progress=False,
        )
    assert torch.equal(model(x), expected)
    assert not model._forward_hooks
    assert model.layers[-1].read_tokens == 1


def test_bad_arguments_are_named(backbone, loader):
    model = pcx.VPT(backbone, 2)
    arguments = {**ONE_LAYER, "epochs": 1, "lr": 0.1, "progress": False}
    for changes, message in (
        ({"distill": -1.0}, "distill: -1.0, expected a weight of 0 or more"),
        ({"kl": math.nan}, "kl: nan"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"keep": 2.0}, "keep: 2.0, expected .* after layer 1"),
        ({"epochs": 0}, "epochs: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(model, loader, **{**arguments, **changes})
    pruning = pcx.zero_tprune(model, **ONE_LAYER)
    with pytest.raises(ValueError, match=r"call the handle's remove\(\) first"):
        finetune(model, loader, **arguments)
    pruning.remove()
    logits, tokens, mask = rand(2, 3), rand(2, 4, 5), rand(2, 4)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"tokens: shape \(2, 4, 5\), but the teacher's is \(2, 1"):
        three_term_loss(logits, labels, tokens, mask, logits, tokens[:, :1])


def test_a_model_of_hugging_face_is_trained_by_its_logits(loader):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).double()
    before = model.classifier.weight.detach().clone()
    (row,) = finetune(
        model, loader, layers=(1,), keep=0.5, iters=2, epochs=1, lr=0.01, progress=False
    )
    assert row["samples"] == 10
    assert not torch.equal(before, model.classifier.weight)
    assert model(torch.zeros(1, 3, 32, 32).double()).logits.shape == (1, 3)
