"""The life of a resource, gathered from the log: who made it, who used it, what ended it. Pure.

The fold keeps what is alive now and forgets the rest; a life is the opposite: everything that the log
says of one reference, in every process that ever held it, whatever has become of it. `Lives` listens
to all events, because a life is also told by others: by who uses it, by its owner's end, by its
process's end. What is kept of each is bounded.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from reconciler.fold import Event, Resource
from store.messages import NO_PROCESS

KEPT = 200
"""Uses, former users and orders of one life that are kept: the latest."""
ASKED_KEPT = 50_000
"""Orders under way that are remembered, to know by which of them another resource went along."""
REFS_KEPT = 200_000
"""Other references that are kept to offer the nearest, when the one asked for is unknown."""

_BEGINS = frozenset({"created", "adopted", "reused"})
_ENDS = frozenset({"process_stopped", "process_lost"})
_OUTCOMES = frozenset({"cleaned_up", "cleanup_failed", "cleanup_refused", "adopted"})
_WRITER = re.compile(r"(?P<name>.+)-p(?P<partition>\d+)-e(?P<epoch>\d+)@(?P<where>.+?:\d+):")


@dataclass(frozen=True, slots=True)
class Worker:
    """Who sent an order: the worker, and the lease it acted under.

    Attributes:
        name: `name@hostname:pid`.
        partition, epoch: of the lease; None where the writer was no worker of ours.
    """

    name: str
    partition: int | None = None
    epoch: int | None = None

    @classmethod
    def of(cls, writer: str) -> Worker:
        """The worker that an event was written by; its writer's id carries partition and epoch."""
        found = _WRITER.match(writer)
        if found is None:
            return cls(writer)
        where = f"{found['name']}@{found['where']}"
        return cls(where, int(found["partition"]), int(found["epoch"]))


@dataclass(slots=True)
class Moment:
    """An event that touches a life, as far as a life needs it."""

    id: str
    type: str
    ref: str
    process: str
    seq: int
    reason: str = ""
    order_id: str = ""
    trace_id: str = ""

    @property
    def at_ms(self) -> int:
        return int(self.id.partition("-")[0])

    @classmethod
    def of(cls, entry_id: str, event: Event) -> Moment:
        trace = getattr(event, "trace_id", None)
        return cls(
            entry_id, str(event.type), event.ref, event.process, event.seq,
            event.reason or "", event.order_id or "", trace or "",
        )  # fmt: skip


@dataclass(slots=True)
class Trial:
    """One order to end it, and what came of it.

    Attributes:
        asked: the `cleanup_requested`.
        worker: who sent it.
        sort: the sort of drift that it was to end.
        seq: the last seq of the resource that the worker knew.
        outcome: the event that answered it; None as long as there is none.
    """

    asked: Moment
    worker: Worker
    sort: str
    seq: int
    outcome: Moment | None = None


@dataclass(slots=True)
class User:
    """Something that used it: from when, and to when."""

    ref: str
    since_ms: int
    until_ms: int | None = None
    end: Moment | None = None


@dataclass(slots=True)
class Life:
    """One resource in one process, from its first event to its end.

    Attributes:
        ref, process: which, where.
        began: its first event.
        uses, owned_by, user, in_use: as last said.
        used: (Redis time in ms, by whom), its own uses and those of what uses it; `use_count` in all.
        last_use: the latest of them.
        users: what used it, the latest last.
        trials: orders to end it.
        entries: index entries naming it that were removed by order: (what, the event).
        ended: the event that ended it, its own or its process's; None while it lives.
        end_trial: the order by which it ended, its own or that of what it went along with.
        owner_ended: the end of its owner.
    """

    ref: str
    process: str
    began: Moment
    uses: tuple[str, ...] = ()
    owned_by: str | None = None
    user: str | None = None
    in_use: int = 0
    used: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=KEPT))
    use_count: int = 0
    last_use: tuple[int, str, Moment] | None = None
    users: dict[str, User] = field(default_factory=dict)
    users_ended: deque[User] = field(default_factory=lambda: deque(maxlen=KEPT))
    users_count: int = 0
    trials: deque[Trial] = field(default_factory=lambda: deque(maxlen=KEPT))
    trials_count: int = 0
    entries: deque[tuple[str, Moment]] = field(default_factory=lambda: deque(maxlen=KEPT))
    ended: Moment | None = None
    end_trial: Trial | None = None
    owner_ended: Moment | None = None

    @property
    def alive(self) -> bool:
        return self.ended is None

    @property
    def lost_with_process(self) -> bool:
        return self.ended is not None and self.ended.type in _ENDS

    def last_user(self) -> User | None:
        """The user that left it last."""
        return self.users_ended[-1] if self.users_ended else None


class Lives:
    """All lives of one reference, gathered event by event, in the order of each partition.

    Args:
        ref: the resource.

    Attributes:
        lives: by when they began, once `sorted` was called; otherwise in the order they were found.
        refs: other references that the log knows, to offer the nearest.
    """

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.lives: list[Life] = []
        self.refs: dict[str, None] = {}
        self._open: dict[str, Life] = {}
        self._closed: dict[str, Life] = {}
        self._early: dict[str, dict[str, User]] = {}
        self._asked: dict[str, Trial] = {}

    def see(self, entry_id: str, event: Event) -> None:
        """Takes up one event."""
        kind, ref = event.type, event.ref
        holder = event.holder or event.process
        if kind in _ENDS:
            life = self._open.pop(holder, None)
            if life is not None:
                self._end(life, Moment.of(entry_id, event))
            self._closed.pop(holder, None)
            self._early.pop(holder, None)
        elif ref == self.ref:
            self._own(entry_id, event, holder)
        else:
            if kind in _BEGINS and len(self.refs) < REFS_KEPT:
                self.refs[ref] = None
            if kind == "cleanup_requested" and event.order_id:
                self._remember(entry_id, event)
            life = self._open.get(holder)
            if life is not None:
                self._others(life, entry_id, event)
            elif kind in _BEGINS and event.uses and self.ref in event.uses:
                # A service may tell of the user before it tells of what is used.
                user = User(ref, Moment.of(entry_id, event).at_ms)
                self._early.setdefault(holder, {})[ref] = user
            elif kind == "cleaned_up" and holder in self._early:
                self._early[holder].pop(ref, None)
            if kind in _OUTCOMES and event.order_id:
                asked = self._asked.get(event.order_id)
                if asked is not None and asked.asked.ref == ref:
                    del self._asked[event.order_id]

    def assume(self, process: str, resource: Resource) -> None:
        """Takes up what is alive and was made before the first event seen."""
        if process in self._open:
            return
        moment = Moment(f"{resource.created_ms}-0", "created", self.ref, process, resource.seq)
        moment.reason = "its beginning is no longer in the log"
        life = self._open[process] = Life(self.ref, process, moment)
        life.uses, life.owned_by = resource.uses, resource.owned_by
        life.user, life.in_use = resource.user, resource.in_use
        self.lives.append(life)

    def sorted(self) -> list[Life]:
        """The lives, the earliest first."""
        self.lives.sort(key=lambda life: (life.began.at_ms, life.began.seq))
        return self.lives

    # --- events about the resource itself -------------------------------------------------------

    def _own(self, entry_id: str, event: Event, holder: str) -> None:
        kind, attrs = event.type, event.attrs or {}
        if "registry" in attrs:
            self._entry(entry_id, event, holder)
            return
        life = self._open.get(holder)
        if kind in _BEGINS:
            if life is None:
                life = self._open[holder] = Life(self.ref, holder, Moment.of(entry_id, event))
                life.users = self._early.pop(holder, {})
                life.users_count = len(life.users)
                self.lives.append(life)
            else:
                _use(life, self.ref, Moment.of(entry_id, event))
            _take_edges(life, event)
        elif life is None:
            if kind == "cleaned_up" and holder == NO_PROCESS:
                # A conversation: of its life the log tells the end only.
                moment = Moment.of(entry_id, event)
                life = Life(self.ref, holder, moment, ended=moment)
                self.lives.append(life)
            return
        elif kind == "cleanup_requested":
            life.trials.append(_trial(entry_id, event))
            life.trials_count += 1
        elif kind == "cleaned_up":
            del self._open[holder]
            self._end(life, Moment.of(entry_id, event))
        if kind in _OUTCOMES and event.order_id:
            for trial in life.trials:
                if trial.asked.order_id == event.order_id:
                    trial.outcome = Moment.of(entry_id, event)

    def _remember(self, entry_id: str, event: Event) -> None:
        self._asked[event.order_id or ""] = _trial(entry_id, event)
        if len(self._asked) > ASKED_KEPT:
            del self._asked[next(iter(self._asked))]

    def _entry(self, entry_id: str, event: Event, holder: str) -> None:
        attrs = event.attrs or {}
        life = self._open.get(holder) or self._closed.get(holder)
        if life is not None and event.type == "cleaned_up":
            life.entries.append(
                (f"{attrs['registry']}[{attrs['key']}]", Moment.of(entry_id, event))
            )

    def _end(self, life: Life, moment: Moment) -> None:
        life.ended = moment
        life.in_use = 0
        life.end_trial = next((t for t in life.trials if t.asked.order_id == moment.order_id), None)
        if life.end_trial is None and moment.order_id:
            # It went along with something else, by the order for that.
            life.end_trial = self._asked.get(moment.order_id)
        self._closed[life.process] = life
        for user in life.users.values():
            user.until_ms = moment.at_ms
            life.users_ended.append(user)
        life.users.clear()

    # --- events about others ----------------------------------------------------------------------

    def _others(self, life: Life, entry_id: str, event: Event) -> None:
        kind, ref = event.type, event.ref
        if kind in _BEGINS:
            if event.uses is not None:
                if self.ref in event.uses:
                    if ref not in life.users:
                        life.users[ref] = User(ref, Moment.of(entry_id, event).at_ms)
                        life.users_count += 1
                else:
                    self._left(life, ref, Moment.of(entry_id, event))
            if ref in life.users:
                _use(life, ref, Moment.of(entry_id, event))
        elif kind == "cleaned_up" and "registry" not in (event.attrs or {}):
            if ref == life.owned_by:
                life.owner_ended = Moment.of(entry_id, event)
            if ref in life.users:
                moment = Moment.of(entry_id, event)
                _use(life, ref, moment, count=False)
                self._left(life, ref, moment)

    def _left(self, life: Life, ref: str, moment: Moment) -> None:
        user = life.users.pop(ref, None)
        if user is not None:
            user.until_ms, user.end = moment.at_ms, moment
            life.users_ended.append(user)


def _trial(entry_id: str, event: Event) -> Trial:
    attrs = event.attrs or {}
    expected = attrs.get("expected_seq")
    return Trial(
        Moment.of(entry_id, event),
        Worker.of(event.process),
        str(attrs.get("sort", "orphan")),
        expected if isinstance(expected, int) else 0,
    )


def _use(life: Life, by: str, moment: Moment, *, count: bool = True) -> None:
    life.last_use = (moment.at_ms, by, moment)
    if count:
        life.used.append((moment.at_ms, by))
        life.use_count += 1


def _take_edges(life: Life, event: Event) -> None:
    if event.uses is not None:
        life.uses = event.uses
    if event.owned_by is not None:
        life.owned_by = event.owned_by
    attrs = event.attrs or {}
    in_use, user = attrs.get("in_use"), attrs.get("user")
    if isinstance(in_use, int):
        life.in_use = int(in_use)
    if user is not None:
        life.user = str(user)
