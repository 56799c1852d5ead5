"""A tuned model's `config`: a method, and an object as Hugging Face's tools expect at that name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class Configuration:
    """What `model.config` is: called, it gives the method's settings as a dict.

    Hugging Face's Trainer and its loggers read and set attributes of a model's `config`. They may:
    what they set is kept for as long as they hold the object, and changes nothing of the model.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]]):
        self._settings = settings

    def __call__(self) -> dict[str, Any]:
        return self._settings()

    def to_dict(self) -> dict[str, Any]:
        """The settings, by the name that loggers use."""
        return self()

    def to_json_string(self) -> str:
        """The settings as JSON."""
        return json.dumps(self(), indent=2)


class ConfigMethod:
    """The attribute `config` of a class, around the function that gives a model's settings."""

    def __init__(self, function: Callable[[Any], dict[str, Any]]):
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, model: Any, cls: type | None = None) -> Any:
        if model is None:
            return self.function
        return Configuration(lambda: self.function(model))
