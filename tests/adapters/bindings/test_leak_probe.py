"""The leak probe finds what nobody declared, and says where it was made."""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.handlers
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.plugins.base_plugin import BasePlugin
from google.adk.runners import InMemoryRunner

from adapters import Host
from adapters.aiohttp_client import HttpClients
from adapters.leak_probe import KINDS, Finding, LeakProbe
from adapters.leak_search import only_grows
from reconciler import Policy, Reconciler
from store import Store

Eventually = Callable[..., Awaitable[None]]

pytestmark = pytest.mark.leaks_on_purpose


class TestTrend:
    @pytest.mark.parametrize(
        ("samples", "grows"),
        [
            ([1, 2, 3, 4, 5, 6], False),  # Too little to matter.
            ([10, 20, 30, 40, 50, 60], True),
            ([10, 90, 15, 80, 12, 95], False),
            ([0, 50, 0, 60, 30, 90, 40, 99, 70, 120, 80, 130], True),
            ([100] * 12, False),
            ([10, 1000], False),
        ],
    )
    def test_only_a_floor_that_rises_is_a_leak(self, samples: list[int], grows: bool) -> None:
        """Noise comes back down; too few samples say nothing."""
        assert only_grows(samples, 10) is grows


class Service:
    """Makes things and forgets them."""

    def __init__(self) -> None:
        self.session = aiohttp.ClientSession()


class Told(BasePlugin):
    """A plugin that notes its close."""

    def __init__(self) -> None:
        super().__init__("told")
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


class TestLook:
    async def test_a_session_is_found_with_its_place_and_not_twice(self) -> None:
        """The connector of an open session is not a finding of its own."""
        with LeakProbe(tracing=True) as probe:
            probe.begin()
            service = Service()
            found = probe.look()
            assert [one.kind for one in found] == ["leaked_http_session"]
            assert "test_leak_probe.py" in found[0].site
            assert found[0].site.endswith("in __init__")
            assert [one.ref for one in probe.look()] == [found[0].ref]
            await service.session.close()
            assert probe.look() == []

    async def test_what_was_made_before_the_probe_is_found_too(self) -> None:
        """Without its place, which nobody noted."""
        session = aiohttp.ClientSession()
        with LeakProbe(tracing=True) as probe:
            found = [one for one in probe.look() if one.weak and one.weak() is session]
            assert [one.site for one in found] == [""]
            probe.declare(session)
            assert not [one for one in probe.look() if one.weak and one.weak() is session]
        await session.close()

    async def test_what_is_declared_is_no_finding(self, host: Host) -> None:
        """What a client of ours or a registry of the host holds has an owner."""
        with LeakProbe(host, tracing=True) as probe:
            probe.begin()
            async with HttpClients(host) as clients:
                clients.session()
                registry = host.registry("http_session")
                registry["x"] = aiohttp.ClientSession()
                assert probe.look() == []
                await registry.pop("x").close()

    async def test_a_task_that_somebody_holds_or_awaits_is_no_finding(self) -> None:
        """Only fire and forget is."""
        with LeakProbe() as probe:
            held = [asyncio.create_task(asyncio.sleep(3600))]

            async def waits() -> None:
                mine = asyncio.create_task(asyncio.sleep(3600))
                await asyncio.sleep(0)
                await mine

            waiting = asyncio.create_task(waits())
            asyncio.create_task(asyncio.sleep(3600), name="forgotten")  # noqa: RUF006
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            found = [one for one in probe.look() if one.kind == "leaked_task"]
            assert [one.id for one in found] == ["forgotten#0"]
            for task in [*held, waiting, *asyncio.all_tasks()]:
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.gather(*held, waiting, return_exceptions=True)

    async def test_a_holder_that_was_frozen_is_a_holder(self, tmp_path: Path) -> None:
        """A service that calls `gc.freeze` once it has started goes on having what it has."""
        tasks: list[asyncio.Task[None]] = []
        passing = logging.handlers.MemoryHandler(10)
        gc.freeze()
        try:
            with LeakProbe() as probe:
                probe.begin()
                tasks.append(asyncio.create_task(asyncio.sleep(3600)))
                passing.setTarget(logging.FileHandler(tmp_path / "a.log"))
                await asyncio.sleep(0)
                assert probe.look() == []
                assert passing.target is not None
                passing.target.close()
                tasks[0].cancel()
                tasks.clear()
        finally:
            gc.unfreeze()

    async def test_what_was_there_before_is_not_new_when_another_probe_finds_it(self) -> None:
        """What a probe without a beginning finds on the heap is older than any beginning."""
        old = [InMemoryRunner(agent=LlmAgent(name="a", model="m"), app_name="x")]
        with LeakProbe() as probe:
            probe.begin()
            with LeakProbe() as another:
                another.look()
                old.clear()
                gc.collect()
                assert any("Runner" in one.what for one in another.look())
                assert probe.look() == []

    async def test_the_schedule_looks_by_itself(self, eventually: Eventually) -> None:
        """And what it finds is told in the log of the service, once."""
        told: list[str] = []

        class Listening(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                told.append(record.getMessage())

        listening = Listening()
        logging.getLogger("adapters.leak_probe").addHandler(listening)
        try:
            async with LeakProbe(tracing=True, interval=0.01) as probe:
                probe.begin()
                service = Service()
                await eventually(lambda: told)
                await service.session.close()
        finally:
            logging.getLogger("adapters.leak_probe").removeHandler(listening)
        assert len([one for one in told if "leaked_http_session" in one]) == 1

    def test_it_ends_without_a_trace(self) -> None:
        """The classes that it watched are their own again."""
        before = (aiohttp.ClientSession.__init__, logging.FileHandler.close)
        loop_before = asyncio.BaseEventLoop.create_task
        with LeakProbe(tracing=True), LeakProbe():
            assert aiohttp.ClientSession.__init__ is not before[0]
        assert (aiohttp.ClientSession.__init__, logging.FileHandler.close) == before
        assert asyncio.BaseEventLoop.create_task is loop_before


async def plant(tmp_path: Path, told: Told) -> list[Any]:
    """One leak of each kind that a teardown can end; returns what keeps them alive."""
    InMemoryRunner(app=App(name="x", root_agent=LlmAgent(name="a", model="m"), plugins=[told]))
    gc.collect()
    asyncio.create_task(asyncio.sleep(3600), name="forgotten")  # noqa: RUF006
    await asyncio.sleep(0)
    handler = logging.FileHandler(tmp_path / "a.log")
    return [aiohttp.ClientSession(), aiohttp.TCPConnector(), handler]


def kinds(found: list[Finding]) -> set[str]:
    return {one.kind for one in found}


ENDABLE = {kind for kind, end in KINDS.items() if end is not None}


class TestDrift:
    async def test_findings_are_untracked_and_stay_where_the_policy_does_not_say_teardown(
        self, host: Host, store: Store, namespace: str, tmp_path: Path, eventually: Eventually
    ) -> None:
        """Shown and counted; neither adopted nor ended."""
        told = Told()
        async with Reconciler(store, namespace=namespace, policy=Policy()) as reconciler:
            await eventually(lambda: host.process in reconciler.tail.state.processes)
            with LeakProbe(host, tracing=True) as probe:
                probe.begin()
                kept = await plant(tmp_path, told)
                found = [one for one in probe.look() if one.kind in ENDABLE]
                assert kinds(found) == ENDABLE
                result = (await reconciler.reconcile([host.process])).as_dict()
                shown = {row["ref"] for row in result["untracked"]}
                assert {one.ref for one in found} <= shown
                assert any("test_leak_probe.py:" in ref for ref in shown)
                assert {row["waits"] for row in result["waiting"]} == {
                    "a finding is torn down only where the policy says so"
                }
                assert not result["corrected"]
                assert not result["torn_down"]
                assert not kept[0].closed
                assert not [ref for ref in host.entries if ref.startswith("leaked")]
                for thing in (kept[0], kept[1]):
                    await thing.close()
                kept[2].close()
            await asyncio.gather(*_cancelled())

    async def test_the_policy_teardown_ends_them(
        self, host: Host, store: Store, namespace: str, tmp_path: Path, eventually: Eventually
    ) -> None:
        """Session, connector, handler, task, and what a dropped runner held."""
        told = Told()
        policy = Policy(untracked="teardown")
        async with Reconciler(store, namespace=namespace, policy=policy):
            with LeakProbe(host, tracing=True) as probe:
                probe.begin()
                session, connector, handler = await plant(tmp_path, told)
                found = probe.look()
                assert kinds(found) >= ENDABLE
                await eventually(lambda: session.closed and connector.closed and told.closed)
                await eventually(lambda: handler.stream is None and not _forgotten())
                await eventually(lambda: not kinds(probe.look()) & ENDABLE)
                assert told.closed == 1

    async def test_a_teardown_that_fails_is_tried_again(
        self, host: Host, store: Store, namespace: str, eventually: Eventually
    ) -> None:
        """What is untracked stays untracked until it has gone, instead of being adopted."""
        tries = []

        def broken(id: str, thing: Any) -> None:
            tries.append(id)
            if len(tries) < 3:
                raise OSError("not yet")

        registry = host.registry("thing", teardown=broken)
        dict.__setitem__(registry, "t1", object())  # Behind its back: the log hears nothing.
        host.report("look now")
        policy = Policy(untracked="teardown", backoff=0.01)
        async with Reconciler(store, namespace=namespace, policy=policy):
            await eventually(lambda: not registry)
        assert tries == ["t1"] * 3
        assert not host.entries

    async def test_trends_are_reported_whatever_the_policy_says(
        self, host: Host, store: Store, namespace: str, eventually: Eventually
    ) -> None:
        """There is nothing to tear down."""
        policy = Policy(untracked="teardown")
        async with Reconciler(store, namespace=namespace, policy=policy) as reconciler:
            await eventually(lambda: host.process in reconciler.tail.state.processes)
            with LeakProbe(host) as probe:
                table: dict[int, int] = {}
                probe.watch("sessions by user", table)
                for number in range(120):
                    table[number] = number
                    if number % 10 == 0:
                        probe.sample()
                probe.look()
                result = (await reconciler.reconcile([host.process])).as_dict()
                assert "growing_map/sessions by user" in {r["ref"] for r in result["untracked"]}
                assert not result["failed"]
                assert "a trend is reported" in str(result["waiting"])


def _forgotten() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "forgotten"]


def _cancelled() -> list[Any]:
    tasks = _forgotten()
    for task in tasks:
        task.cancel()
    return [asyncio.wait({task}) for task in tasks]
