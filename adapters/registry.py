"""Registries: the dicts of a service that hold its resources, or name them.

`Registry` (primary: it holds the objects) and `Index` (it maps keys to ids of what it names) are
observed dicts with the same content and behaviour as those whose place they take; the host hears of
every change in the same tick.

A value that lists several ids is a list of the service's own, which it changes in place; nobody is
told of that, so `Index.rescan` looks, from time to time and before a forced pass.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from adapters.observed_dict import ObservedDict
from store.event import is_ref
from store.messages import IndexEntry

if TYPE_CHECKING:
    from adapters.holdings import Holdings

_KIND = re.compile(r"[^\s/]+")

Teardown = Callable[[str, Any], Awaitable[None] | None]
"""(id, object) -> nothing; may be a coroutine function."""


class Registry(ObservedDict):
    """A primary registry: it holds the objects themselves.

    Args:
        kind: of the resources, `session`, `runner`, …
        content: what is in it already; it is adopted when the registry joins a host.
        name: shown to people; the kind where nothing better is known.
        teardown: ends one object, `(id, object)`; plain or async. None calls the object's own
            `aclose` or `close`, if it has one. The entry is removed afterwards if it still stands.
        save: called before an idle resource goes, `(id, object)`; when it fails, the resource stays.
        uses: the references that an entry keeps alive, or one reference, `(id, object)`.
        owned_by: the reference that an entry dies with, `(id, object)`; None while it is not known,
            then it is asked again later.
        user: whose an entry is, `(id, object)`, for limits per user.
        in_use: how many hold an entry acquired by the service's own count, `(id, object)`. It is
            asked from time to time, and in the tick in which a teardown is checked.
        used: a mark that changes with each use that the service notes in the object itself, such as
            its time of last activity, `(id, object)`. Asked when `in_use` is; what the entry uses
            is then asked anew, too.
        close_removed: what closes an object that the service takes out of the registry without
            closing it, `(id, object)`; True calls its own `aclose` or `close`. Until it is closed
            it counts as a resource of kind `unclosed_<kind>`. None leaves that to the service.
        id: makes the id from the key.

    Attributes:
        noted: entries that the host knows of; another length than that means a change behind our
            back.
        strays: references held that the host does not know of.
        unclosed: holds what was taken out and is not closed yet, by identity.
        removed: what such an object was, on its way there.
        looked: how far the host has come in looking at the objects themselves.
    """

    def __init__(
        self,
        kind: str,
        content: Mapping[Any, Any] | None = None,
        *,
        name: str | None = None,
        teardown: Teardown | None = None,
        save: Teardown | None = None,
        uses: Callable[[str, Any], str | Iterable[str]] | None = None,
        owned_by: Callable[[str, Any], str | None] | None = None,
        user: Callable[[str, Any], str | None] | None = None,
        in_use: Callable[[str, Any], int] | None = None,
        used: Callable[[str, Any], Any] | None = None,
        close_removed: Teardown | Literal[True] | None = None,
        id: Callable[[Any], str] = str,
    ) -> None:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{kind!r} is no kind of resource: a word without spaces and slashes")
        super().__init__(content)
        self.kind = kind
        self.name = name or kind
        self.teardown = teardown
        self.save = save
        self.uses = uses
        self.owned_by = owned_by
        self.user = user
        self.in_use = in_use
        self.used = used
        self.id = id
        self.close_removed = close_removed
        self.unclosed: Registry | None = None
        self.removed: dict[str, str] = {}
        self.host: Holdings | None = None
        self.noted = 0
        self.looked = 0
        self.strays: set[str] = set()

    def ref(self, key: Any) -> str:
        """The reference of the entry under `key`."""
        return f"{self.kind}/{self.id(key)}"

    def _added(self, key: Any, value: Any) -> None:
        if self.host is not None:
            self.host.entry_added(self, key, value)

    def _replaced(self, key: Any, old: Any, new: Any) -> None:
        if self.host is None:
            return
        if old is new:
            self.host.entry_used(self.ref(key))
        else:
            self.host.entry_removed(self, key, old, reason="replaced by another object")
            self.host.entry_added(self, key, new)

    def _removed(self, key: Any, value: Any) -> None:
        if self.host is not None:
            self.host.entry_removed(self, key, value)


class Findings(Registry):
    """What somebody found in the process and nobody declared: in the inventory, never in the log.

    Its entries are untracked drift, which is shown and counted; the policy `untracked = "teardown"`
    has them ended by `teardown`.

    Args:
        kind: of the findings.
        teardown: ends one, `(id, finding)`; None where there is nothing to end, as with a trend.
        name: shown to people.
    """

    def __init__(
        self, kind: str, *, teardown: Teardown | None = None, name: str | None = None
    ) -> None:
        super().__init__(kind, name=name, teardown=teardown)

    def _added(self, key: Any, value: Any) -> None:
        if self.host is not None:
            self.host.stray_added(self, key)

    def _replaced(self, key: Any, old: Any, new: Any) -> None: ...

    def _removed(self, key: Any, value: Any) -> None:
        if self.host is not None:
            self.host.stray_removed(self, key)


class Index(ObservedDict):
    """An index registry: its entries name resources that live elsewhere.

    Args:
        name: of the registry.
        names: kind of what the values name; a value is an id, or a list, set or tuple of ids, or
            None.
        content: what is in it already.
        key_names: kind of what the keys name, where they do: then an entry goes with that resource,
            whatever its value.
        targets: the references that an entry names, `(key, value)`, where ids are not what the
            values are.
    """

    def __init__(
        self,
        name: str,
        names: str | None = None,
        content: Mapping[Any, Any] | None = None,
        *,
        key_names: str | None = None,
        targets: Callable[[Any, Any], Iterable[str]] | None = None,
    ) -> None:
        if not names and not key_names and targets is None:
            raise ValueError(f"index {name}: say what it names: names=, key_names= or targets=")
        super().__init__(content)
        self.name = name
        self.names = names
        self.key_names = key_names
        self._targets = targets
        self.host: Holdings | None = None
        self._known: dict[Any, frozenset[IndexEntry]] = {}
        self._only_text_keys = all(isinstance(key, str) for key in self)

    def _lines(self, key: Any, value: Any) -> frozenset[IndexEntry]:
        # What cannot be a reference names nothing that ever lived.
        name = str(key).encode("utf-8", "replace").decode()
        lines = {IndexEntry(self.name, name, ref) for ref in self._named(key, value) if is_ref(ref)}
        if self.key_names is not None and is_ref(f"{self.key_names}/{key}"):
            lines.add(IndexEntry(self.name, name, f"{self.key_names}/{key}", True))
        return frozenset(lines)

    def _named(self, key: Any, value: Any) -> Iterator[str]:
        if self._targets is not None:
            yield from self._targets(key, value)
        elif self.names is not None and value is not None:
            ids = value if isinstance(value, list | tuple | set | frozenset) else (value,)
            for one in ids:
                yield f"{self.names}/{one}"

    def _added(self, key: Any, value: Any) -> None:
        self._look(key)

    def _replaced(self, key: Any, old: Any, new: Any) -> None:
        self._look(key)

    def _removed(self, key: Any, value: Any) -> None:
        self._look(key)

    def _look(self, key: Any) -> None:
        """Brings the inventory up to date with what the entry under `key` names now."""
        self._only_text_keys = self._only_text_keys and isinstance(key, str)
        if self.host is None:
            return
        before = self._known.get(key, frozenset())
        now = self._lines(key, dict.__getitem__(self, key)) if key in self else frozenset()
        if now == before:
            return
        if now:
            self._known[key] = now
        else:
            self._known.pop(key, None)
        self.host.entries_changed(before - now, now - before)

    def rescan(self) -> None:
        """Looks at every entry: lists may have been changed in place, and the dict behind our back."""
        for key in [*self, *(key for key in self._known if key not in self)]:
            self._look(key)

    def known(self) -> Iterator[IndexEntry]:
        """What its entries name, as last looked at."""
        for lines in self._known.values():
            yield from lines

    def forget(self) -> None:
        """Takes all its entries out of the inventory."""
        if self.host is not None:
            for lines in self._known.values():
                self.host.entries_changed(lines, frozenset())
        self._known.clear()

    def drop(self, key: str, target: str) -> bool:
        """Removes from the entry under `key` (as text) what names `target`; False if nothing does.

        An entry that names one resource goes as a whole. A list loses the one item, and goes when
        nothing is left in it, unless its key names something that still lives.

        Raises:
            ValueError: the entry names the target, and nothing in its value can be told to do so.
        """
        dropped = False
        # Keys come as text; with other keys in it, several may look the same.
        alike = [key] if self._only_text_keys else [real for real in self if str(real) == key]
        for real in [real for real in alike if real in self]:
            value = dict.__getitem__(self, real)
            lines = {line for line in self._lines(real, value) if line.target == target}
            if lines:
                self._drop_one(real, value, target, whole=any(line.whole for line in lines))
                dropped = True
            else:
                self._look(real)  # It names something else by now, or nothing.
        return dropped

    def _drop_one(self, key: Any, value: Any, target: str, *, whole: bool) -> None:
        if whole or not isinstance(value, list | set | tuple | frozenset):
            del self[key]
            return
        dead = [item for item in value if target in self._named(key, [item])]
        if not dead:
            raise ValueError(f"{self.name}[{key}]: no item of it names {target} by itself")
        if isinstance(value, tuple | frozenset):
            left: Any = type(value)(item for item in value if item not in dead)
            self[key] = left
        else:
            left = value
            for item in dead:
                value.remove(item)
        if not left and self.key_names is None:
            del self[key]
        else:
            self._look(key)
