"""Methods with arguments as text, such as "vpt:num_prompts=50,kind=shallow"."""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pcx.models import HEAD_INITS, METHODS
from pcx.models.base import TunedModel
from pcx.models.vpt.locations import LOCATIONS

PROMPTS = 20  # of a VPT whose text says nothing of them
# Arguments that do not come from a text, and where they come from.
GIVEN = {
    "backbone": "the backbone",
    "channels": "the training images",
    "images": "the training images",
    "num_classes": "the task",
    "head_init": "the argument head_init",
}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "none",
}
_CONSTANTS = {"true": True, "false": False, "none": None}
ALL_LINEAR = "all-linear"  # peft's word, which stands for no module of that name


@dataclass(frozen=True)
class Method:
    """A method and the arguments of its class.

    Attributes:
        text: as it was written.
        name: in `pcx.METHODS`.
        arguments: by name, as the class takes them.
    """

    text: str
    name: str
    arguments: dict[str, Any]

    def with_arguments(self, arguments: dict[str, Any]) -> Method:
        """The method with further arguments, which do not stand in its text."""
        return replace(self, arguments={**self.arguments, **arguments})

    def takes(self, argument: str) -> bool:
        """Whether the method's class has an argument of that name."""
        return argument in _parameters(self.name)


def parse_method(text: str) -> Method:
    """Reads a method's text by the signature of its class.

    "name" or "name:argument=value,argument=value". A '+' separates the members of a list, as in
    "vpt:num_prompts=8+8+4" and "peft:peft_type=LORA,r=8,target_modules=qkv+proj".

    Raises:
        ValueError: there is no such method or argument, or a value is of another kind.
    """
    name, colon, rest = text.strip().partition(":")
    METHODS.get_checked(name)
    if colon and not rest:
        raise ValueError(f"method: {text!r} ends in ':'; {_usage(name)}")
    hints, found = _hints(name), {}
    written = [part.partition("=") for part in rest.split(",")] if rest else []
    if _takes_config(name):
        hints = _peft_hints(name, {key.strip(): value.strip() for key, _, value in written})
    for key, equals, value in ((key.strip(), e, v.strip()) for key, e, v in written):
        if not equals:
            raise ValueError(f"method: {name}: {key!r}, expected argument=value; {_usage(name)}")
        if key in found:
            raise ValueError(f"method: {name}: {key} is given twice; leave one out")
        if key not in hints:
            raise ValueError(_unknown(name, key, hints))
        found[key] = _value(value, hints[key], f"method: {name}: {key}")
    return Method(text.strip(), name, found)


def build_method(
    method: str | Method,
    backbone: nn.Module,
    loader: Any,
    *,
    num_classes: int | None = None,
    head_init: str = HEAD_INITS[0],
) -> TunedModel:
    """Builds the tuned model of a method's text.

    Args:
        method: a text as `parse_method` reads it, or what it gave.
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        loader: of training images and labels, for the methods that look at them, such as SCT.
        num_classes: size of a new head; None keeps the backbone's size.
        head_init: as the classes take it.

    Raises:
        ValueError: the method is not built from a backbone, an argument is out of range or missing,
            or the backbone does not fit.
    """
    chosen = parse_method(method) if isinstance(method, str) else method
    cls, parameters = METHODS[chosen.name], _parameters(chosen.name)
    arguments = {**_defaults(parameters, chosen.arguments), **chosen.arguments}
    if "config" in parameters:
        arguments = {"config": _peft_config(chosen.name, arguments)}
    if "channels" in parameters:
        arguments["channels"] = loader
    if "images" in parameters and arguments.get("init", "published") != "published":
        arguments["images"] = loader
    arguments |= {"num_classes": num_classes, "head_init": head_init}
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise ValueError(f"method: {chosen.text!r} lacks {missing[0]}; {_usage(chosen.name)}")
    try:
        return cls(backbone, **arguments)
    except ValueError as error:
        argument = re.match(r"\w+", str(error))
        if argument and f"{argument[0]}=" in chosen.text:
            raise ValueError(f"method: {chosen.name}: {error}") from error
        raise


def _defaults(parameters: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a class needs and its text does not say: the number of prompts, where it is counted."""
    if "num_prompts" not in parameters:
        return {}
    location = LOCATIONS.get(given.get("location", "prepend"))
    return {"num_prompts": PROMPTS if location is None or location.among else 0}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a method's class.

    Raises:
        ValueError: it takes neither a backbone nor a configuration.
    """
    parameters = dict(inspect.signature(METHODS[name]).parameters)
    if not {"backbone", "config"} & set(parameters):
        raise ValueError(f"method: {name!r} is not built from a backbone; use it in Python")
    return parameters


def _takes_config(name: str) -> bool:
    return "config" in _parameters(name)


def _hints(name: str) -> dict[str, Any]:
    """The types of the arguments that a text may give."""
    try:
        hints = typing.get_type_hints(METHODS[name].__init__)
    except NameError:  # of types that are imported for a type checker alone
        hints = {}
    texts = [n for n in _parameters(name) if n not in GIVEN]
    return {argument: hints.get(argument, Any) for argument in texts}


def _usage(name: str) -> str:
    """What a method takes, in words."""
    if _takes_config(name):
        return f"{name} takes peft_type and the arguments of peft's configuration of that type"
    taken = [f"{a}={' or '.join(_kinds(hint))}" for a, hint in _hints(name).items()]
    return f"{name} takes {', '.join(taken)}" if taken else f"{name} takes no arguments"


def _unknown(name: str, key: str, hints: dict[str, Any]) -> str:
    if key in GIVEN and key in _parameters(name):
        return f"method: {name}: {key} comes from {GIVEN[key]}, not from the text; leave it out"
    near = difflib.get_close_matches(key, hints, n=2)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    taken = _usage(name).removeprefix(f"{name} takes ")
    return f"method: {name} has no argument {key!r}.{hint} It takes {taken}"


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _is_list(option: Any) -> bool:
    origin = typing.get_origin(option)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _kinds(hint: Any) -> list[str]:
    """What values a type has, in words."""
    found = []
    for option in _options(hint):
        if _is_list(option):
            found.append("a list as a+b")
        elif typing.get_origin(option) is typing.Literal:
            found += [str(value) for value in typing.get_args(option)]
        else:
            found.append(_WORDS.get(option, "text"))
    return list(dict.fromkeys(found))


def _value(text: str, hint: Any, where: str) -> Any:
    """The value that a text stands for, of the first kind that it can be.

    Raises:
        ValueError: it is of none of the kinds that the type has.
    """
    options = _options(hint)
    lists = [option for option in options if _is_list(option)]
    if lists and text != "none":
        (member,) = typing.get_args(lists[0])[:1] or (Any,)
        # peft reads the text "qkv" as a pattern of whole names, the list ["qkv"] as their ends.
        alone = str in options and member is str and text != ALL_LINEAR
        if "+" in text or alone or set(options) <= {*lists, type(None)}:
            return [_value(part, member, where) for part in text.split("+")]
    if type(None) in options and text == "none":
        return None
    if bool in options and text in ("true", "false"):
        return _CONSTANTS[text]
    for kind, number in ((int, int), (float, float)):
        if kind in options:
            try:
                return number(text)
            except ValueError:
                pass
    if Any in options:
        return _guessed(text)
    texts = [option for option in options if option not in (bool, int, float, type(None))]
    if text and any(option not in lists for option in texts):
        return text
    raise ValueError(f"{where}: {text!r}, expected {' or '.join(_kinds(hint))}")


def _guessed(text: str) -> Any:
    """The value of a text whose type is not known."""
    if "+" in text:
        return [_guessed(part) for part in text.split("+")]
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    kinds: tuple[Callable[[str], Any], ...] = (int, float, str)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _peft_hints(name: str, written: dict[str, str]) -> dict[str, Any]:
    """The types of the arguments of the peft configuration whose type a text names.

    Raises:
        ValueError: it names none, or one that peft does not have.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    types_of_peft = {str(getattr(k, "value", k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = written.get("peft_type")
    if given not in types_of_peft:
        near = difflib.get_close_matches(str(given).upper(), types_of_peft, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"method: {name}: peft_type: {given!r}, expected one of {tuple(types_of_peft)}.{hint}"
        )
    try:
        hints = typing.get_type_hints(types_of_peft[given])
    except NameError:
        hints = {}
    taken = inspect.signature(types_of_peft[given]).parameters
    return {argument: hints.get(argument, Any) for argument in taken} | {"peft_type": str}


def _peft_config(name: str, arguments: dict[str, Any]) -> Any:
    """peft's configuration of these arguments.

    Raises:
        ValueError: peft refuses them.
    """
    from peft import get_peft_config

    try:
        return get_peft_config(arguments)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"method: {name}: peft refuses {arguments}: {error}") from error
