"""`explain`: the texts in docs/explain.md are what it says, case by case, on real parts."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from adapters import Host
from reconciler import Policy, Reconciler
from reconciler.cli.explain import explain_resource, text_of
from reconciler.nearest import nearest
from store import EventLog, LifecycleEvent, Order, Store
from store.namespace import Namespace, open_namespace
from tests.e2e.programs import ROOT
from tests.support import eventually

DOCS = (ROOT / "docs" / "explain.md").read_text()
AT_ONCE = Policy(session_idle_timeout=0.001, runner_idle_timeout=0.001)

_PLAIN = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", "TIME"),
    (r"(\w+)@[\w.-]+:\d+(:\d+)?(#\d+)?", r"\1@HOST"),
    (r"o-[0-9a-f]{12}", "ORDER"),
    (r"\b[\d.]+(e-\d+)? (ms|s|min|h|d)\b", "SPAN"),
    (r"(event|partition|epoch) \d+", r"\1 N"),
)


def plain(text: str) -> str:
    """Without what differs from run to run."""
    for pattern, name in _PLAIN:
        text = re.sub(pattern, name, text)
    return text.strip()


def documented(case: str) -> str:
    """The block under a heading of the docs."""
    found = re.search(rf"^## {case}\n.*?^```\n(.*?)^```$", DOCS, re.M | re.S | re.I)
    assert found, f"docs/explain.md has no section {case!r} with a block"
    return plain(found[1])
    return plain(found[1])


def service(host: Host, **options: Any) -> Any:
    """A service with sessions and runners in the care of a host."""
    made = SimpleNamespace(runners={}, sessions={}, agent_runners={})
    host.observe(made, "runners", kind="runner", teardown=lambda id, runner: None)
    host.observe(
        made, "sessions", kind="session", uses=lambda id, runner: [f"runner/{runner}"],
        **{"teardown": lambda id, session: None, **options},
    )  # fmt: skip
    host.observe_index(made, "agent_runners", names="runner")
    return made


async def sent(host: Host, namespace: Namespace) -> None:
    """Waits until all that the host recorded is in the log."""
    log = EventLog(namespace.store, namespace)

    async def done() -> bool:
        return await log.last_seq(host.process) == host.recorder.seq

    await eventually(done)


async def said(namespace: Namespace, ref: str, verdict: str) -> str:
    (explanation,) = await explain_resource(namespace, ref)
    assert explanation.verdict == verdict
    return plain(text_of(explanation))


@pytest.fixture
async def space(store: Store, namespace: str) -> Namespace:
    return await open_namespace(store, namespace)


async def record_policy(space: Namespace, policy: Policy) -> None:
    """What a worker does when it starts."""
    text = policy.model_dump_json(exclude_unset=True)
    await space.store.redis.set(space.keys.policy, text)


class TestTexts:
    async def test_alive(self, host: Host, space: Namespace) -> None:
        """What is in use says who keeps it alive, and that no time limit ends it."""
        made = service(host)
        made.runners["r1"] = object()
        made.sessions["s1"] = "r1"
        with host.acquire("session/s1"):
            await sent(host, space)
            assert await said(space, "session/s1", "in_use") == documented("Alive and in use")
            assert await said(space, "runner/r1", "alive") == documented("Kept alive by another")

    async def test_idle_and_about_to_go(self, host: Host, space: Namespace) -> None:
        """What is idle says what would end it, and when."""
        made = service(host)
        made.sessions["s1"] = "r1"
        host.recorder.record("reused", "session/s1")
        await sent(host, space)
        await record_policy(space, Policy(session_idle_timeout=30))
        assert await said(space, "session/s1", "about_to_go") == documented("Idle and about to go")

    async def test_due_without_a_worker(self, host: Host, space: Namespace) -> None:
        """What is due and stays, because nobody acts, says so, and what to start."""
        service(host).sessions["s1"] = "r1"
        await sent(host, space)
        await record_policy(space, AT_ONCE)
        assert await said(space, "session/s1", "due") == documented("Due, and no worker runs")

    async def test_torn_down_as_an_orphan(self, host: Host, space: Namespace) -> None:
        """What was torn down names the causes in order: user, reason, order, worker, epoch, outcome."""
        made = service(host)
        made.runners["r1"] = object()
        made.agent_runners["a1"] = "r1"
        made.sessions["s1"] = "r1"
        made.sessions.pop("s1")
        await sent(host, space)
        async with acting(space, AT_ONCE) as reconciler:
            await reconciler.reconcile()
        assert not made.runners
        assert await said(space, "runner/r1", "torn_down") == documented("Torn down as an orphan")
        assert await said(space, "session/s1", "removed") == documented("Ended by its service")

    async def test_refused_because_busy(self, host: Host, space: Namespace) -> None:
        """A refusal says why, and that the resource is desired again."""
        made = service(host)
        made.runners["r1"] = object()
        await sent(host, space)

        class LateRequest:
            """A request comes between the worker's decision and the host's check."""

            process = host.process

            def execute(self, orders: Sequence[Order]) -> object:
                if any(order.ref == "runner/r1" for order in orders):
                    made.sessions["late"] = "r1"
                return host.execute(orders)

        policy = Policy(runner_idle_timeout=0.001, session_idle_timeout=3600)
        async with acting(space, policy, hosts=[LateRequest()]) as reconciler:
            await reconciler.reconcile()
        await sent(host, space)
        assert "r1" in made.runners
        assert await said(space, "runner/r1", "refused") == documented("Refused because busy")

    async def test_failed_and_stuck(self, host: Host, space: Namespace) -> None:
        """A teardown that goes on failing says why, how often, and when it is tried again."""

        async def fail(id: str, session: Any) -> None:
            raise RuntimeError("the disk is full")

        service(host, teardown=fail).sessions["s1"] = "r1"
        await sent(host, space)
        policy = Policy(session_idle_timeout=0.001, stuck_after=3, backoff=60)
        async with acting(space, policy) as reconciler:
            await reconciler.reconcile()
            assert await said(space, "session/s1", "failing") == documented("Failed")
            for _ in range(2):
                await reconciler.reconcile()
            assert await said(space, "session/s1", "stuck") == documented("Failed and stuck")

    async def test_lost_with_its_process(self, store: Store, space: Namespace) -> None:
        """What was lost says who declared its process lost, and what that means."""
        host = Host(store, name="svc", namespace=space.name, lease_seconds=0.05)
        await host.start()
        service(host).sessions["s1"] = "r1"
        await sent(host, space)
        await abandon(host)
        async with Reconciler(store, namespace=space.name) as reconciler:

            def lost() -> bool:
                tail = reconciler.tail
                return tail.state.lost == 1 and host.process not in tail.state.processes

            await eventually(lost, 15)
        assert await said(space, "session/s1", "lost") == documented("Lost with its process")


class acting:
    """A reconciler that holds the partitions, and acts only when it is told to."""

    def __init__(self, space: Namespace, policy: Policy, hosts: Sequence[Any] = ()) -> None:
        self._space, self._policy = space, policy
        self._reconciler = Reconciler(space.store, namespace=space.name, policy=policy, hosts=hosts)

    async def __aenter__(self) -> Reconciler:
        await record_policy(self._space, self._policy)
        await self._reconciler.open()
        await self._reconciler.keep_leases()
        return self._reconciler

    async def __aexit__(self, *exc: object) -> None:
        await self._reconciler.release()


async def abandon(host: Host) -> None:
    """Ends a host as a kill would: nothing is said to anybody."""
    for task in host._tasks:
        task.cancel()
    await asyncio.gather(*host._tasks, return_exceptions=True)


class TestSeveralProcesses:
    async def test_each_is_explained(self, log: EventLog, space: Namespace) -> None:
        """A resource that several processes have or had is explained for each, the live one first."""
        for number, process in enumerate(("a@h:1:1", "b@h:1:1")):
            events = [
                LifecycleEvent(type="created", ref="session/s", process=process, seq=1),
                LifecycleEvent(type="cleaned_up", ref="session/s", process=process, seq=2),
            ]
            await log.append(events[: 2 - number])
        explained = await explain_resource(space, "session/s")
        assert [(e.process, e.verdict) for e in explained] == [
            ("b@h:1:1", "alive"),
            ("a@h:1:1", "removed"),
        ]


class TestCommand:
    def run(self, url: str, namespace: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reconciler", "explain", *arguments]
        command += ["--url", url, "--namespace", namespace]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
        )

    async def test_text_and_json(self, log: EventLog, redis_url: str, namespace: str) -> None:
        """The command prints the sentences, and with --json all that they were made from."""
        event = LifecycleEvent(type="created", ref="session/s", process="p@h:1:1", seq=1)
        await log.append([event])
        shown = await asyncio.to_thread(self.run, redis_url, namespace, "session/s")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith("session/s in p@h:1:1: alive\n  It is alive since ")
        asked = await asyncio.to_thread(self.run, redis_url, namespace, "session/s", "--json")
        (one,) = json.loads(asked.stdout)["explanations"]
        assert (one["verdict"], one["alive"], one["process"]) == ("alive", True, "p@h:1:1")
        assert one["keepers"][0]["why"] == "idle"
        assert one["until_ms"] == one["life"]["began_ms"] + 3_600_000

    async def test_unknown_offers_the_nearest(
        self, log: EventLog, redis_url: str, namespace: str
    ) -> None:
        """A resource that the log never heard of: one line with those most like it, status 2."""
        refs = ["session/alpha", "session/alphabet", "runner/r1"]
        await log.append(
            [
                LifecycleEvent(type="created", ref=ref, process="p@h:1:1", seq=number)
                for number, ref in enumerate(refs, 1)
            ]
        )
        done = await asyncio.to_thread(self.run, redis_url, namespace, "session/alpa")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "session/alpha" in done.stderr
        assert "runner/r1" not in done.stderr
        wrong = await asyncio.to_thread(self.run, redis_url, namespace, "nonsense")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
        assert "kind/id" in wrong.stderr

    def test_nearest_among_many(self) -> None:
        """Among very many references the likest are found all the same."""
        refs = [f"session/{n:06d}" for n in range(20_000)] + ["runner/birds-2"]
        assert nearest("runner/brids-2", refs)[0] == "runner/birds-2"

    def test_unique_beginning_comes_first(self) -> None:
        """What begins with what was asked for comes before what looks more like it."""
        refs = ["recovery_record/d30", "recovery_record/29", f"recovery_record/d29{'a' * 30}"]
        assert nearest("recovery_record/d29", refs)[0] == refs[2]
