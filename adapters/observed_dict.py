"""Observed dicts: a plain dict of a service that tells of every change of itself, in the same tick.

Every way of changing one ends in `_added`, `_replaced` or `_removed`. A change must never fail because
of us: what goes wrong while it is noted is logged, and shows up as untracked drift. Copies are plain.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from store.logs import get_logger

log = get_logger("adapters.registry")

_MISSING = object()


class ObservedDict(dict[Any, Any]):
    """A dict that reports each change of itself, whichever method made it."""

    place: tuple[Callable[[], Any], str] | None = None

    def __init__(self, content: Mapping[Any, Any] | None = None) -> None:
        super().__init__(content or {})
        # A defaultdict goes on making its defaults.
        self.default_factory = content.default_factory if isinstance(content, defaultdict) else None

    # What changed; each is called after the change, in the same tick.
    def _added(self, key: Any, value: Any) -> None: ...
    def _replaced(self, key: Any, old: Any, new: Any) -> None: ...
    def _removed(self, key: Any, value: Any) -> None: ...

    def stands_in(self, owner: Any, attribute: str) -> None:
        """Remembers which attribute of which object it took the place of."""
        try:
            self.place = (weakref.ref(owner), attribute)
        except TypeError:  # Not everything can be referred to weakly.
            self.place = (lambda: owner, attribute)

    def displaced(self) -> Any:
        """What the service has put in its place meanwhile; None while it stands there itself."""
        if self.place is None:
            return None
        owner, attribute = self.place[0](), self.place[1]
        now = self if owner is None else getattr(owner, attribute, None)
        if now is None and self:
            return {}  # The service holds nothing there for now.
        return None if now is self else now

    def come_back(self) -> None:
        """Takes the place of the dict that the service has put there, with its content.

        Raises:
            TypeError: it is no dict that can be observed.
        """
        put, place = self.displaced(), self.place
        if put is None or place is None:
            return
        content = dict(observable(put, place[1]))
        self.default_factory = put.default_factory if isinstance(put, defaultdict) else None
        for key in [key for key in self if key not in content]:
            del self[key]
        for key, value in content.items():
            if self.get(key, _MISSING) is not value:
                self[key] = value
        if getattr(place[0](), place[1], None) is not None:
            setattr(place[0](), place[1], self)

    def note(self, note: Callable[..., object], *args: Any) -> None:
        """Calls what notes a change; the service does not hear of it when that fails."""
        try:
            note(*args)
        except Exception:
            name = getattr(self, "name", type(self).__name__)
            log.exception("a change of a registry could not be noted", registry=name)

    def __missing__(self, key: Any) -> Any:
        if self.default_factory is None:
            raise KeyError(key)
        value = self.default_factory()
        self[key] = value
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        old = self.get(key, _MISSING)
        super().__setitem__(key, value)
        if old is _MISSING:
            self.note(self._added, key, value)
        else:
            self.note(self._replaced, key, old, value)

    def __delitem__(self, key: Any) -> None:
        old = self.get(key, _MISSING)
        super().__delitem__(key)
        self.note(self._removed, key, old)

    def pop(self, key: Any, *default: Any) -> Any:
        size = len(self)
        value = super().pop(key, *default)
        if len(self) < size:
            self.note(self._removed, key, value)
        return value

    def popitem(self) -> tuple[Any, Any]:
        key, value = super().popitem()
        self.note(self._removed, key, value)
        return key, value

    def clear(self) -> None:
        items = list(self.items())
        super().clear()
        for key, value in items:
            self.note(self._removed, key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return super().__getitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ObservedDict:
        self.update(other)
        return self

    def copy(self) -> dict[Any, Any]:
        return self.plain()

    def __or__(self, other: Any) -> Any:
        return self.plain() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, shallow or deep, and a pickle are of the content: a second observer of the same
        # entries would record them twice.
        if self.default_factory is not None:
            return defaultdict, (self.default_factory, dict(self))
        return dict, (list(self.items()),)

    def plain(self) -> dict[Any, Any]:
        """The content as a dict of the original sort."""
        if self.default_factory is not None:
            return defaultdict(self.default_factory, self)
        return dict(self)


def observable(value: Any, what: str) -> dict[Any, Any]:
    """Returns `value` if it is a dict that can be observed.

    Raises:
        TypeError: it is not a dict, or one with methods that an observed dict has not.
    """
    if isinstance(value, ObservedDict):
        raise TypeError(f"{what} is observed already")
    if isinstance(value, OrderedDict) or not isinstance(value, dict):
        raise TypeError(
            f"{what} is a {type(value).__name__}; only a dict or a defaultdict can be observed"
        )
    return value
