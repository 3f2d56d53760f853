"""Lifetimes: what the timeline knows of each resource, and how much of it is kept."""

from __future__ import annotations

from typing import Any

from reconciler.fold import FleetState
from reconciler.web.lifetimes import MARKS_KEPT, Lifetime, Lifetimes
from tests.support import row


def seen(*events: tuple[int, Any], kept: int = 100) -> Lifetimes:
    lifetimes = Lifetimes(kept)
    for at, event in events:
        lifetimes.see(event, at)
    return lifetimes


def by_ref(lifetimes: Lifetimes) -> dict[str, Lifetime]:
    return {one.ref: one for one in lifetimes}


class TestOneLife:
    def test_beginning_uses_and_end(self) -> None:
        """A lifetime has its first and last moment, its uses, and why and by which order it ended."""
        lifetimes = seen(
            (10, row(1, uses=("runner/r",))),
            (20, row(2, "reused", attrs={"in_use": 1})),
            (30, row(3, "reused", attrs={"in_use": 0})),
            (40, row(4, "cleaned_up", reason="idle", order_id="o-1")),
        )
        (one,) = lifetimes
        assert (one.created_ms, one.ended_ms, one.used, one.use_count) == (10, 40, [20, 30], 2)
        assert (one.end, one.reason, one.order_id) == ("cleaned_up", "idle", "o-1")
        assert (one.uses, one.in_use) == (("runner/r",), 0)

    def test_made_again_is_another_life(self) -> None:
        """A resource that was torn down and made again has two lifetimes."""
        lifetimes = seen((10, row(1)), (20, row(2, "cleaned_up")), (30, row(3)))
        assert [(one.created_ms, one.ended_ms) for one in lifetimes] == [(10, 20), (30, None)]

    def test_process_takes_its_resources_along(self) -> None:
        """What a lost process held ends with it, and says so; what others hold does not."""
        lifetimes = seen(
            (10, row(1)),
            (11, row(1, ref="session/t", process="q")),
            (20, row(1, "process_lost", "process/p", process="worker", holder="p")),
        )
        ends = {one.process: one.end for one in lifetimes}
        assert ends == {"p": "process_lost", "q": None}

    def test_index_entries_are_not_lives(self) -> None:
        """The end of an index entry that names a resource is not the resource's end."""
        gone = row(2, "cleaned_up", attrs={"registry": "x", "key": "k"})
        (one,) = seen((10, row(1)), (20, gone))
        assert one.ended_ms is None

    def test_marks_are_thinned_out_and_still_span_the_life(self) -> None:
        """However often a thing is used, a bounded number of marks goes from the first to the last."""
        uses = [(10 + n, row(n + 1, "reused")) for n in range(1, 1000)]
        (one,) = seen((10, row(1)), *uses)
        assert len(one.used) <= MARKS_KEPT
        assert one.use_count == 999
        assert one.used[0] < 80
        assert one.used[-1] > 930


class TestBounds:
    def test_the_first_to_end_are_left_off(self) -> None:
        """Beyond the bound the lives that ended first go, what lives stays, and it is told."""
        events = []
        for n in range(1, 21):
            events.append((n * 10, row(2 * n - 1, ref=f"session/{n}")))
            if n <= 10:
                events.append((n * 10 + 1, row(2 * n, "cleaned_up", ref=f"session/{n}")))
        lifetimes = seen(*events, kept=12)
        assert len(lifetimes) == 12
        assert set(by_ref(lifetimes)) == {f"session/{n}" for n in range(9, 21)}
        assert (lifetimes.left_off, lifetimes.complete_since_ms) == (8, 81)

    def test_more_alive_than_room(self) -> None:
        """When there are more live resources than room, the newest are left off, and it is told."""
        lifetimes = seen(*((n, row(n, ref=f"session/{n}")) for n in range(1, 8)), kept=5)
        assert (len(lifetimes), lifetimes.left_off) == (5, 2)


class TestPages:
    def test_pages_give_everything_once(self) -> None:
        """Going on from the last version of a page gives every lifetime, and nothing twice."""
        lifetimes = seen(*((n, row(n, ref=f"session/{n}")) for n in range(1, 26)))
        got, after = [], 0
        while page := lifetimes.changed_after(after, 10):
            got += [one.ref for one in page]
            after = page[-1].version
        assert got == [f"session/{n}" for n in range(1, 26)]

    def test_only_what_changed_comes_later(self) -> None:
        """The same question later gives what changed since, and only that."""
        lifetimes = seen(*((n, row(n, ref=f"session/{n}")) for n in range(1, 6)))
        after = lifetimes.version
        lifetimes.see(row(6, "reused", ref="session/2"), 100)
        assert [one.ref for one in lifetimes.changed_after(after, 10)] == ["session/2"]
        assert lifetimes.changed_after(lifetimes.version, 10) == []

    def test_seeded_from_a_state(self) -> None:
        """What came from a snapshot is there too, once, with its beginning and its last use."""
        state = FleetState()
        for n, at in ((1, 10), (2, 20)):
            state.apply(row(n, "created" if n == 1 else "reused"), at)
        lifetimes = Lifetimes()
        lifetimes.seed(state)
        lifetimes.seed(state)
        (one,) = lifetimes
        assert (one.created_ms, one.used) == (10, [20])
