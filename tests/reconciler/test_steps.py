"""Steps, changes and lives: what looks back agrees with the fold, forward and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler.changes import Changes, alive_by_kind, general
from reconciler.desired import desired_until
from reconciler.fold import FleetState, fold
from reconciler.keepers import keepers
from reconciler.life import Lives, Worker
from reconciler.policy import Policy
from reconciler.steps import Stepper
from store.event import EventRow
from tests.reconciler.model import REFS, histories
from tests.support import row

History = list[tuple[int, EventRow]]
ENDS = st.sampled_from([None, "process_stopped", "process_lost"])


def ended(entries: History, type: str | None) -> History:
    """A history, and the end of its process."""
    if type is None:
        return entries
    at, last = entries[-1]
    return [*entries, (at, row(last.seq + 1, type, "process/p"))]


class TestStepper:
    @given(histories(), ENDS, st.data())
    def test_back_is_where_one_was(
        self, entries: History, end: str | None, data: st.DataObject
    ) -> None:
        """After any number of steps back the state is the fold up to there, and forward again too."""
        entries = ended(entries, end)
        back = data.draw(st.integers(0, len(entries)))
        stepper = Stepper(FleetState())
        for at, one in entries:
            stepper.forward(f"{at}-{one.seq}", one)
        assert stepper.state == fold(entries)
        for _ in range(back):
            assert stepper.back()
        kept = len(entries) - back
        assert stepper.state == fold(entries[:kept])
        for at, one in entries[kept:]:
            stepper.forward(f"{at}-{one.seq}", one)
        assert stepper.state == fold(entries)

    def test_memory_of_steps_is_bounded(self) -> None:
        """Only so many steps can be taken back; then it says so and stays."""
        stepper = Stepper(FleetState(), kept=2)
        for seq in range(1, 6):
            stepper.forward(f"{seq}-0", row(seq, ref=f"session/{seq}"))
        assert (stepper.back(), stepper.back(), stepper.back()) == (True, True, False)
        assert set(stepper.state.processes["p"].resources) == {f"session/{n}" for n in (1, 2, 3)}


class TestChanges:
    @given(histories(), ENDS, st.data())
    def test_before_and_what_changed_is_after(
        self, entries: History, end: str | None, data: st.DataObject
    ) -> None:
        """Alive before, and what appeared, less what went, is what is alive after."""
        entries = ended(entries, end)
        at = data.draw(st.integers(0, len(entries)))
        changes = Changes(fold(entries[:at]))
        for ms, one in entries[at:]:
            changes.see(f"{ms}-{one.seq}", one)
        assert changes.after == alive_by_kind(fold(entries))
        for kind in {ref.partition("/")[0] for ref in REFS}:
            came, went = changes.appeared[kind].total(), changes.went[kind].total()
            assert changes.before[kind] + came - went == changes.after[kind]

    def test_reasons_are_counted_together(self) -> None:
        """Reasons that differ by a number or a name are one reason."""
        reasons = [
            "idle for 3612.4 s, the limit is 3600 s",
            "idle for 3700.0 s, the limit is 3600 s",
        ]
        assert len({general(reason) for reason in reasons}) == 1
        assert general("its owner runner/r1 is gone") == "its owner runner/… is gone"


class TestKeepers:
    @given(histories(attempts=False))
    def test_the_longest_is_what_desired_until_says(self, entries: History) -> None:
        """The latest of the reasons is the moment that the reconciler goes by, circles aside."""
        policy = Policy(idle_timeouts={"lock": 60})
        for process in fold(entries).processes.values():
            until = desired_until(process, policy)
            for ref in process.resources:
                reasons = keepers(ref, process, policy)
                longest = max((keeper.until_ms for keeper in reasons), default=0.0)
                own = [k for k in reasons if k.why not in {"user", "owner"}]
                assert longest >= max((k.until_ms for k in own), default=0.0)
                if not any(k.why in {"user", "owner"} for k in reasons):
                    assert longest == until[ref] or until[ref] == 0.0


class TestLives:
    def test_users_are_known_in_either_order(self) -> None:
        """Who uses a resource is known whether it was told of before the resource or after."""
        for order in ((1, 2), (2, 1)):
            lives = Lives("runner/r")
            events = {
                1: row(1, ref="runner/r"),
                2: row(2, ref="session/s", uses=("runner/r",)),
            }
            for at, number in enumerate(order, 1):
                lives.see(f"{at}-0", events[number])
            (life,) = lives.lives
            assert set(life.users) == {"session/s"}

    def test_a_resource_made_again_lives_again(self) -> None:
        """Each time it is made is a life of its own, with its own end."""
        lives = Lives("session/s")
        for seq, type in enumerate(["created", "cleaned_up", "created", "process_lost"], 1):
            lives.see(f"{seq}-0", row(seq, type))
        assert [life.ended.type for life in lives.lives if life.ended] == [
            "cleaned_up",
            "process_lost",
        ]

    def test_beginning_that_was_dropped(self) -> None:
        """What the state knows to be alive has a life, although no event tells of its beginning."""
        state = fold([(1000, row(1, ref="runner/r")), (2000, row(2, ref="runner/seen"))])
        for ref, known in (("runner/r", False), ("runner/seen", True)):
            lives = Lives(ref)
            lives.see("2000-0", row(2, ref="runner/seen"))
            for process, resource in state.find(ref):
                lives.assume(process.id, resource)
            (life,) = lives.lives
            assert ("no longer in the log" in life.began.reason) is not known

    def test_worker_of_a_writer(self) -> None:
        """The writer of an order tells worker, partition and epoch; another writer tells itself."""
        assert Worker.of("worker-p3-e12@host-1:77:1234#2") == Worker("worker@host-1:77", 3, 12)
        assert Worker.of("svc@host:1:2").epoch is None
