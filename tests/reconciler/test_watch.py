"""`ProcessWatch` against its specification, `find_drift`, over any course of events."""

from __future__ import annotations

import random
from zlib import crc32

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.agenda import SLOT_MS, Agenda
from reconciler.drift import Drift, find_drift
from reconciler.fold import FleetState
from reconciler.graph import graph_of
from reconciler.policy import Policy
from reconciler.watch import Watches
from store.event import EventRow
from store.messages import Bucket as InventoryBucket
from store.messages import IndexEntry, Inventory, InventoryMirror, Summary, encode_message

PROCESS = "chat@host:1:1"
POLICIES = (
    Policy(session_idle_timeout=10, runner_idle_timeout=4, agent_idle_timeout=2, owner_timeout=5),
    Policy(session_idle_timeout=10, runner_idle_timeout="off", idle_timeouts={"lock": 3}),
    Policy(session_idle_timeout=6, max_sessions_per_user=2, max_runners=2),
)
KINDS = ("session", "runner", "agent", "lock")


class Course:
    """A process that lives at random, and the two who look at it."""

    def __init__(self, seed: int, policy: Policy) -> None:
        self.chance = random.Random(seed)
        self.policy = policy
        self.state = FleetState()
        self.watches = Watches(policy)
        self.mirror = InventoryMirror(PROCESS)
        self.now = 1_000_000
        self.seq = 0
        self.alive: list[str] = []
        self.entries: set[IndexEntry] = set()
        self.strays: set[str] = set()
        self.missing: set[str] = set()
        self.event("process_started", f"process/{PROCESS}")

    def event(self, type: str, ref: str, **more: object) -> None:
        self.seq += 1
        row = EventRow(type, ref, PROCESS, self.seq, **more)  # type: ignore[arg-type]
        self.watches.fold_page(self.state, (row,), (self.now,))

    def some(self) -> str | None:
        return self.chance.choice(self.alive) if self.alive else None

    def step(self) -> None:  # noqa: PLR0912 - one branch for each thing that can happen
        chance = self.chance
        ref = self.some()
        match chance.randrange(11):
            case 0 | 1 | 2:
                kind = chance.choice(KINDS)
                new = f"{kind}/{chance.randrange(12)}"
                below = [r for r in self.alive if r != new]
                uses = tuple(chance.sample(below, min(len(below), chance.randrange(3))))
                owner = chance.choice(below) if kind == "lock" and below else None
                attrs = {"user": chance.choice("ab")} if kind == "session" else None
                if kind == "lock" and owner is None:
                    attrs = {"awaits_owner": True}
                self.event("created", new, uses=uses, owned_by=owner, attrs=attrs)
                if new not in self.alive:
                    self.alive.append(new)
            case 3 if ref:
                self.event("reused", ref)
            case 4 if ref:
                self.event("reused", ref, attrs={"in_use": chance.randrange(2)})
            case 5 if ref:
                self.event("cleaned_up", ref)
                self.alive.remove(ref)
            case 6 if ref:
                self.event("reused", ref, attrs={"keep_alive_s": chance.choice([1, 20])})
            case 7:
                target = f"{chance.choice(KINDS)}/{chance.randrange(14)}"
                self.entries ^= {IndexEntry("map", str(chance.randrange(4)), target)}
            case 8:
                stray = f"{chance.choice(KINDS)}/{chance.randrange(14)}"
                if chance.random() < 0.3:
                    (self.strays if stray not in self.alive else self.missing).add(stray)
                else:
                    self.strays.clear()
                    self.missing.clear()
            case 9:
                self.publish()
            case _:
                # Whole slots of the agenda: it may be that much late, which is tested below.
                self.now += chance.choice([SLOT_MS, 400, 3000, 9000])

    def publish(self) -> None:
        """The inventory of this instant comes in, of the buckets that changed."""
        held = (set(self.alive) | self.strays) - self.missing
        lines: dict[str, InventoryBucket] = {}
        for ref in held:
            lines.setdefault(str(crc32(ref.encode()) % 3), InventoryBucket([], [])).held.append(ref)
        for entry in self.entries:
            bucket = lines.setdefault(
                str(crc32(entry.target.encode()) % 3), InventoryBucket([], [])
            )
            bucket.entries.append(entry)
        buckets = {n: (str(self.seq), encode_message(b)) for n, b in lines.items()}
        buckets |= {n: ("", b"") for n in self.mirror.digests if n not in buckets}
        kinds = ("agent", "runner", "session")
        change = self.mirror.update(Summary(PROCESS, self.seq, kinds), str(self.seq), buckets)
        self.watches.of(self.state.processes[PROCESS]).inventory_changed(change)

    def by_specification(self) -> Drift:
        inventory = self.mirror.inventory()
        known: dict[str, Inventory] = {} if inventory is None else {PROCESS: inventory}
        return find_drift(self.state, known, self.policy, self.now)


class TestProcessWatch:
    @settings(max_examples=300, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        policy=st.sampled_from(POLICIES),
        steps=st.integers(1, 120),
        late=st.booleans(),
    )
    def test_finds_what_the_specification_finds(
        self, seed: int, policy: Policy, steps: int, late: bool
    ) -> None:
        """After any events and inventories the watch gives the drift that a look at everything gives."""
        course = Course(seed, policy)
        if not late:
            course.watches.of(course.state.processes[PROCESS])
        for _ in range(steps):
            course.step()
            if course.chance.random() < 0.5:
                watch = course.watches.of(course.state.processes[PROCESS])
                found, expected = watch.drift(course.now), course.by_specification()
                assert set(found.orphans) == set(expected.orphans)
                assert set(found.dangling) == set(expected.dangling)
                assert set(found.ghosts) == set(expected.ghosts)
                assert set(found.untracked) == set(expected.untracked)

    @settings(max_examples=200, deadline=None)
    @given(seed=st.integers(0, 2**32), policy=st.sampled_from(POLICIES[:2]))
    def test_wakes_up_in_time(self, seed: int, policy: Policy) -> None:
        """Whatever becomes an orphan by the clock alone is on the agenda for that moment or before."""
        course = Course(seed, policy)
        for _ in range(60):
            course.step()
        watch = course.watches.of(course.state.processes[PROCESS])
        for _ in range(200):
            found = set(watch.drift(course.now).orphans)
            assert found == set(course.by_specification().orphans)
            at = watch.next_at()
            if at == float("inf"):
                course.now += 10_000_000
                assert {o.ref for o in course.by_specification().orphans} == {o.ref for o in found}
                return
            # Up to the next moment on the agenda nothing else becomes an orphan.
            course.now = max(course.now, int(at) - SLOT_MS)
            before = {o.ref for o in course.by_specification().orphans}
            assert before == {o.ref for o in found}
            course.now = max(course.now + SLOT_MS, int(at))

    @settings(max_examples=150, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def test_keeps_the_graph(self, seed: int) -> None:
        """The edges it keeps are those that a look at the state gives."""
        course = Course(seed, POLICIES[0])
        watch = course.watches.of(course.state.processes[PROCESS])
        for _ in range(100):
            course.step()
        expected = graph_of(watch.process, course.mirror.inventory())
        assert {k: set(v) for k, v in watch.graph.users.items()} == {
            k: set(v) for k, v in expected.users.items()
        }
        assert watch.graph.owned == expected.owned
        assert {k: set(v) for k, v in watch.graph.named.items()} == {
            k: set(v) for k, v in expected.named.items()
        }


class TestAgenda:
    @given(st.lists(st.integers(0, 20_000_000)), st.integers(0, 20_000_000))
    def test_gives_everything_in_time(self, moments: list[int], now: int) -> None:
        """What is due comes, once; what is not comes early by a thousandth of the wait at most."""
        agenda = Agenda()
        for number, at in enumerate(moments):
            agenda.add(at, f"a/{number}", 0)
        agenda.add(float("inf"), "never/1", 0)
        first = agenda.pop_due(now)
        assert {f"a/{n}" for n, at in enumerate(moments) if at <= now - SLOT_MS} <= set(first)
        assert all(moments[int(ref[2:])] * (1 - 1 / 1024) <= now for ref in first)
        assert agenda.next_at() > now
        rest = agenda.pop_due(20_000_000 + SLOT_MS)
        assert sorted([*first, *rest]) == sorted(f"a/{n}" for n in range(len(moments)))
        assert agenda.next_at() == float("inf")

    def test_far_moments_share_slots(self) -> None:
        """A hundred thousand moments an hour ahead, each its own, take some thousand slots."""
        agenda = Agenda()
        for number in range(100_000):
            agenda.add(3_600_000 + number * 36, f"a/{number}", 0)
        assert len(agenda) == 100_000
        assert len(agenda._order) < 2000


def test_a_long_chain():
    """What used what, thousands deep, is let go by its top: everything in it has a moment then."""
    course = Course(0, Policy(idle_timeouts={"link": 1}))
    for number in reversed(range(3000)):
        course.event("created", f"link/{number}", uses=(f"link/{number + 1}",))
    course.event("created", "session/s", uses=("link/0",), attrs={"in_use": 1})
    watch = course.watches.of(course.state.processes[PROCESS])
    course.now += 1000
    assert not list(watch.drift(course.now).orphans)
    course.event("reused", "session/s", attrs={"in_use": 0})
    course.now += 24 * 3600_000
    assert len(list(watch.drift(course.now).orphans)) == 3001
