"""The fold: deterministic, can be split anywhere, and keeps only what is alive."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from reconciler.fold import GONE_KEPT, GONE_MOST, FleetState, ProcessState, Resource, fold
from reconciler.fold_page import fold_page
from store import LifecycleEvent
from store.event import NO_DIGEST, EventRow, decode, decode_fold_rows, encode
from tests.reconciler.model import REFS, fleets, histories, orders
from tests.support import row


def folded(*rows: EventRow, at_ms: int = 1000) -> FleetState:
    """Events folded, one second apart."""
    return fold((at_ms + 1000 * n, one) for n, one in enumerate(rows))


def process_of(*rows: EventRow) -> ProcessState:
    return folded(*rows).processes["p"]


def resource_of(*rows: EventRow, ref: str = "session/s") -> Resource:
    return process_of(*rows).resources[ref]


class TestProperties:
    """What holds for every log."""

    @given(histories(), st.data())
    def test_splits_anywhere(self, entries: list[tuple[int, EventRow]], data: st.DataObject):
        """Folding the second part onto the first is folding the whole."""
        at = data.draw(st.integers(0, len(entries)))
        assert fold(entries[at:], fold(entries[:at])) == fold(entries)

    @given(fleets(), st.data())
    def test_page_by_page(self, entries: list[tuple[int, EventRow]], data: st.DataObject):
        """Pages, wherever they end, fold to what the events fold to one by one."""
        state, types, told, settled = FleetState(), Counter[str](), set[str](), []
        rest = entries
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            page, rest = rest[:size], rest[size:]
            folded = fold_page(state, [one for _, one in page], [at for at, _ in page])
            types += folded.types
            told |= folded.told
            settled += folded.settled
            assert {one.holder or one.process for _, one in page} == folded.processes
        assert state == fold(entries)
        assert orders(state) == orders(fold(entries))
        assert types == Counter(one.type for _, one in entries)
        assert told == {
            one.holder or one.process for _, one in entries if one.type != "cleanup_requested"
        }
        uses = {"created", "reused"}
        assert settled == [
            (at, one) for at, one in entries if one.order_id is not None and one.type not in uses
        ]

    @given(histories())
    def test_deterministic(self, entries: list[tuple[int, EventRow]]):
        """The same log always gives the same state."""
        assert fold(entries) == fold(entries)

    @given(histories(), histories())
    def test_the_state_given_is_left_as_it_was(
        self, first: list[tuple[int, EventRow]], second: list[tuple[int, EventRow]]
    ):
        """`fold` onto a state, and changes of a copy, do not reach into the state."""
        state = fold(first)
        fold(second, state)
        copied = state.copy()
        for at_ms, one in second:
            copied.apply(one, at_ms)
        assert state == fold(first)

    @given(histories())
    def test_all_shapes_of_an_event(self, entries: list[tuple[int, EventRow]]):
        """Public events, rows of the hot paths and what the fold reads of them: one state."""
        public: list[tuple[int, LifecycleEvent]] = [
            (at, decode(encode(one, NO_DIGEST)[0])) for at, one in entries
        ]
        read = decode_fold_rows([encode(one, NO_DIGEST)[0] for _, one in entries])
        assert fold(public) == fold(entries)
        assert fold((at, one) for (at, _), one in zip(entries, read, strict=True)) == fold(entries)

    @given(histories(), st.randoms(use_true_random=False))
    def test_processes_do_not_touch_each_other(
        self, entries: list[tuple[int, EventRow]], dice: random.Random
    ):
        """However the events of two processes are interleaved, each gets its own state."""
        mine = [(at, row(one.seq, one.type, one.ref, uses=one.uses)) for at, one in entries]
        others = [
            (at, row(one.seq, one.type, one.ref, process="q", uses=one.uses)) for at, one in entries
        ]
        both: list[tuple[int, EventRow]] = []
        left, right = list(mine), list(others)
        while left or right:
            side = left if left and (not right or dice.random() < 0.5) else right
            both.append(side.pop(0))
        assert fold(both).processes["p"] == fold(mine).processes["p"]
        assert fold(both).processes["q"] == fold(others).processes["q"]

    @given(histories())
    def test_alive_or_gone(self, entries: list[tuple[int, EventRow]]):
        """A resource is alive, or gone with the seq of its end, or was never there; never two."""
        for process in fold(entries).processes.values():
            assert not process.resources.keys() & process.gone.keys()
            ends = set(process.gone.values())
            assert ends <= {one.seq for _, one in entries if one.type == "cleaned_up"}
            assert set(process.resources) <= set(REFS)


class TestResource:
    """What is known of something alive."""

    def test_created_and_reused(self):
        """Creation sets it up; a reuse moves its last use and its seq."""
        found = resource_of(row(1, uses=("runner/r",), attrs={"user": "ann"}), row(2, "reused"))
        assert found == Resource("session/s", 2, 1000, 2000, ("runner/r",), user="ann")

    def test_using_is_using_what_it_uses(self):
        """A reuse of a session is a use of its runner."""
        runner = resource_of(
            row(1, ref="runner/r"), row(2, uses=("runner/r",)), row(3, "reused"), ref="runner/r"
        )
        assert (runner.seq, runner.used_ms) == (1, 3000)

    def test_end_of_a_user_is_the_last_use(self):
        """The idle time of a runner begins when its last session ends."""
        runner = resource_of(
            row(1, ref="runner/r"), row(2, uses=("runner/r",)), row(3, "cleaned_up"),
            ref="runner/r",
        )  # fmt: skip
        assert runner.used_ms == 3000

    def test_new_links(self):
        """`uses` None says nothing new, an empty one takes all away; so with the owner."""
        assert resource_of(row(1, uses=("a/b",)), row(2, "reused")).uses == ("a/b",)
        assert resource_of(row(1, uses=("a/b",)), row(2, "reused", uses=())).uses == ()
        assert resource_of(row(1, owned_by="a/b"), row(2, "reused")).owned_by == "a/b"

    def test_owner_that_comes_later(self):
        """A thing that awaits its owner does so until the owner is named."""
        waiting = row(1, attrs={"awaits_owner": True})
        assert resource_of(waiting).awaits_owner
        assert not resource_of(waiting, row(2, "reused", owned_by="a/b")).awaits_owner

    def test_in_use(self):
        """It is in use while it is acquired."""
        acquired = (row(1), row(2, "reused", attrs={"in_use": 1}))
        assert resource_of(*acquired, row(3, "reused")).in_use == 1
        assert resource_of(*acquired, row(3, "reused", attrs={"in_use": 0})).in_use == 0

    def test_stay(self):
        """A stay counts from when it was asked for; a shorter one does not cut it."""
        asked = (row(1), row(2, "reused", attrs={"keep_alive_s": 10.5}))
        assert resource_of(*asked).keep_until_ms == 2000 + 10_500
        shorter = row(3, "reused", attrs={"keep_alive_s": 1})
        assert resource_of(*asked, shorter).keep_until_ms == 12_500

    def test_cleaned_up(self):
        """What was cleaned up leaves the seq of its end, and nothing else."""
        process = process_of(row(1), row(2, "cleaned_up"))
        assert (process.resources, process.gone) == ({}, {"session/s": 2})
        assert process_of(row(1), row(2, "cleaned_up"), row(3)).gone == {}

    def test_memory_of_the_gone_is_bounded(self):
        """Of what is gone the latest are remembered, and half as many again at most."""
        state = FleetState()
        for n in range(GONE_MOST + 10):
            state.apply(row(2 * n + 1, ref=f"session/{n}"), n)
            state.apply(row(2 * n + 2, "cleaned_up", f"session/{n}"), n)
            gone = list(state.processes["p"].gone)
            assert min(n + 1, GONE_KEPT) <= len(gone) <= GONE_MOST
            assert gone[-1] == f"session/{n}"
        assert gone == [f"session/{n}" for n in range(n + 1 - len(gone), n + 1)]

    def test_index_entry_is_not_the_resource(self):
        """The end of an index entry leaves the resource that it names alive."""
        entry = {"registry": "index", "key": "k"}
        assert "session/s" in process_of(row(1), row(2, "cleaned_up", attrs=entry)).resources


class TestProcess:
    """How processes begin and end."""

    def test_ends(self):
        """A process that stopped or was lost is no more, and is counted."""
        stopped = folded(row(1), row(2, "process_stopped", "process/p"))
        assert (stopped.processes, stopped.stopped, stopped.lost) == ({}, 1, 0)
        lost = folded(row(1), row(1, "process_lost", "process/p", process="w", holder="p"))
        assert (lost.processes, lost.stopped, lost.lost) == ({}, 0, 1)

    def test_worker_is_not_a_host(self):
        """What a worker writes about a host does not make it a process, nor move the host's seq."""
        asked = row(7, "cleanup_requested", process="w", holder="p", order_id="o")
        assert set(folded(row(1), asked).processes) == {"p"}
        assert folded(row(1), asked).processes["p"].seq == 1
        assert folded(asked).processes == {}

    def test_newer_event_type(self):
        """An event of a type from a newer schema changes nothing but the seq."""
        process = process_of(row(1), row(2, "dreamed", schema_version=9))
        assert (process.seq, list(process.resources)) == (2, ["session/s"])

    def test_find(self):
        """A reference is found in every process that has it."""
        state = folded(row(1), row(1, process="q"), row(2, process="q", ref="a/b"))
        assert [process.id for process, _ in state.find("session/s")] == ["p", "q"]


class TestAttempts:
    """Teardowns that are under way or did not succeed."""

    def asked(self, seq: int, order: str, expected: int = 1) -> EventRow:
        return row(
            seq, "cleanup_requested", process="w", holder="p", order_id=order,
            attrs={"expected_seq": expected},
        )  # fmt: skip

    def failed(self, seq: int, order: str, type: str = "cleanup_failed") -> EventRow:
        return row(seq, type, order_id=order, reason="no")

    def test_under_way(self):
        """A request is pending until its outcome comes."""
        attempt = process_of(row(1), self.asked(1, "o1")).attempts["session/s"]
        assert (attempt.pending, attempt.failures, attempt.at_ms) == (True, 0, 2000)

    def test_failures_are_counted(self):
        """Failures and refusals of the same resource add up over the retries."""
        attempt = process_of(
            row(1), self.asked(1, "o1"), self.failed(2, "o1"),
            self.asked(2, "o2"), self.failed(3, "o2", "cleanup_refused"),
        ).attempts["session/s"]  # fmt: skip
        assert (attempt.pending, attempt.failures, attempt.reason) == (False, 2, "no")
        assert attempt.refused

    def test_no_answer_is_a_failure(self):
        """A request that was repeated because nobody answered counts as failed."""
        attempt = process_of(row(1), self.asked(1, "o1"), self.asked(2, "o2")).attempts["session/s"]
        assert (attempt.pending, attempt.failures) == (True, 1)

    def test_changed_resource_is_tried_afresh(self):
        """When the resource was used since, its failures are forgotten."""
        attempt = process_of(
            row(1), self.asked(1, "o1"), self.failed(2, "o1"), row(3, "reused"),
            self.asked(2, "o2", expected=3),
        ).attempts["session/s"]  # fmt: skip
        assert attempt.failures == 0

    def test_late_outcome_of_another_order(self):
        """The outcome of an order that was given up does not count for the next one."""
        attempt = process_of(
            row(1), self.asked(1, "o1"), self.asked(2, "o2"), self.failed(2, "o1")
        ).attempts["session/s"]
        assert attempt.pending

    def test_settled_by_the_end(self):
        """When the resource is gone nothing is left of its attempts; so when it is adopted."""
        assert not process_of(row(1), self.asked(1, "o1"), row(2, "cleaned_up")).attempts
        unknown = (row(1, ref="a/b"), self.asked(1, "o1", expected=0))
        assert not process_of(*unknown, row(2, "adopted")).attempts
