"""A model that peft has adapted (LoRA and its kin), as a tuned model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.memory import over_same_memory
from pcx.backbones.spec import check_unwrapped, find_spec, library_facts
from pcx.backbones.towers import with_head
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel, check_choice, check_module
from pcx.models.heads import draw_head, head_size, place_heads, train_in_full
from pcx.models.record import Record

_BASE = "base_model.model."  # what peft puts before the names of the model that it adapts
# Of peft's models, for as long as they live, the record and the names that became their own.
_BESIDE: WeakKeyDictionary[nn.Module, tuple[Record, set[str]]] = WeakKeyDictionary()


class PeftModel(TunedModel):
    """LoRA or any other method of peft, with pcx's training and saving.

    With a `config` the adapters are put into a copy over the backbone's memory, and the backbone is
    not touched. A model that peft has adapted already is taken as it is: its adapters are trained
    in place. The model's own are
    the active adapter, its modules_to_save (name the head among them), and whatever else requires
    gradients. So are the backbone's saved buffers, such as BatchNorm's statistics, which change in
    training. `merge_adapter` of peft writes into the backbone's memory; call it on a copy.

    Args:
        model: a backbone, or a `peft.PeftModel` over one.
        config: of peft, for a backbone; where its modules_to_save is None, it is the head.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, the config does not fit the backbone, the model is
            not of peft and there is no config, or several adapters are active.

    Example:
        >>> config = peft.LoraConfig(r=8, target_modules=["qkv"])
        >>> model = pcx.PeftModel(backbone, config, num_classes=196)
        >>> pcx.fit(model, loader, epochs=10, lr=0.001, opt="adamw")
    """

    method = "peft"
    backbone_mode = "train"  # of adapters' dropout, as peft's own training has it

    def __init__(
        self,
        model: Any,
        config: Any = None,
        *,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        nn.Module.__init__(self)
        if config is not None:
            model = _adapted(model, config, num_classes, head_init, with_head_saved=True)
        elif num_classes is not None:
            raise ValueError(
                "num_classes: the head of a model that peft has adapted stays; give the backbone "
                "and a config"
            )
        if not is_peft(model):
            raise ValueError(
                f"model: a {type(model).__name__}, expected what peft.get_peft_model gives, or a "
                "backbone and a config of peft"
            )
        self.record, self._owned = _BESIDE.setdefault(model, (Record(), set()))
        self.backbone = model
        self.spec = find_spec(model.get_base_model())
        self.training = model.training
        self._own_what_modes_change()
        self.own_state()  # takes in what requires gradients now

    def plain_backbone(self) -> nn.Module:
        """The model under the adapters."""
        return self.backbone.get_base_model()

    def own_state(self) -> dict[str, Tensor]:
        """What is saved: the adapter by peft's names, all else by names of the module tree."""
        return {**self._of_adapter(self._adapter), **super().own_state()}

    def frozen_state(self) -> dict[str, Tensor]:
        """The backbone's tensors without adapters and the heads that peft saves, by plain names."""
        own = {id(tensor) for tensor in self.own_state().values()}
        return {
            name.removeprefix(f"backbone.{_BASE}").replace(".base_layer.", "."): tensor
            for name, tensor in self._tensors().items()
            if id(tensor) not in own
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Those of the backbone: none of an adapter, and none that peft has replaced.

        Where peft put a layer around another, such as `attn.qkv`, the backbone's tensors are those
        of `attn.qkv.base_layer`.
        """
        adapters = [self._of_adapter(name).values() for name in self.backbone.peft_config]
        of_peft = {id(tensor) for tensors in adapters for tensor in tensors}
        layers = [f"{n}." for n, m in self.named_modules() if hasattr(m, "base_layer")]

        def of_backbone(name: str) -> bool:
            if not name.startswith(f"backbone.{_BASE}") or _stands_twice(name):
                return False
            around = next((layer for layer in layers if name.startswith(layer)), None)
            return around is None or name.startswith(f"{around}base_layer.")

        return {
            name: tensor
            for name, tensor in super()._tensors().items()
            if of_backbone(name) and id(tensor) not in of_peft
        }

    def _of_adapter(self, adapter: str) -> dict[str, Tensor]:
        """An adapter and its modules_to_save, by peft's names, which leave the adapter's out."""
        from peft import get_peft_model_state_dict

        tensors = self.backbone.state_dict(keep_vars=True)
        found = get_peft_model_state_dict(
            self.backbone, tensors, adapter, save_embedding_layers=False
        )
        return {f"backbone.{n}": t for n, t in found.items() if not _stands_twice(n)}

    def config(self) -> dict[str, Any]:
        """peft's own configuration of the adapter, and the head's size."""
        settings = self.backbone.peft_config[self._adapter].to_dict()
        return {"num_classes": self.num_classes, "peft": _as_json(settings)}

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Mapping[str, Any]) -> PeftModel:
        """Adapters of this configuration over a backbone with any head; not the given modules."""
        from peft import get_peft_config

        wanted = config["num_classes"]
        if head_size(_heads(backbone)) == wanted:
            wanted = None  # the head that is there
        settings = get_peft_config({**config["peft"], "inference_mode": False})
        return cls(_adapted(backbone, settings, wanted, "keep"))

    def deployed(self) -> nn.Module:
        """A backbone whose adapters are merged into its weights, for inference alone."""
        return copy.deepcopy(self.backbone).merge_and_unload().eval()

    @property
    def _adapter(self) -> str:
        active = self.backbone.base_model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"model: its adapters {list(active)} are active, expected one; choose it by "
                "set_adapter, or merge them by add_weighted_adapter"
            )
        return active[0]


def _adapted(
    backbone: Any,
    config: Any,
    num_classes: int | None,
    head_init: str,
    *,
    with_head_saved: bool = False,
) -> nn.Module:
    """What peft makes of a copy over a backbone's memory; what it trains has memory of its own.

    `with_head_saved` names the head in a config's modules_to_save that is None.
    """
    from peft import get_peft_model

    check_choice("head_init", head_init, HEAD_INITS)
    check_module("model", backbone, "such as timm.create_model gives")
    check_unwrapped(backbone, "model")
    if is_peft(backbone) or isinstance(backbone, TunedModel):
        raise ValueError(
            f"model: a {type(backbone).__name__}, which is adapted already; give the backbone that "
            "it was built on, or leave config out"
        )
    if num_classes is not None:
        num_classes = whole_number("num_classes", num_classes)
    shared = with_head(over_same_memory(backbone, backbone.parameters()), num_classes)
    heads = _heads(shared)
    place_heads(shared, heads)
    for head in heads:
        train_in_full(head)
        draw_head(head, head_init)
    settings = copy.deepcopy(config)
    if with_head_saved and getattr(settings, "modules_to_save", ()) is None:
        settings.modules_to_save = list(library_facts(shared)["heads"]) or None
    try:
        adapted = get_peft_model(shared, settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config: it does not fit {type(backbone).__name__}: {error}") from error
    for parameter in adapted.parameters():  # peft's bias="all" trains the backbone's own
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    return adapted


def is_peft(model: nn.Module) -> bool:
    """Whether a model is of peft, without importing peft."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]
    return any(name.startswith("peft.") and name.endswith(".PeftModel") for name in names)


def known_by(model: Any) -> TunedModel | None:
    """The tuned model that `tuned` gives, or None where it refuses."""
    try:
        return tuned(model)
    except ValueError:
        return None


def tuned(model: Any) -> TunedModel:
    """Gives a tuned model as it is, and wraps a model of peft as a `pcx.PeftModel`.

    Raises:
        ValueError: the model is neither.
    """
    if isinstance(model, TunedModel):
        return model
    if isinstance(model, nn.Module) and is_peft(model):
        return PeftModel(model)
    check_unwrapped(model, "model", "wrap it again afterwards")
    raise ValueError(
        f"model: a {type(model).__name__}, expected a tuned model, such as pcx.VPT or pcx.Full, or "
        "a model of peft"
    )


def _heads(backbone: nn.Module) -> list[nn.Module]:
    return [backbone.get_submodule(name) for name in library_facts(backbone)["heads"]]


def _stands_twice(name: str) -> bool:
    """Whether a name is of a module that peft replaced, or a second one of its replacement.

    The replacement of `head` is `head.modules_to_save.default`, and peft's name of it is `head`.
    """
    return ".original_module." in name or ".modules_to_save." in name


def _as_json(value: Any) -> Any:
    """Turns sets into sorted lists, and enumerations into their values."""
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_as_json, value))
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return getattr(value, "value", value)
