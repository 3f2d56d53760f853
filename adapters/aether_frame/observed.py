"""Observed dicts of a frame: they tell the binding of a change in the tick in which it happens.

`WatchedRegistry` and `NestedDict` call back when an entry comes or goes. `KeyedIndex` holds what a
service keeps beside a resource under the resource's own id (a configuration, a list of sessions):
such an entry may be older than the resource, so that it dangles only once the resource was there and
has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapters.observed_dict import ObservedDict
from adapters.registry import Index, Registry
from store.messages import IndexEntry

Hook = Callable[[Any, Any], None]
"""(key, value) -> nothing."""


class WatchedRegistry(Registry):
    """A primary registry that says what came and what left, after it was recorded."""

    def __init__(
        self, kind: str, content: Mapping[Any, Any], *, came: Hook, left: Hook, **options: Any
    ) -> None:
        super().__init__(kind, content, **options)
        self._came, self._left = came, left

    def _added(self, key: Any, value: Any) -> None:
        super()._added(key, value)
        self._came(key, value)

    def _replaced(self, key: Any, old: Any, new: Any) -> None:
        super()._replaced(key, old, new)
        if old is not new:
            self._left(key, old)
            self._came(key, new)

    def _removed(self, key: Any, value: Any) -> None:
        super()._removed(key, value)
        self._left(key, value)


class NestedDict(ObservedDict):
    """A dict inside an entry of a registry, whose own entries are resources."""

    def __init__(self, content: Mapping[Any, Any], *, came: Hook, left: Hook) -> None:
        super().__init__(content)
        self._came, self._left = came, left

    def _added(self, key: Any, value: Any) -> None:
        self._came(key, value)

    def _replaced(self, key: Any, old: Any, new: Any) -> None:
        if old is not new:
            self._left(key, old)
            self._came(key, new)

    def _removed(self, key: Any, value: Any) -> None:
        self._left(key, value)


class KeyedIndex(Index):
    """An index whose keys are ids of resources of one kind; see the head of this file.

    Args:
        name: of the registry.
        kind: of the resources that the keys name.
        content: what is in it already.
        targets: the references that an entry names besides.
        changed: called with an entry whenever it is looked at; with None for one that went.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        content: Mapping[Any, Any],
        *,
        targets: Callable[[Any, Any], Iterable[str]] | None = None,
        changed: Callable[[Any, Any], None] | None = None,
    ) -> None:
        super().__init__(name, content=content, targets=targets or (lambda key, value: ()))
        self._kind = kind
        self._changed = changed
        self._ended: set[Any] = set()

    def _lines(self, key: Any, value: Any) -> frozenset[IndexEntry]:
        lines = super()._lines(key, value)
        if key in self._ended:
            lines |= {IndexEntry(self.name, str(key), f"{self._kind}/{key}", True)}
        return lines

    def _look(self, key: Any) -> None:
        super()._look(key)
        if self._changed is not None:
            self._changed(key, dict.get(self, key))

    def _removed(self, key: Any, value: Any) -> None:
        self._ended.discard(key)
        super()._removed(key, value)

    def begin(self, key: Any) -> None:
        """The resource under this key is alive."""
        if key in self._ended:
            self._ended.discard(key)
            self._look(key)

    def end(self, key: Any) -> None:
        """The resource under this key is gone."""
        if key in self:
            self._ended.add(key)
            self._look(key)
