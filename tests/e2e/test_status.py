"""`status`: it counts what the specification counts, reads only what is new, and can be watched."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from adapters import Host
from reconciler import Policy
from reconciler.cli.status import picture
from reconciler.fleet import read_fleet
from reconciler.fleet_view import FleetView, Rates
from store import EventLog, Store
from store.log import Page
from store.namespace import Namespace, open_namespace
from tests.e2e.programs import ROOT
from tests.history import Story, begin
from tests.support import event, eventually


@pytest.fixture
async def space(store: Store, namespace: str) -> Namespace:
    return await open_namespace(store, namespace)


def service(host: Host) -> Any:
    made = SimpleNamespace(sessions={}, agent_runners={})
    host.observe(made, "sessions", kind="session", uses=lambda id, name: [f"runner/{name}"])
    host.observe_index(made, "agent_runners", names="session")
    return made


async def published(host: Host, space: Namespace) -> None:
    """Waits until events and inventory of a host are in Redis."""

    async def done() -> bool:
        fleet = await read_fleet(space.store, space)
        summary = fleet.summaries.get(host.process)
        return summary is not None and summary.as_of == host.recorder.seq

    await eventually(done)


class TestView:
    async def test_agrees_with_a_whole_look(self, host: Host, space: Namespace) -> None:
        """After each change the view has the state and the drift that a look at everything has."""
        policy = Policy(session_idle_timeout=0.001).model_dump_json(exclude_unset=True)
        made, view = service(host), FleetView(space.store, space)
        await published(host, space)
        await view.open()
        changes = [
            lambda: made.sessions.update(s1="r1", s2="r1"),
            lambda: made.agent_runners.update(a1="s9", a2="s1"),
            lambda: made.sessions.pop("s1"),
        ]
        for change in changes:
            change()
            await published(host, space)
            fleet, _ = await view.look()
            whole = await read_fleet(space.store, space)
            assert fleet.state == whole.state
            assert {(i.sort, i.ref) for i in fleet.drift} == {(i.sort, i.ref) for i in whole.drift}
            await space.store.redis.set(space.keys.policy, policy)
        fleet, rates = await view.look()
        assert {item.ref for item in fleet.drift.orphans} == {"session/s2"}, "the new policy counts"
        assert (rates.appeared, rates.went, rates.torn_down) == (2, 1, 0)

    async def test_reads_only_what_is_new(
        self, host: Host, space: Namespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A further look reads the events that came since, and none twice."""
        made, view = service(host), FleetView(space.store, space)
        made.sessions.update({f"s{n}": "r1" for n in range(300)})
        await published(host, space)
        await view.open()
        await view.look()
        read: list[Page] = []
        page = EventLog.page

        async def counted(*args: Any, **options: Any) -> Page:
            read.append(await page(*args, **options))
            return read[-1]

        made.sessions["late"] = "r1"
        await published(host, space)
        monkeypatch.setattr(EventLog, "page", counted)
        await view.look()
        assert [row.ref for one in read for _, row in one.rows] == ["session/late"]


class TestRates:
    """What happened in the last minutes, where entries have left the stream meanwhile."""

    @pytest.mark.parametrize("archived", [True, False])
    async def test_after_a_trim(
        self, store: Store, namespace: str, tmp_path: Path, archived: bool
    ) -> None:
        """What is in the archive is counted; of what was dropped it is said from when on it counts."""
        story = await begin(store, namespace)
        await story.write(200)
        before = await self.rates(story)
        assert (before.dropped_ms, before.appeared > 50) == (None, True)
        await story.archive(tmp_path if archived else "off")
        after = await self.rates(story)
        if archived:
            assert replace(after, seconds=0) == replace(before, seconds=0)
            return
        assert after.dropped_ms is not None
        assert (after.appeared, after.went) == (0, 0)
        assert after.seconds <= before.seconds + 1
        ref = "session/since"
        await story.log.append([event(1, "process_started", "process/d@h:4:4", process="d@h:4:4")])
        await story.log.append([event(2, "created", ref, process="d@h:4:4")])
        assert (await self.rates(story)).appeared == 1
        out = Console(file=StringIO(), width=400)
        view = FleetView(store, story.namespace)
        await view.open()
        out.print(picture(*await view.look(), {}))
        assert "before which the log was dropped: 1 appeared" in out.file.getvalue()  # type: ignore[attr-defined]

    async def rates(self, story: Story) -> Rates:
        view = FleetView(story.store, story.namespace)
        await view.open()
        return (await view.look())[1]


class TestCommand:
    async def lines(self, url: str, namespace: str, *options: str) -> asyncio.subprocess.Process:
        command = ["-m", "reconciler", "status", "--watch", "--interval", "0.1", *options]
        command += ["--url", url, "--namespace", namespace]
        return await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )

    async def test_watch_in_a_pipe(self, host: Host, redis_url: str, namespace: str) -> None:
        """In a pipe each look is a line that follows what happens; with --json an object."""
        made = service(host)
        for options in ([], ["--json"]):
            watcher = await self.lines(redis_url, namespace, *options)
            assert watcher.stdout is not None
            first = await asyncio.wait_for(watcher.stdout.readline(), 20)
            assert b"\x1b" not in first
            made.sessions[f"s{len(options)}"] = "r1"
            wanted = [f"{1 + len(options)} session", f'"session":{1 + len(options)}']
            async with asyncio.timeout(20):
                while wanted[len(options)] not in (await watcher.stdout.readline()).decode():
                    pass
            watcher.terminate()
            await watcher.wait()

    async def test_what_is_shown(self, host: Host, redis_url: str, namespace: str) -> None:
        """Oldest idle, rates and stuck teardowns are in the object, the idle ones oldest first."""
        made = service(host)
        made.sessions.update(s1="r1", s2="r1")
        watcher = await self.lines(redis_url, namespace, "--json")
        assert watcher.stdout is not None
        async with asyncio.timeout(20):
            while True:
                status = json.loads(await watcher.stdout.readline())
                if len(status["oldest_idle"]) == 2:
                    break
        watcher.terminate()
        await watcher.wait()
        idle = [row["idle_ms"] for row in status["oldest_idle"]]
        assert idle == sorted(idle, reverse=True)
        assert status["rates"]["appeared"] == 2
        assert status["stuck"] == []

    @pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (200, 50)])
    async def test_fits_a_terminal(
        self, host: Host, redis_url: str, namespace: str, width: int, height: int
    ) -> None:
        """What is wrong stands first, nothing is cut off without a word, and no word is broken."""
        made = service(host)
        made.sessions.update({f"session-with-a-long-name-{n}": "r1" for n in range(30)})
        made.agent_runners.update({f"a{n}": f"gone-{n}" for n in range(30)})
        options = ("--url", redis_url, "--namespace", namespace)
        async with asyncio.timeout(40):
            while True:
                lines = await asyncio.to_thread(on_a_terminal, width, height, options)
                if any("30 dangling" in line for line in lines):
                    break
        assert lines[0].startswith("no worker runs")
        assert len([line for line in lines if line.strip()]) <= height
        assert max(map(len, map(str.rstrip, lines))) <= width
        assert all(line.rstrip()[-1] in "╮│┤╯" for line in lines if line[:1] in "╭│├╰")
        text = "".join(lines)
        assert host.process in text, "it is on one line"
        assert "longest idle, and 25 more" in text or "there is no room to show any of 30" in text
        assert "drift: 30 dangling (the first" in text


def on_a_terminal(width: int, height: int, options: Sequence[str]) -> list[str]:
    """The first whole picture of `status --watch` on a pseudo-terminal."""
    main, side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "reconciler", "status", "--watch", "--interval", "0.1", *options],
        stdin=side, stdout=side, stderr=side, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(width), "LINES": str(height)},
    ) as process:  # fmt: skip
        os.close(side)
        shown = b""
        # The second of two pictures has begun: the one before it is whole.
        while shown.count(b"processes") < 2:
            assert select.select([main], [], [], 20)[0], shown
            shown += os.read(main, 65536)
        process.terminate()
        process.wait(20)
    os.close(main)
    pictures = [
        re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
        for text in shown.decode(errors="ignore").split("\x1b[H")
    ]
    first = next(text for text in pictures if "processes" in text)
    return first.replace("\r", "").split("\n")
