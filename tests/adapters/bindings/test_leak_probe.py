"""The leak probe finds what nobody declared, says where it was made, and its fixture fails the test."""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.handlers
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import entry_points
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

PLANTED = """
import asyncio
import logging
import unittest

import aiohttp
import pytest
from google.adk.agents import LlmAgent
from google.adk.runners import InMemoryRunner

from adapters.aiohttp_client import HttpClients
from adapters.logging_handlers import execution_log

kept = []
pytestmark = pytest.mark.usefixtures("leak_probe")


async def test_session():
    kept.append(aiohttp.ClientSession())  # planted: leaked_http_session


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_session_dropped():
    aiohttp.ClientSession()  # planted: leaked_http_session


async def test_connector():
    kept.append(aiohttp.TCPConnector())  # planted: leaked_http_connector


def test_handler(tmp_path):
    kept.append(logging.FileHandler(tmp_path / "a.log"))  # planted: leaked_log_handler


def test_runner():
    agent = LlmAgent(name="a", model="m")
    InMemoryRunner(agent=agent, app_name="x")  # planted: leaked_runner


async def test_task():
    asyncio.create_task(asyncio.sleep(3600))  # planted: leaked_task
    await asyncio.sleep(0)


def test_map(leak_probe):
    table = {}
    leak_probe.watch("table", table)
    for round in range(12):
        table.update({(round, n): n for n in range(5)})  # growing_map
        leak_probe.sample()


def test_fds(leak_probe, tmp_path):
    for round in range(12):
        kept.extend((tmp_path / f"{round}-{n}").open("w") for n in range(4))  # growing_fds
        leak_probe.sample()


def test_memory(leak_probe):
    for round in range(12):
        kept.append(bytearray(b"x" * (12 << 20)))  # growing_memory
        leak_probe.sample()


async def test_clean(leak_probe, tmp_path):
    table = {}
    leak_probe.watch("table", table)
    async with HttpClients() as clients, aiohttp.ClientSession():
        clients.session()
        for round in range(12):
            async with execution_log(f"e{round}", tmp_path) as log:
                log.info("fine")
                table[round] = round
                await asyncio.gather(asyncio.create_task(asyncio.sleep(0)), asyncio.sleep(0))
            del table[round]
            leak_probe.sample()
    runner = InMemoryRunner(agent=LlmAgent(name="a", model="m"), app_name="x")
    await runner.close()


class TestOfUnittest(unittest.IsolatedAsyncioTestCase):
    async def test_of_unittest(self):
        kept.append(aiohttp.ClientSession())  # planted: leaked_http_session


class TestInAClass:
    def teardown_method(self):
        self.handler.close()

    def test_clean_what_a_method_closes_later(self, tmp_path):
        self.handler = logging.FileHandler(tmp_path / "a.log")


@pytest.fixture
async def of_a_fixture():
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(asyncio.sleep(3600))
        yield session
        task.cancel()


async def test_clean_with_fixture(of_a_fixture):
    assert not of_a_fixture.closed


@pytest.fixture
async def make():
    made = []

    def one():
        made.append(aiohttp.ClientSession())
        return made[-1]

    yield one
    for session in made[:1]:
        await session.close()


async def test_clean_what_a_fixture_closes_later(make, leak_probe):
    assert not make().closed


async def test_late(make):
    make(), make()  # The fixture forgets the second.


async def test_clean_left_early():
    async def numbers():
        for number in range(3):
            yield number

    async for number in numbers():
        break  # asyncio ends the generator, in a task.


async def test_clean_cancelled():
    asyncio.create_task(asyncio.sleep(3600)).cancel()
"""


class TestFixture:
    def test_it_catches_a_planted_leak_of_each_kind_and_is_silent_otherwise(
        self, tmp_path: Path
    ) -> None:
        """Each planted leak fails its own test, with its kind and the line that made it."""
        file = tmp_path / "test_planted.py"
        file.write_text(PLANTED)
        installed = any(e.value == "adapters.pytest_plugin" for e in entry_points(group="pytest11"))
        plugin = [] if installed else ["-p", "adapters.pytest_plugin"]
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin,
                "-o", "asyncio_mode=auto", "-c", "/dev/null", "--rootdir", str(tmp_path), str(file),
            ],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        failed = set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE))
        late = re.findall(r"^ERROR \S+::(\w+)", done.stdout, re.MULTILINE)
        assert late == ["test_of_unittest", "test_late"], done.stdout + done.stderr
        (told,) = re.findall(
            r"ERROR at teardown of \w*\.?test_late _+\n+(.*\n(?:  .*\n)+)", done.stdout
        )
        assert told.count("\n  ") == 1
        assert "in one\n" in told
        failed.update(late)
        said = dict(
            re.findall(r"_ (?:\w+\.)?(test_\w+) _+\n+(the test leaked:\n(?:  .*\n)+)", done.stdout)
        )
        planted = {
            line.split("(")[0].strip().removeprefix("async ").removeprefix("def ")
            for line in PLANTED.splitlines()
            if "def test_" in line
        }
        clean = {name for name in planted if "clean" in name}
        assert failed == planted - clean, done.stdout + done.stderr
        lines = PLANTED.splitlines()
        for name, text in said.items():
            assert text.count("\n  ") == 1, text
            begin = next(i for i, line in enumerate(lines) if f"def {name}(" in line)
            for number, line in enumerate(lines[begin:], begin + 1):
                if "planted" in line:
                    assert f"test_planted.py:{number} in {name}" in text
                    break
                if line == "":
                    break
        assert set(said) == planted - clean - set(late)
        assert "table only grows: from 10 to 60 entries" in said["test_map"]
        assert "open file descriptors only grow" in said["test_fds"]
        assert "memory only grows" in said["test_memory"]


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
