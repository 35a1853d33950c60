"""Open sets: activations, formats and whatever a third party wants to add without editing this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from clt_plugin.core.errors import RegistryError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for.

    >>> greetings = Registry("greeting")
    >>> greetings.add("hello", "Hello!")
    'Hello!'
    >>> greetings["hello"]
    'Hello!'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` under ``name`` and return it. A name can be taken once."""
        if name in self._entries:
            raise RegistryError(f"the {self.kind} {name!r} is registered already: choose another name")
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget a name."""
        self[name]
        del self._entries[name]

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that does the same."""
        return lambda entry: self.add(name, entry)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise RegistryError(f"no {self.kind} is called {name!r}: the known ones are {known}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def values(self) -> list[T]:
        """Return what is registered, in the order of registration."""
        return list(self._entries.values())


FORMATS: Registry[Any] = Registry("format")
"""On-disk formats by name; `clt_plugin.formats` fills it."""

SERVICES: Registry[Any] = Registry("service")
"""What outer layers do for methods of the core: loading and publishing."""
