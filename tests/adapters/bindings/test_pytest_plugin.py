"""The fixture `leak_probe` fails the test that leaked, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

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

EXCUSED = """
import aiohttp
import pytest

kept = []


@pytest.mark.parametrize(
    "leaks", [False, pytest.param(True, marks=pytest.mark.leaks_on_purpose), "told"]
)
async def test_case(leaks):
    if leaks:
        kept.append(aiohttp.ClientSession())


@pytest.fixture
def excuse(request):
    request.node.add_marker("leaks_on_purpose")


async def test_marked_late(excuse):
    kept.append(aiohttp.ClientSession())


@pytest.mark.leaks_on_purpose
async def test_that_asks(leak_probe):
    kept.append(aiohttp.ClientSession())
"""


def run(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on one file, with the plugin and without any settings."""
    installed = any(e.value == "adapters.pytest_plugin" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "adapters.pytest_plugin"]
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *options,
            "-o", "asyncio_mode=auto", "-c", "/dev/null", "--rootdir", str(file.parent), str(file),
        ],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


class TestMark:
    def test_it_excuses_one_case_alone_and_also_when_it_comes_late(self, tmp_path: Path) -> None:
        """With `leak_probe = true` the cases of one test are excused one by one, and none that asks."""
        file = tmp_path / "test_excused.py"
        file.write_text(EXCUSED)
        done = run(file, "-o", "leak_probe=true")
        failed = re.findall(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
        assert failed == ["test_case[told]", "test_that_asks"], done.stdout + done.stderr


class TestFixture:
    def test_it_catches_a_planted_leak_of_each_kind_and_is_silent_otherwise(
        self, tmp_path: Path
    ) -> None:
        """Each planted leak fails its own test, with its kind and the line that made it."""
        file = tmp_path / "test_planted.py"
        file.write_text(PLANTED)
        done = run(file)
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
