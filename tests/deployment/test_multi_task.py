"""Several tasks' models on one backbone, each for its images of one batch."""

import copy

import pytest
import torch
from families import build, images

import pcx
from pcx.backbones import scenes_vit


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


FAMILIES = ["vit", "vit-map", "deit-distilled", "dinov2-reg", "eva02", "beit", "naflexvit"]


def models_of(backbone, counts=(4, 3, 5), classes=(7, 3, 5), **more):
    found = []
    for i, (count, size) in enumerate(zip(counts, classes, strict=True)):
        torch.manual_seed(i)
        model = pcx.VPT(backbone, count, num_classes=size, **more)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.normal_(std=0.3)
        found.append(model.eval())
    return found


def expected_of(models, x, index):
    most = max(model.num_classes for model in models)
    rows = []
    for i, task in enumerate(index):
        row = pcx.freeze(models[task])(x[i : i + 1])[0]
        missing = row.new_full((most - len(row),), -torch.inf)
        rows.append(torch.cat([row, missing]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_has_the_logits_of_its_model(family):
    backbone = build(family)
    x, models = images(family, batch=6), models_of(backbone)
    served = pcx.multi_task(models)
    for index in ([0, 1, 2, 2, 1, 0], [1] * 6, [2, 0, 2, 0, 2, 0]):
        found = served(x, index)
        close(found, expected_of(models, x, index))
    assert served(x, [1] * 6).argmax(-1).max() < 3
    assert served(x[:2], torch.tensor([2, 1])).shape == (2, 7)


def test_prompts_of_any_counts_and_kinds():
    backbone, x, index = build("vit"), images("vit", batch=4), [3, 0, 1, 2]
    prefix = pcx.VPT(backbone, 2, kind="prefix", num_classes=4).eval()
    models = [*models_of(backbone, ([4, 0, 2], 0, 6)), prefix]
    close(pcx.multi_task(models)(x, index), expected_of(models, x, index))
    none = models_of(backbone, (0, 0), (2, 3))
    close(pcx.multi_task(none)(x, [0, 1, 1, 0]), expected_of(none, x, [0, 1, 1, 0]))
    one = models_of(backbone, (3,), (2,))
    close(pcx.multi_task(one)(x, [0] * 4), pcx.freeze(one[0])(x))


def test_it_is_for_inference_and_is_copied_whole():
    backbone, x = build("vit"), images("vit", batch=3)
    models = models_of(backbone)
    models[1].record.task = "birds"
    served = pcx.multi_task(models)
    assert served.tasks == (None, "birds", None)
    assert served.num_classes == (7, 3, 5)
    before = served(x, [0, 1, 2])
    again = copy.deepcopy(served)
    with torch.no_grad():
        for name, tensor in served.state_dict().items():
            if "prefix_" in name or ".heads." in name:
                tensor.mul_(1.5)
    assert not torch.allclose(served(x, [0, 1, 2])[0], before[0])
    close(again(x, [0, 1, 2]), before)
    assert not any(p.requires_grad for p in again.parameters())
    close(models[0](x[:1])[0], before[0, :7])  # its prompts and head are its own


def test_half_precision_is_near():
    torch.manual_seed(0)
    models = [pcx.VPT(scenes_vit(5), 6, head_init="keep").eval() for _ in range(2)]
    x = torch.randn(4, 3, 64, 64)
    found = pcx.multi_task(models, amp="bf16")(x, [1, 0, 0, 1]).float()
    whole = pcx.multi_task(models)(x, [1, 0, 0, 1])
    assert (found - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ([0, 1], r"task: torch.int64 of shape \(2,\), expected a whole number for each of 3"),
        ([0.0, 1.0, 1.0], "task: torch.float32"),
        ([True, False, True], "task: torch.bool"),
        ([0, 3, 1], r"task: \[0, 3, 1\], expected numbers from 0 to 2"),
        ([0, -1, 1], "expected numbers from 0 to 2"),
        (1, r"of shape \(\)"),
    ],
)
def test_an_index_that_is_none_is_named(task, said):
    served = pcx.multi_task(models_of(build("vit")))
    with pytest.raises(ValueError, match=said):
        served(images("vit", batch=3), task)


def test_models_that_do_not_fit_are_named():
    backbone = build("vit")
    good = pcx.VPT(backbone, 3)
    with pytest.raises(ValueError, match="models: none given"):
        pcx.multi_task([])
    with pytest.raises(ValueError, match=r"models\[1\]: a Linear, expected a pcx.VPT"):
        pcx.multi_task([good, pcx.Linear(backbone)])
    with pytest.raises(ValueError, match=r"models\[1\]: the prompts of kind='shallow' do not fold"):
        pcx.multi_task([good, pcx.VPT(backbone, 3, kind="shallow")])
    other = build("vit")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"models\[1\]: its backbone's weights are not those"):
        pcx.multi_task([good, pcx.VPT(other, 3)])
    with pytest.raises(ValueError, match="amp: got 'half'"):
        pcx.multi_task([good], amp="half")
    with pytest.raises(ValueError, match="execution: "):
        pcx.multi_task([good], execution="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_recording_serves_every_mixture():
    torch.manual_seed(0)
    models = [pcx.VPT(scenes_vit(5), 6 + i, head_init="keep").cuda().eval() for i in range(3)]
    served, x = pcx.multi_task(models), torch.randn(6, 3, 64, 64, device="cuda")
    for index in ([0, 1, 2, 2, 1, 0], [2, 2, 2, 0, 0, 1]) * 2:
        found = served(x, torch.tensor(index, device="cuda"))
        for i, task in enumerate(index):
            expected = pcx.freeze(models[task], execution="eager")(x[i : i + 1])[0]
            torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-3)
