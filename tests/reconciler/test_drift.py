"""Drift: exact, because an inventory says of which event it is the state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler import FleetState, Policy, find_drift
from reconciler.drift import Drift
from reconciler.fold import fold
from store.event import EventRow
from store.messages import IndexEntry, Inventory
from tests.reconciler.model import NOW, P, histories, inventories
from tests.support import row

SESSION = "session/s"
ENTRY = IndexEntry("index", "k", SESSION)
KINDS = frozenset({"session"})


def state_of(*rows: EventRow, at_ms: int = NOW) -> FleetState:
    return fold((at_ms, one) for one in rows)


def drift_of(
    state: FleetState,
    as_of: int = 0,
    held: tuple[str, ...] = (),
    entries: tuple[IndexEntry, ...] = (),
    kinds: frozenset[str] = KINDS,
) -> Drift:
    inventory = Inventory(P, as_of, frozenset(held), entries, kinds)
    return find_drift(state, {P: inventory}, Policy(), NOW)


def sorts(drift: Drift) -> list[tuple[str, str]]:
    return [(item.sort, item.ref) for item in drift]


class TestProperties:
    """What holds for every log and every inventory."""

    @given(histories(), st.data())
    def test_an_older_inventory_says_nothing_about_newer_events(
        self, history: list[tuple[int, EventRow]], data: st.DataObject
    ):
        """Nothing whose last event is newer than the inventory is found to differ from it."""
        state = fold(history)
        if P not in state.processes:
            return
        inventory = data.draw(inventories(state))[P]
        as_of = data.draw(st.integers(0, inventory.as_of))
        old = Inventory(P, as_of, inventory.held, inventory.entries, inventory.kinds)
        process = state.processes[P]
        for item in find_drift(state, {P: old}, Policy(), NOW):
            if item.sort == "ghost":
                assert process.resources[item.ref].seq <= as_of
            elif item.sort == "untracked":
                assert item.ref not in process.resources
                assert process.gone.get(item.ref, 0) <= as_of
            elif item.sort == "dangling":
                assert process.gone.get(item.ref, 0) <= as_of

    @given(histories(), st.data())
    def test_an_inventory_ahead_of_the_fold_is_set_aside(
        self, history: list[tuple[int, EventRow]], data: st.DataObject
    ):
        """Until the fold has caught up, an inventory changes nothing."""
        state = fold(history)
        inventory = data.draw(inventories(state))[P]
        ahead = Inventory(
            P, inventory.as_of + 1, inventory.held, inventory.entries, inventory.kinds
        )
        assert find_drift(state, {P: ahead}, Policy(), NOW) == find_drift(state, {}, Policy(), NOW)

    @given(histories())
    def test_in_step(self, history: list[tuple[int, EventRow]]):
        """A process that holds exactly what the log says is alive has neither ghosts nor strays."""
        state = fold(history)
        for process in state.processes.values():
            held = frozenset(process.resources)
            kinds = frozenset({"session", "runner", "agent", "lock"})
            entries = tuple(IndexEntry("index", ref, ref) for ref in held)
            inventory = Inventory(P, process.seq, held, entries, kinds)
            drift = find_drift(state, {P: inventory}, Policy(), NOW)
            assert (drift.dangling, drift.ghosts, drift.untracked) == ((), (), ())

    @given(histories(), st.data())
    def test_one_sort_per_resource(self, history: list[tuple[int, EventRow]], data: st.DataObject):
        """A resource is drift of one sort at the most."""
        state = fold(history)
        drift = find_drift(state, data.draw(inventories(state)), Policy(), NOW)
        found = [item.ref for item in drift if item.sort != "dangling"]
        assert len(set(found)) == len(found)


class TestOrphan:
    """Alive, and should not be."""

    def test_idle(self):
        """What is idle for longer than its limit, with the reason and since when."""
        limit = 3600_000
        state = state_of(row(1), at_ms=NOW - limit)
        [item] = find_drift(state, {}, Policy(), NOW)
        assert (item.sort, item.ref, item.seq) == ("orphan", SESSION, 1)
        assert item.reason == "idle for 3600.0 s, the limit is 3600 s"
        assert item.since_ms == NOW
        assert not find_drift(state, {}, Policy(), NOW - 1)

    def test_owner_gone(self):
        """What has lost its owner."""
        state = state_of(row(1, ref="lock/l", owned_by="runner/r"))
        [item] = find_drift(state, {}, Policy(), NOW)
        assert (item.ref, item.reason) == ("lock/l", "its owner runner/r is gone")

    def test_chosen_processes(self):
        """Only the processes asked about are looked at; one that is not alive has no drift."""
        state = state_of(row(1), row(1, process="q"), at_ms=0)
        assert [i.process for i in find_drift(state, {}, Policy(), NOW)] == ["p", "q"]
        only = find_drift(state, {}, Policy(), NOW, processes=["q", "x"])
        assert [i.process for i in only] == ["q"]


class TestDangling:
    """An index entry that names something not alive."""

    def test_names_something_gone(self):
        """The entry is found, with its registry and key."""
        state = state_of(row(1), row(2, "cleaned_up"))
        [item] = drift_of(state, 2, entries=(ENTRY,))
        assert (item.sort, item.ref, item.registry, item.key) == ("dangling", SESSION, "index", "k")

    def test_names_something_never_heard_of(self):
        """It is found where a registry of that kind would hold it, and only there."""
        state = state_of(row(1, ref="x/y"))
        assert sorts(drift_of(state, 1, entries=(ENTRY,))) == [("dangling", SESSION)]
        assert not drift_of(state, 1, entries=(ENTRY,), kinds=frozenset())

    def test_names_something_alive(self):
        """It is not, while what it names is alive by the log or by the registry."""
        assert not drift_of(state_of(row(1)), 1, (SESSION,), (ENTRY,))
        found = drift_of(state_of(row(1, ref="x/y")), 1, (SESSION,), (ENTRY,))
        assert sorts(found) == [("untracked", SESSION)]

    def test_ended_after_the_inventory(self):
        """What ended since may have taken its entry along: the next inventory tells."""
        state = state_of(row(1), row(2, "cleaned_up"))
        assert not drift_of(state, 1, (SESSION,), (ENTRY,))

    def test_entry_removed_after_the_inventory(self):
        """An entry that was removed since is not found again in the older inventory."""
        removed = row(3, "cleaned_up", attrs={"registry": "index", "key": "k"})
        state = state_of(row(1), row(2, "cleaned_up"), removed)
        assert not drift_of(state, 2, entries=(ENTRY,))
        assert drift_of(state, 3, entries=(ENTRY,))


class TestGhostAndUntracked:
    """The log and the registry disagree about what is alive."""

    def test_ghost(self):
        """Alive by the log, not in the registry that would hold it."""
        assert sorts(drift_of(state_of(row(1)), 1)) == [("ghost", SESSION)]
        assert not drift_of(state_of(row(1)), 1, kinds=frozenset())

    def test_used_after_the_inventory(self):
        """What was used since the inventory was taken may have come back."""
        assert not drift_of(state_of(row(1), row(2, "reused")), 1)

    def test_idle_ghost_is_no_orphan(self):
        """What is not there cannot be torn down, however idle: it is a ghost only."""
        assert sorts(drift_of(state_of(row(1), at_ms=0), 1)) == [("ghost", SESSION)]

    def test_untracked(self):
        """In a registry, and the log never heard of it, or knows of its end."""
        assert sorts(drift_of(state_of(row(1, ref="x/y")), 1, (SESSION,))) == [
            ("untracked", SESSION)
        ]
        state = state_of(row(1), row(2, "cleaned_up"))
        assert sorts(drift_of(state, 2, (SESSION,))) == [("untracked", SESSION)]
        assert not drift_of(state, 1, (SESSION,))
