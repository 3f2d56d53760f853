"""Links: which resources of this process use which, so that what is used is never torn down."""

from __future__ import annotations

from collections.abc import Container, Iterable

from adapters.entry import Entry
from store.event import check_ref


class Links:
    """Who uses what, among what is alive; what is used need not be."""

    def __init__(self) -> None:
        self._users: dict[str, dict[str, None]] = {}

    def references(self, uses: str | Iterable[str]) -> tuple[str, ...]:
        """What something uses, as references; a text is one of them.

        Raises:
            ValueError: one is not `kind/id`.
        """
        refs = (uses,) if isinstance(uses, str) else tuple(uses)
        for ref in refs:
            if ref not in self._users:  # Else it was looked at already.
                check_ref(ref)
        return refs

    def put(self, entry: Entry, uses: tuple[str, ...]) -> None:
        """An entry uses these from now on, and no others."""
        for used in entry.uses:
            users = self._users.get(used)
            if users is not None:
                users.pop(entry.ref, None)
                if not users:
                    del self._users[used]
        entry.uses = uses
        for used in uses:
            self._users.setdefault(used, {})[entry.ref] = None

    def user_of(self, ref: str, besides: Container[str]) -> str | None:
        """Something that uses `ref`, if there is anything, itself and some others aside."""
        users = self._users.get(ref, ())
        return next((user for user in users if user != ref and user not in besides), None)
