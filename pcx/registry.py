"""Tables of what people add to pcx: a name, and where the thing of that name is defined.

A table's values are strings "module:attribute". A module is imported when its entry is first asked
for, so a table can be listed (by `pcx train --help`, say) before torch is loaded, and a layer can
name what a higher layer defines without importing it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry(Mapping[str, Any]):
    """A read-only mapping of names to classes or functions, loaded when asked for.

    Args:
        argument: the name of the argument that chooses among the entries, for error messages.
        entries: name -> "module:attribute".

    Example:
        >>> METHODS = Registry("method", {"vpt": "pcx.models.vpt.model:VPT"})
        >>> METHODS["vpt"]  # imports pcx.models.vpt.model
    """

    def __init__(self, argument: str, entries: Mapping[str, str]):
        self.argument = argument
        self._entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> Any:
        """The entry of that name; a KeyError for a name that is not there (see `get_checked`)."""
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get_checked(self, name: str) -> Any:
        """The entry of that name.

        Raises:
            ValueError: there is none; the message names the argument, near matches and all entries.
        """
        if name not in self._entries:
            raise ValueError(self.unknown(name))
        return self[name]

    def unknown(self, name: Any) -> str:
        """What to say of a name that is not in the table."""
        near = difflib.get_close_matches(str(name), self._entries, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"{self.argument}: got {name!r}, expected one of {tuple(self._entries)}.{hint}"

    def add(self, name: str, entry: Any) -> None:
        """Adds an entry of your own: a class or function, or "module:attribute".

        Raises:
            ValueError: the name is taken by another entry.
        """
        taken = self._entries.get(name, entry)
        if taken != entry:
            raise ValueError(f"{self.argument}: {name!r} is taken by {taken}; choose another name")
        self._entries[name] = entry
