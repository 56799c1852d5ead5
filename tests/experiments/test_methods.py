"""Methods with arguments as text."""

from collections.abc import Sequence

import families
import pytest
import torch
from torch import nn

from pcx.backbones import scenes_vit
from pcx.experiments.methods import build_method, parse_method
from pcx.models import METHODS

READ = [
    ("vpt", {}),
    (" vpt:num_prompts=50, kind=shallow ", {"num_prompts": 50, "kind": "shallow"}),
    ("vpt:num_prompts=8+8+4,path=none", {"num_prompts": [8, 8, 4], "path": None}),
    ("vpt:dropout=0.1,read_only=false", {"dropout": 0.1, "read_only": False}),
    ("sct:k=32,position=mlp", {"k": 32, "position": "mlp"}),
    ("sct:layers=0+-1,scale=1,seed=3", {"layers": [0, -1], "scale": 1.0, "seed": 3}),
    ("adapter:reduction=64,init=published", {"reduction": 64, "init": "published"}),
    ("sidetune:pretrained=false", {"pretrained": False}),
    ("full", {}),
]
REFUSED = [
    ("vtp", "method: got 'vtp', .* Did you mean 'vpt'"),
    ("", "method: got ''"),
    ("vpt:", "method: 'vpt:' ends in ':'; vpt takes num_prompts=a whole number or a list as a"),
    ("vpt:num_prompts", "method: vpt: 'num_prompts', expected argument=value; vpt takes"),
    ("vpt:prompts=3", "method: vpt has no argument 'prompts'. Did you mean 'num_prompts' or"),
    ("linear:k=3", "method: linear has no argument 'k'. It takes no arguments"),
    ("vpt:num_prompts=x", "method: vpt: num_prompts: 'x', expected a whole number or a list"),
    ("vpt:num_prompts=2++3", "method: vpt: num_prompts: '', expected a whole number"),
    ("vpt:dropout=", "method: vpt: dropout: '', expected a number"),
    ("vpt:kind=", "method: vpt: kind: '', expected text"),
    ("partial:num_layers=1.5", "method: partial: num_layers: '1.5', expected a whole number"),
    ("partial:num_layers=none", "method: partial: num_layers: 'none', expected a whole number"),
    ("sidetune:pretrained=1", "method: sidetune: pretrained: '1', expected true or false"),
    ("vpt:kind=deep,kind=deep", "method: vpt: kind is given twice"),
    ("sct:channels=3", "method: sct: channels comes from the training images"),
    ("linear:num_classes=3", "method: linear: num_classes comes from the task"),
]


@pytest.mark.parametrize(("text", "arguments"), READ)
def test_values_have_the_kinds_of_the_signature(text, arguments):
    method = parse_method(text)
    assert method.text == text.strip()
    assert method.name == text.strip().partition(":")[0]
    assert method.arguments == arguments
    assert list(map(type, method.arguments.values())) == list(map(type, arguments.values()))


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("'] ", "' ")):
        parse_method(text)


@pytest.fixture
def images():
    data = torch.utils.data.TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 3)
    return torch.utils.data.DataLoader(data, batch_size=3)


def test_models_are_built(images):
    built = build_method("vpt:num_prompts=2+0+0+0+0+3", scenes_vit(), images, num_classes=3)
    assert (built.counts, built.num_classes) == ((2, 0, 0, 0, 0, 3), 3)
    assert set(build_method("vpt", scenes_vit(3), images).counts) == {20}
    assert build_method("sct:k=5,layers=0+2", scenes_vit(3), images).k == (5, 5)
    plain = scenes_vit(5)
    kept = build_method("linear", plain, images, head_init="keep")
    assert torch.equal(kept.heads[0].weight, plain.head.weight)
    further = parse_method("vpt:kind=shallow").with_arguments({"num_prompts": 7})
    assert build_method(further, scenes_vit(3), images).counts[:2] == (7, 0)


def test_what_a_class_refuses_is_named_by_its_method(images):
    with pytest.raises(ValueError, match="^method: vpt: kind: got 'wide', expected one of"):
        build_method("vpt:kind=wide", scenes_vit(3), images)
    further = parse_method("vpt").with_arguments({"num_prompts": -1})
    with pytest.raises(ValueError, match="^num_prompts: -1"):  # it does not stand in the text
        build_method(further, scenes_vit(3), images)


class WithConfig(nn.Module):
    """What a class that takes peft's configurations looks like."""

    def __init__(self, model, config=None, *, num_classes=None, head_init="keep"):
        super().__init__()
        self.given = (model, config, num_classes, head_init)


class Wide(nn.Module):
    """A class whose arguments are of several kinds."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        depth: int | Sequence[int] | str | None = None,
        names: list[str] | str = "",
        num_classes: int | None = None,
        head_init: str = "",
    ):
        super().__init__()


class Strict(nn.Module):
    """A class that needs an argument, and has types that are there for a type checker alone."""

    def __init__(self, backbone: nn.Module, width: "Nowhere", *, num_classes=None, head_init=""):  # noqa: F821
        super().__init__()
        self.width = width


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(
        METHODS, "_entries", {**METHODS._entries, "c": WithConfig, "s": Strict, "w": Wide}
    )


@pytest.mark.usefixtures("added")
def test_a_configuration_of_peft_is_made():
    peft = pytest.importorskip("peft")
    backbone = scenes_vit(3)
    text = "c:peft_type=LORA,r=8,target_modules=qkv,lora_dropout=0.5,modules_to_save=head+norm"
    model, config, classes, head_init = build_method(
        text, backbone, None, num_classes=4, head_init="published"
    ).given
    assert (model, classes, head_init) == (backbone, 4, "published")
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_dropout) == (8, 0.5)
    assert set(config.target_modules) == {"qkv"}  # as text it would be a pattern of whole names
    assert config.modules_to_save == ["head", "norm"]
    method = parse_method("c:peft_type=LORA,target_modules=all-linear,layers_to_transform=3")
    assert method.arguments["target_modules"] == "all-linear"
    assert method.arguments["layers_to_transform"] == 3
    for wrong, said in (
        ("c", "c: peft_type: None, expected one of"),
        ("c:peft_type=LORRA", "peft_type: 'LORRA', expected .* Did you mean 'LORA'"),
        ("c:peft_type=LORA,rank=3", "c has no argument 'rank'. It takes peft_type and"),
        ("c:peft_type=LORA,r=x", "c: r: 'x', expected a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_method(wrong)
    with pytest.raises(ValueError, match="c: peft refuses .*r.*-1"):
        build_method("c:peft_type=LORA,r=4,layers_to_transform=3,target_modules=all-linear,"
                     "loftq_config=-1", backbone, None)  # fmt: skip


@pytest.mark.usefixtures("added")
def test_kinds_are_told_apart():
    for text, value in {"3": 3, "1+-1": [1, -1], "top": "top", "none": None}.items():
        assert parse_method(f"w:depth={text}").arguments == {"depth": value}
    for text, value in {"a": ["a"], "a+b": ["a", "b"], "all-linear": "all-linear"}.items():
        assert parse_method(f"w:names={text}").arguments == {"names": value}


@pytest.mark.usefixtures("added")
def test_types_that_are_not_known_are_guessed_and_missing_arguments_named():
    values = {"3": 3, "0.5": 0.5, "true": True, "none": None, "a+1": ["a", 1], "wide": "wide"}
    for text, value in values.items():
        assert build_method(f"s:width={text}", None, None).width == value
    with pytest.raises(ValueError, match="method: 's' lacks width; s takes width=text"):
        build_method("s", None, None)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("vpt:init=cls-prototype,num_prompts=4", (4, 4, 4)),
        ("vpt:location=add", (0, 0, 0)),
        ("vpt:location=concat-channel,kind=shallow", (0, 0, 0)),
        ("vpt:share=inter,project=5", (20, 20, 20)),
    ],
)
def test_variants_of_vpt_are_built_from_text(text, prompts):
    backbone = families.build("vit")
    loader = [(families.images("vit", 4), torch.arange(4))]
    assert build_method(text, backbone, loader, num_classes=4).counts == prompts
