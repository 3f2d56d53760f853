"""Puts something in the place of an attribute, and takes it back without a trace.

Two sorts: a dict gives way to an observed one, under every name that means it (one dict may be known
by two names, and goes on being one); a method of one object gives way to a function that calls it.
The class of the object is never touched. What the service itself put there meanwhile is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from store.logs import get_logger

log = get_logger("adapters.aether_frame")

_MISSING: Any = object()


def find(owner: Any, name: str) -> Any:
    """An attribute of the service; None where this version of it has none, and a line in the log."""
    if owner is None:
        return None
    value = getattr(owner, name, None)
    if value is not None and hasattr(owner, "__dict__"):
        return value
    missing = "the service has no such attribute in this version; going on without it"
    fixed = "nothing can be put in its place, the object has slots; going on without it"
    event = missing if value is None else fixed
    log.warning(event, owner=type(owner).__name__, attribute=name)
    return None


class Substitutions:
    """What was put where, in the order in which it happened."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def take_back(self) -> None:
        """Undoes everything, the latest first."""
        while self._undo:
            self._undo.pop()()

    def on_take_back(self, undo: Callable[[], None]) -> None:
        """Has something else undone in its turn."""
        self._undo.append(undo)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Puts `value` under `name` into the object `owner` alone."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                log.warning(
                    "the service replaced it meanwhile; it is left as it is",
                    owner=type(owner).__name__, attribute=name,
                )  # fmt: skip
            elif before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def put_dict(
        self, owners: Iterable[Any], before: dict[Any, Any], after: dict[Any, Any]
    ) -> bool:
        """Puts `after` in the place of `before` under every name that the owners have for it.

        When it is taken back, the very dict of before stands there again, with the content that
        `after` has by then.

        Returns:
            False when no owner has it as an attribute of its own; nothing was done then.
        """
        places = [
            (owner, name) for owner in owners for name, value in vars(owner).items()
            if value is before
        ]  # fmt: skip
        if not places:
            return False

        def refill() -> None:
            before.clear()
            before.update(after)

        # Undone last, when every name means the old dict again.
        self._undo.append(refill)
        for owner, name in places:
            self.put(owner, name, after)
        return True
