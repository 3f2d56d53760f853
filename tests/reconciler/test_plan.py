"""The plan: ends the drift, in an order that is safe, and never touches what is in use."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler import FleetState, Plan, Policy, find_drift, make_plan
from reconciler.fold import Attempt, ProcessState, fold
from reconciler.plan import ENTRY_STAGE, retry_at
from store.event import EventRow
from store.messages import Action, IndexEntry, Inventory
from tests.reconciler.model import NOW, REFS, P, apply, histories, inventories, users_of
from tests.support import row

policies = st.builds(
    Policy,
    session_idle_timeout=st.sampled_from(["off", 60, 3600]),
    runner_idle_timeout=st.sampled_from(["off", 60, 600]),
    idle_timeouts=st.sampled_from([{}, {"lock": 100}]),
    max_sessions_per_user=st.sampled_from([None, 1]),
    max_runners=st.sampled_from([None, 1]),
    untracked=st.sampled_from(["report", "adopt", "teardown"]),
)


def plan_of(
    state: FleetState,
    inventories: Mapping[str, Inventory] | None = None,
    policy: Policy | None = None,
    now_ms: int = NOW,
    *,
    force: bool = False,
) -> Plan:
    """The plan for all drift of a state."""
    policy, found = policy or Policy(), inventories or {}
    drift = find_drift(state, found, policy, now_ms)
    return make_plan(state, drift, found, policy, now_ms, force=force)


def order_of(process: ProcessState) -> set[tuple[str, str]]:
    """(first, then): pairs of which the first has to go first."""
    pairs = {(user, used) for used, users in users_of(process).items() for user in users}
    pairs |= {
        (r.owned_by, r.ref)
        for r in process.resources.values()
        if r.owned_by in process.resources and r.owned_by != r.ref
    }
    return pairs


def reachable(start: set[str], pairs: set[tuple[str, str]]) -> set[str]:
    found, todo = set(start), list(start)
    while todo:
        at = todo.pop()
        for first, then in pairs:
            if first == at and then not in found:
                found.add(then)
                todo.append(then)
    return found


def tangled(pairs: set[tuple[str, str]]) -> set[str]:
    """What is in a circle, or between two: there is no order."""
    nodes = {node for pair in pairs for node in pair}
    circles = {n for n in nodes if n in reachable({t for f, t in pairs if f == n}, pairs)}
    backwards = {(then, first) for first, then in pairs}
    return reachable(circles, pairs) & reachable(circles, backwards)


class TestProperties:
    """What holds for every fleet."""

    @given(histories(attempts=False), policies, st.data())
    def test_a_plan_applied_leaves_no_drift(
        self, history: list[tuple[int, EventRow]], policy: Policy, data: st.DataObject
    ):
        """When all steps were carried out, the next plan has nothing to do."""
        state = fold(history)
        found = data.draw(inventories(state))
        # What was adopted may be too much, or without owner; what a ghost used is no longer in use.
        corrects = policy.untracked == "adopt" or find_drift(state, found, policy, NOW).ghosts
        for _ in range(3 if corrects else 1):
            state, found = apply(plan_of(state, found, policy), state, found)
        assert plan_of(state, found, policy).steps == ()

    @given(histories(), policies, st.booleans(), st.data())
    def test_nothing_in_use_is_ever_torn_down(
        self,
        history: list[tuple[int, EventRow]],
        policy: Policy,
        force: bool,
        data: st.DataObject,
    ):
        """What is acquired, and what that uses at whatever distance, is in no plan."""
        state = fold(history)
        plan = plan_of(state, data.draw(inventories(state)), policy, force=force)
        for process in state.processes.values():
            acquired = {r.ref for r in process.resources.values() if r.in_use}
            uses = {(user, used) for used, users in users_of(process).items() for user in users}
            ending = {s.ref for s in plan.steps if s.action == Action.TEARDOWN}
            assert not ending & reachable(acquired, uses)
            closing = {s.ref for s in plan.steps if s.action == Action.CLOSE_GHOST}
            assert not closing & acquired

    @given(histories(), policies, st.data())
    def test_a_stay_is_respected(
        self, history: list[tuple[int, EventRow]], policy: Policy, data: st.DataObject
    ):
        """Whoever asked for a stay is not torn down before it is over."""
        state = fold(history)
        for step in plan_of(state, data.draw(inventories(state)), policy).steps:
            resource = state.processes[P].resources.get(step.ref)
            if resource is not None and step.action == Action.TEARDOWN:
                assert resource.keep_until_ms <= NOW

    @given(histories(), policies, st.booleans(), st.data())
    def test_order_of_teardown(
        self,
        history: list[tuple[int, EventRow]],
        policy: Policy,
        force: bool,
        data: st.DataObject,
    ):
        """Users go before what they use, owners before what they own, and entries last."""
        state = fold(history)
        if P not in state.processes:
            return
        plan = plan_of(state, data.draw(inventories(state)), policy, force=force)
        steps = {s.ref: (n, s) for n, s in enumerate(plan.steps) if s.action == Action.TEARDOWN}
        pairs = {(f, t) for f, t in order_of(state.processes[P]) if f in steps and t in steps}
        unordered = tangled(pairs)
        for first, then in pairs:
            assert first in steps[then][1].after
            if not (first in unordered and then in unordered):
                assert steps[first][0] < steps[then][0]
                assert steps[first][1].stage < steps[then][1].stage
        entries = [n for n, s in enumerate(plan.steps) if s.action == Action.DROP_ENTRY]
        others = [n for n, s in enumerate(plan.steps) if s.action != Action.DROP_ENTRY]
        assert not entries or not others or min(entries) > max(others)

    @given(histories(), policies, st.data())
    def test_nothing_is_torn_down_under_its_user_or_owner(
        self, history: list[tuple[int, EventRow]], policy: Policy, data: st.DataObject
    ):
        """Of what goes, every user goes in the same plan; and an owner that has to go goes first."""
        state = fold(history)
        if P not in state.processes:
            return
        plan = plan_of(state, data.draw(inventories(state)), policy)
        ending = {s.ref for s in plan.steps if s.action == Action.TEARDOWN}
        closing = {s.ref for s in plan.steps if s.action == Action.CLOSE_GHOST}
        late = {w.item.ref for w in plan.waiting if w.item.sort == "orphan"}
        users = users_of(state.processes[P])
        for ref in ending & state.processes[P].resources.keys():
            assert set(users.get(ref, ())) <= ending | closing
            assert state.processes[P].resources[ref].owned_by not in late

    @given(histories(), policies, st.booleans(), st.data())
    def test_all_drift_is_in_the_plan(
        self,
        history: list[tuple[int, EventRow]],
        policy: Policy,
        force: bool,
        data: st.DataObject,
    ):
        """Every difference has a step, or waits with a reason; never both, never twice."""
        state = fold(history)
        found = data.draw(inventories(state))
        drift = find_drift(state, found, policy, NOW)
        plan = make_plan(state, drift, found, policy, NOW, force=force)
        due = [(s.ref, s.registry, s.key) for s in plan.due]
        waits = [(w.item.ref, w.item.registry, w.item.key) for w in plan.waiting]
        assert sorted(map(str, due + waits)) == sorted(
            str((i.ref, i.registry, i.key)) for i in drift
        )
        assert all(w.reason for w in plan.waiting)

    @given(histories(attempts=False), policies, st.data())
    def test_consequences_become_due(
        self, history: list[tuple[int, EventRow]], policy: Policy, data: st.DataObject
    ):
        """What is announced as a consequence is due once the rest was carried out, and nothing else."""
        policy = policy.model_copy(update={"untracked": "report"})
        state = fold(history)
        found = data.draw(inventories(state))
        plan = plan_of(state, found, policy)
        announced = {s.target for s in plan.steps if s.consequence}
        came = set()
        state, found = apply(Plan(plan.due), state, found)
        for _ in range(len(REFS)):
            following = plan_of(state, found, policy)
            came |= {s.target for s in following.due}
            state, found = apply(Plan(following.due), state, found)
        assert came == announced


def process_with(*rows: EventRow) -> FleetState:
    """A state in which everything was last used at time 0."""
    return fold((0, one) for one in rows)


CHAIN = (
    row(1, ref="agent/a"),
    row(2, ref="runner/r", uses=("agent/a",)),
    row(3, uses=("runner/r",)),
)


class TestOrder:
    """The order, by example."""

    def test_session_runner_agent_owned_entries(self):
        """Session, then runner, then agent, then what they owned, then index entries."""
        state = process_with(*CHAIN, row(4, ref="lock/l", owned_by="runner/r"))
        entry = IndexEntry("_agent_runners", "a", "runner/r")
        held = frozenset(state.processes[P].resources)
        found = {P: Inventory(P, 4, held, (entry,), frozenset())}
        steps = plan_of(state, found).steps
        assert [s.ref for s in steps] == ["session/s", "runner/r", "agent/a", "lock/l", "runner/r"]
        assert (steps[-1].action, steps[-1].stage) == (Action.DROP_ENTRY, ENTRY_STAGE)
        assert [s.consequence for s in steps] == [False] * 4 + [True]
        assert steps[1].after == ("session/s",)

    def test_own_kinds_after_their_users(self):
        """A kind of one's own goes after whatever uses it, however deep."""
        state = process_with(
            row(1, ref="pool/p"), row(2, ref="client/c", uses=("pool/p",)),
            row(3, uses=("client/c",)),
        )  # fmt: skip
        policy = Policy(idle_timeouts={"pool": 1, "client": 1})
        steps = plan_of(state, policy=policy).steps
        assert [s.ref for s in steps] == ["session/s", "client/c", "pool/p"]

    def test_what_hangs_on_a_circle(self):
        """What members of a circle use goes after them."""
        state = process_with(
            row(1, ref="lock/1", uses=("lock/2",)), row(2, ref="lock/2", uses=("lock/1",)),
            row(3, ref="lock/0"), row(4, "reused", "lock/2", uses=("lock/1", "agent/a")),
            row(5, ref="agent/a", uses=("session/s",)), row(6),
        )  # fmt: skip
        steps = plan_of(state, policy=Policy(idle_timeouts={"lock": 1})).steps
        refs = [s.ref for s in steps]
        assert set(refs) == {"lock/0", "lock/1", "lock/2", "agent/a", "session/s"}
        assert max(map(refs.index, ["lock/1", "lock/2"])) < refs.index("agent/a")
        assert refs.index("agent/a") < refs.index("session/s")

    def test_a_circle_that_hangs_on_another(self):
        """It goes as a whole after the whole of the other: the executor waits for what comes before."""
        state = process_with(
            row(1, ref="thing/1", uses=("thing/2",)), row(2, ref="thing/2", uses=("thing/1",)),
            row(3, ref="part/1", uses=("part/2",), owned_by="thing/1"),
            row(4, ref="part/2", uses=("part/1",), owned_by="thing/2"),
            row(5, ref="between/b", uses=("part/1",), owned_by="thing/1"),
        )  # fmt: skip
        policy = Policy(idle_timeouts={"thing": 1, "part": 1, "between": 1})
        stage = {s.ref: s.stage for s in plan_of(state, policy=policy).steps}
        assert stage["thing/1"] == stage["thing/2"] < stage["between/b"]
        assert stage["between/b"] < stage["part/1"] == stage["part/2"]

    def test_entries_of_a_ghost(self):
        """Closing a ghost takes along what it owned and the entries that name it."""
        state = fold([(NOW, row(1)), (NOW, row(2, ref="lock/l", owned_by="session/s"))])
        entry = IndexEntry("index", "k", "session/s")
        found = {P: Inventory(P, 2, frozenset(), (entry,), frozenset({"session"}))}
        steps = plan_of(state, found).steps
        assert [(s.action, s.ref, s.consequence) for s in steps] == [
            (Action.CLOSE_GHOST, "session/s", False),
            (Action.TEARDOWN, "lock/l", True),
            (Action.DROP_ENTRY, "session/s", True),
        ]


class TestConsequences:
    """What the steps of a plan leave behind."""

    OWNED = row(4, ref="lock/l", owned_by="runner/r")

    def test_owned_with_a_stay(self):
        """A thing that asked for a stay does not go along with its owner."""
        state = process_with(*CHAIN, self.OWNED)
        state.processes[P].resources["lock/l"].keep_until_ms = NOW + 1
        assert "lock/l" not in {s.ref for s in plan_of(state).steps}

    def test_owned_with_users_that_are_owned_too(self):
        """Owned things that use each other go along together, whichever is looked at first."""
        policy = Policy(max_runners=1)
        for first, second in (("lock/1", "lock/2"), ("lock/2", "lock/1")):
            rows = [
                row(1, ref="runner/r"), row(2, ref="runner/q"),
                row(3, ref=first, owned_by="runner/r"),
                row(4, ref=second, owned_by="runner/r", uses=(first,)),
            ]  # fmt: skip
            state = fold((NOW - 10 + n, one) for n, one in enumerate(rows))
            assert {s.ref for s in plan_of(state, policy=policy).steps} == {
                "runner/r", "lock/1", "lock/2",
            }  # fmt: skip

    def test_owned_by_what_has_to_wait(self):
        """What is owned by something whose teardown waits for a retry waits with it."""
        state = process_with(*CHAIN, self.OWNED)
        state.processes[P].attempts["runner/r"] = Attempt("o", NOW, 2, False, 1, "no")
        plan = plan_of(state)
        assert {s.ref for s in plan.steps} == {"session/s"}
        assert {w.item.ref: w.reason for w in plan.waiting} == {
            "runner/r": "no",
            "agent/a": "something that uses or owns it is still alive",
            "lock/l": "something that uses or owns it is still alive",
        }


class TestCorrections:
    """Ghosts and untracked resources."""

    @pytest.mark.parametrize(
        ("untracked", "action"),
        [("adopt", Action.ADOPT), ("teardown", Action.TEARDOWN), ("report", None)],
    )
    def test_untracked(self, untracked: str, action: Action | None):
        """The policy decides: into the log, away with it, or only a report."""
        state = fold([(NOW, row(1, ref="x/y"))])
        found = {P: Inventory(P, 1, frozenset({"session/s"}), (), frozenset({"session"}))}
        plan = plan_of(state, found, Policy(untracked=untracked))
        assert [s.action for s in plan.steps] == ([action] if action else [])
        assert len(plan.waiting) == (0 if action else 1)

    def test_ghost_in_use(self):
        """A ghost that is acquired waits for its release."""
        state = fold([(NOW, row(1)), (NOW, row(2, "reused", attrs={"in_use": 1}))])
        found = {P: Inventory(P, 2, frozenset(), (), frozenset({"session"}))}
        plan = plan_of(state, found)
        assert plan.steps == ()
        assert [w.reason for w in plan.waiting] == ["it is in use"]


class TestRetry:
    """Exponential backoff with jitter, and stuck."""

    POLICY = Policy(backoff=2, backoff_max=60, stuck_after=3, teardown_timeout=7)

    def failed(self, failures: int, at_ms: int = NOW, seq: int = 1) -> FleetState:
        state = process_with(row(1))
        state.processes[P].attempts["session/s"] = Attempt(
            "o", at_ms, seq, False, failures, "it broke"
        )
        return state

    def test_same_state_same_plan(self):
        """The jitter is drawn from the state: planning twice gives the same plan."""
        state = self.failed(1)
        assert plan_of(state, policy=self.POLICY) == plan_of(state, policy=self.POLICY)

    @given(st.text(max_size=20), st.floats(0.01, 100), st.floats(0.01, 1000))
    def test_grows_and_is_capped(self, target: str, backoff: float, longest: float):
        """Each wait is at least as long as the one before, until the longest, and never longer."""
        policy = Policy(backoff=backoff, backoff_max=max(backoff, longest))
        waits = [retry_at(target, Attempt("o", 0, 1, False, n), policy) for n in range(1, 200)]
        assert backoff * 500 - 1 <= waits[0] <= backoff * 1000
        assert all(wait <= policy.backoff_max * 1000 for wait in waits)
        below = [w for w in waits if w < policy.backoff_max * 500 - 1]
        assert below == sorted(below)
        assert waits[-1] >= policy.backoff_max * 500 - 1

    def test_jitter_spreads(self):
        """Teardowns that failed together do not come back together."""
        waits = {
            retry_at(f"session/{n}", Attempt("o", 0, 1, False, 1), self.POLICY) for n in range(100)
        }
        assert len(waits) > 80

    def test_waits_then_is_tried_again(self):
        """It waits for its next try with the reason of the failure, and then is due."""
        plan = plan_of(self.failed(1), policy=self.POLICY)
        [waiting] = plan.waiting
        assert (plan.steps, waiting.reason, waiting.failures) == ((), "it broke", 1)
        assert NOW + 1000 <= waiting.until_ms <= NOW + 2000
        later = plan_of(self.failed(1), policy=self.POLICY, now_ms=waiting.until_ms)
        assert [s.ref for s in later.steps] == ["session/s"]

    def test_force(self):
        """A forced pass does not wait for the next try; what is under way it leaves alone."""
        state = self.failed(1)
        assert plan_of(state, policy=self.POLICY, force=True).steps
        state.processes[P].attempts["session/s"].pending = True
        assert not plan_of(state, policy=self.POLICY, force=True).steps

    def test_used_since(self):
        """A resource that was used since its failure is looked at afresh."""
        assert plan_of(self.failed(4, seq=0), policy=self.POLICY).steps

    def test_no_answer(self):
        """An order without an answer is repeated after the teardown's time limit and some."""
        state = self.failed(0)
        state.processes[P].attempts["session/s"].pending = True
        [waiting] = plan_of(state, policy=self.POLICY).waiting
        assert waiting.until_ms == NOW + 17_000
        assert waiting.reason == "its order is under way"

    @pytest.mark.parametrize(("failures", "stuck"), [(2, False), (3, True), (9, True)])
    def test_stuck(self, failures: int, stuck: bool):
        """After so many failures it is reported as stuck, and still tried."""
        plan = plan_of(self.failed(failures), policy=self.POLICY)
        assert [w.stuck for w in plan.waiting] == [stuck]
        assert plan_of(self.failed(failures, at_ms=0), policy=self.POLICY).steps
