"""The desired state: until when things should live, and what has to make room."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from reconciler import Policy
from reconciler.desired import desired_until, evictions
from reconciler.fold import ProcessState, Resource, fold
from store.event import EventRow
from tests.reconciler.model import NOW, P, histories, users_of
from tests.support import row

POLICY = Policy(session_idle_timeout=100, runner_idle_timeout=10, agent_idle_timeout=1)


def at(*rows: tuple[int, EventRow]) -> ProcessState:
    return fold(rows).processes[P]


def until(process: ProcessState, policy: Policy = POLICY) -> dict[str, float]:
    return desired_until(process, policy)


def process_of(history: list[tuple[int, EventRow]]) -> ProcessState:
    return fold(history).processes.get(P) or ProcessState(P, 0, 0)


class TestProperties:
    """What holds for every graph."""

    @given(histories())
    def test_every_resource_has_an_answer(self, history: list[tuple[int, EventRow]]):
        """Whatever uses and owns what, circles included, each resource has one moment."""
        process = process_of(history)
        assert until(process).keys() == process.resources.keys()

    @given(histories())
    def test_acquired_for_ever(self, history: list[tuple[int, EventRow]]):
        """What is acquired, and what that uses at whatever distance, has no end."""
        process = process_of(history)
        answer = until(process)
        todo = [r.ref for r in process.resources.values() if r.in_use]
        seen = set(todo)
        while todo:
            ref = todo.pop()
            assert answer[ref] == inf
            more = [u for u in process.resources[ref].uses if u in process.resources]
            todo += [u for u in more if u not in seen]
            seen.update(more)

    @given(histories())
    def test_not_before_its_users(self, history: list[tuple[int, EventRow]]):
        """Nothing ends before what uses it."""
        process = process_of(history)
        answer = until(process)
        for used, users in users_of(process).items():
            assert answer[used] >= max(answer[user] for user in users)

    @given(histories())
    def test_a_stay_is_kept(self, history: list[tuple[int, EventRow]]):
        """Nothing ends before the stay that was asked for."""
        process = process_of(history)
        answer = until(process)
        for ref, resource in process.resources.items():
            assert answer[ref] >= resource.keep_until_ms

    @given(histories(), st.data())
    def test_using_never_shortens(self, history: list[tuple[int, EventRow]], data: st.DataObject):
        """A reuse of anything moves no moment forward in time."""
        process = process_of(history)
        if not process.resources:
            return
        before = until(process)
        ref = data.draw(st.sampled_from(sorted(process.resources)))
        state = fold([*history, (NOW, row(1000, "reused", ref))])
        after = until(state.processes[P])
        assert all(after[one] >= moment for one, moment in before.items())

    @given(histories(), st.floats(1, 5000))
    def test_longer_limits_never_shorten(self, history: list[tuple[int, EventRow]], longer: float):
        """A more generous policy ends nothing earlier."""
        process = process_of(history)
        generous = Policy(
            session_idle_timeout=100 + longer,
            runner_idle_timeout=10 + longer,
            agent_idle_timeout=1 + longer,
        )
        before, after = until(process), until(process, generous)
        assert all(after[ref] >= moment for ref, moment in before.items())


class TestUntil:
    """The rules, by example. Times in ms; sessions may idle 100 s, runners 10 s, agents 1 s."""

    def test_idle_session(self):
        """A session is desired for the idle limit after its last use."""
        assert until(at((1000, row(1)), (5000, row(2, "reused")))) == {"session/s": 105_000}

    def test_chain(self):
        """A runner is desired while its session is and its own idle time after; so its agent."""
        process = at(
            (0, row(1, ref="agent/a")),
            (0, row(2, ref="runner/r", uses=("agent/a",))),
            (0, row(3, uses=("runner/r",))),
        )
        assert until(process) == {"session/s": 100_000, "runner/r": 110_000, "agent/a": 111_000}

    def test_unused_runner(self):
        """A runner that nothing uses has its own idle time."""
        assert until(at((0, row(1, ref="runner/r")))) == {"runner/r": 10_000}

    def test_off(self):
        """A limit that is off lets live for ever, and what is used with it."""
        process = at((0, row(1, ref="runner/r")), (0, row(2, uses=("runner/r",))))
        policy = Policy(session_idle_timeout="off")
        assert set(until(process, policy).values()) == {inf}

    def test_other_kinds(self):
        """A kind without a limit lives for ever, one with a limit does not."""
        process = at((0, row(1, ref="http_client/c")))
        assert until(process) == {"http_client/c": inf}
        assert until(process, Policy(idle_timeouts={"http_client": 5})) == {"http_client/c": 5000}

    def test_owned(self):
        """What is owned lives exactly as long as its owner; without the owner it is over."""
        process = at((0, row(1, ref="runner/r")), (0, row(2, ref="lock/l", owned_by="runner/r")))
        assert until(process)["lock/l"] == until(process)["runner/r"] == 10_000
        assert until(at((0, row(1, ref="lock/l", owned_by="runner/r")))) == {"lock/l": 0}

    def test_awaits_owner(self):
        """What awaits its owner is given a time for it."""
        process = at((0, row(1, ref="lock/l", attrs={"awaits_owner": True})))
        assert until(process, Policy(owner_timeout=7)) == {"lock/l": 7000}
        assert until(process, Policy(owner_timeout="off")) == {"lock/l": inf}

    def test_circle(self):
        """The members of a circle live as long as the longest-lived of them."""
        process = at(
            (0, row(1, ref="runner/r", uses=("agent/a",))),
            (5000, row(2, ref="agent/a", uses=("runner/r",))),
        )
        assert len(set(until(process).values())) == 1
        assert until(process)["agent/a"] >= 10_000

    def test_what_hangs_on_a_circle(self):
        """What hangs on a circle does not keep the circle alive, only the other way round."""
        process = at(
            (0, row(1, ref="runner/r", uses=("agent/a",))),
            (0, row(2, ref="agent/a", uses=("runner/r", "session/s"))),
            (50_000, row(3)),
        )
        answer = until(process)
        assert answer["runner/r"] == answer["agent/a"] < 50_000
        assert answer["session/s"] == 150_000

    def test_uses_itself(self):
        """What uses or owns itself does not keep itself alive."""
        assert until(at((0, row(1, uses=("session/s",))))) == {"session/s": 100_000}


def sessions(*used: int, **more: object) -> ProcessState:
    """Sessions 0, 1, … last used at these moments."""
    process = ProcessState(P, 0, 0)
    for n, used_ms in enumerate(used):
        ref = f"session/{n}"
        process.resources[ref] = Resource(ref, n + 1, 0, used_ms, **more)  # type: ignore[arg-type]
    return process


class TestEvictions:
    """What makes room before it is idle."""

    def test_nothing_without_limits(self):
        """Without limits and rules nothing is evicted."""
        assert evictions(sessions(1, 2, 3), POLICY, NOW, rss=10**12) == {}

    def test_sessions_per_user(self):
        """Beyond the limit the least recently used of that user go, and nobody else's."""
        process = sessions(30, 10, 20, user="ann")
        process.resources["session/x"] = Resource("session/x", 9, 0, 1, user="bob")
        process.resources["session/y"] = Resource("session/y", 9, 0, 1)
        policy = Policy(max_sessions_per_user=1)
        assert evictions(process, policy, NOW) == {
            "session/1": "its user has more than 1 sessions",
            "session/2": "its user has more than 1 sessions",
        }

    def test_in_use_is_passed_over(self):
        """The least recently used that is not in use goes, also when fewer go than should."""
        process = sessions(10, 20, 30, user="ann")
        process.resources["session/0"].in_use = 1
        assert set(evictions(process, Policy(max_sessions_per_user=2), NOW)) == {"session/1"}
        for resource in process.resources.values():
            resource.in_use = 1
        assert evictions(process, Policy(max_sessions_per_user=1), NOW) == {}

    def test_stay_is_kept(self):
        """What asked for a stay is passed over until it is over."""
        process = sessions(10, 20, user="ann")
        process.resources["session/0"].keep_until_ms = NOW + 1
        policy = Policy(max_sessions_per_user=1)
        assert set(evictions(process, policy, NOW)) == {"session/1"}
        assert set(evictions(process, policy, NOW + 1)) == {"session/0"}

    def test_runners_take_their_sessions_along(self):
        """A runner that makes room takes the sessions along that use it."""
        process = sessions(1, uses=("runner/old",))
        for n, ref in enumerate(["runner/old", "runner/new"]):
            process.resources[ref] = Resource(ref, 9, 0, n)
        assert set(evictions(process, Policy(max_runners=1), NOW)) == {"runner/old", "session/0"}

    def test_runner_of_an_acquired_session(self):
        """A runner that an acquired session uses is passed over."""
        process = sessions(1, uses=("runner/old",), in_use=1)
        for n, ref in enumerate(["runner/old", "runner/new"]):
            process.resources[ref] = Resource(ref, 9, 0, n)
        assert set(evictions(process, Policy(max_runners=1), NOW)) == {"runner/new"}

    def test_memory(self):
        """Above the memory limit one session in ten goes, at least one, least recently used first."""
        policy = Policy(max_process_memory=1000)
        assert evictions(sessions(3, 1, 2), policy, NOW, rss=1000) == {}
        assert set(evictions(sessions(3, 1, 2), policy, NOW, rss=1001)) == {"session/1"}
        assert set(evictions(sessions(*range(25)), policy, NOW, rss=1001)) == {
            "session/0", "session/1", "session/2",
        }  # fmt: skip
        assert evictions(ProcessState(P, 0, 0), policy, NOW, rss=1001) == {}

    def test_own_rule(self):
        """A rule of one's own is asked about everything that is not in use."""
        asked = []

        def rule(resource: Resource, process: ProcessState, now_ms: int) -> str | None:
            asked.append(resource.ref)
            return "odd" if resource.ref.endswith("1") else None

        process = sessions(1, 2, 3)
        process.resources["session/2"].in_use = 1
        assert evictions(process, Policy(rules=(rule,)), NOW) == {"session/1": "odd"}
        assert asked == ["session/0", "session/1"]
