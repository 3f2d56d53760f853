"""`replay` as its user meets it: what changed, step by step, one life, and exported."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from reconciler.cli import run as run_cli
from reconciler.fleet import fold_log
from reconciler.moment import parse_moment
from store import EventLog, LifecycleEvent, connect
from tests.e2e.programs import ROOT
from tests.history import begin

P = "svc@host:1:1"
IDLE = "idle for 3612.4 s, the limit is 3600 s"
WORKER = "worker-p3-e2@ops:7:1"


def told(number: int, type: str, ref: str, process: str = P, **more: Any) -> LifecycleEvent:
    return LifecycleEvent(**{"type": type, "ref": ref, "process": process, "seq": number, **more})


HISTORY = [
    told(1, "process_started", f"process/{P}"),
    told(2, "created", "runner/r1", trace_id="4bf92f"),
    told(3, "created", "session/s1", uses=("runner/r1",)),
    told(4, "created", "session/s2", uses=("runner/r1",)),
    told(5, "reused", "session/s1", attrs={"in_use": 1}),
    told(6, "cleaned_up", "session/s2", reason="removed from its registry by the service"),
    told(7, "cleaned_up", "session/s1", reason=IDLE, order_id="o-1"),
]


@pytest.fixture
async def past(redis_url: str, namespace: str) -> AsyncIterator[SimpleNamespace]:
    """A log with a story in it, and the ids of its entries."""
    async with connect(redis_url) as store:
        log = EventLog(store, namespace)
        ids = []
        for event in HISTORY:
            if event.order_id:
                asked = told(
                    1, "cleanup_requested", event.ref, WORKER, holder=P, reason=IDLE,
                    order_id=event.order_id, attrs={"sort": "orphan", "expected_seq": 5},
                )  # fmt: skip
                key = (await log.namespace()).partition_keys(P).log
                from store.event import NO_DIGEST, encode

                await store.redis.xadd(key, {"e": encode(asked, NO_DIGEST)[0]})
            await log.append([event])
            ids.append(max((await log.last()).values()))
        yield SimpleNamespace(log=log, ids=ids, url=redis_url, namespace=namespace)


async def run(past: SimpleNamespace, *arguments: str, keys: str = "") -> SimpleNamespace:
    """The command with its status and what it prints, in this process: starting one takes longer."""
    command = [*arguments, "--url", past.url, "--namespace", past.namespace]
    out, err = StringIO(), StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch("sys.stdin", StringIO(keys)),
        patch("reconciler.logs.configure"),
    ):
        status = await asyncio.to_thread(run_cli, command)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


async def answer(past: SimpleNamespace, *arguments: str) -> Any:
    done = await run(past, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def refused(past: SimpleNamespace, *arguments: str) -> str:
    done = await run(past, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return str(done.stderr)


class TestChanges:
    async def test_between_two_entries(self, past: SimpleNamespace) -> None:
        """--from and --to tell what appeared and went between, by kind and reason."""
        found = await answer(past, "replay", "--from", past.ids[1], "--to", past.ids[6])
        assert found["appeared"] == {"session": {"created": 2}}
        assert found["went"]["session"] == {
            "removed from its registry by the service": 1,
            "idle for … s, the limit is … s": 1,
        }
        assert (found["alive_before"], found["alive_after"]) == ({"runner": 1}, {"runner": 1})
        assert [row["order_id"] for row in found["departures"]] == [None, "o-1"]
        shown = await run(past, "replay", "--from", past.ids[1])
        assert "why they went" in shown.stdout
        assert "session/s2" in shown.stdout
        assert shown.stderr == "", "no progress bar in a pipe"

    async def test_life(self, past: SimpleNamespace) -> None:
        """--resource tells who made it, who used it and when, and why it went by whose order."""
        (life,) = (await answer(past, "replay", "--resource", "session/s1"))["lives"]
        assert (life["began"], life["end"], life["reason"]) == ("created", "cleaned_up", IDLE)
        (order,) = life["orders"]
        assert (order["order_id"], order["epoch"], order["outcome"]) == ("o-1", 2, "cleaned_up")
        (runner,) = (await answer(past, "replay", "--resource", "runner/r1"))["lives"]
        assert {user["ref"] for user in runner["users"]} == {"session/s1", "session/s2"}
        assert (runner["trace_id"], runner["ended_ms"]) == ("4bf92f", None)
        shown = (await run(past, "replay", "--resource", "session/s1")).stdout
        assert "order         o-1 by worker@ops:7, epoch 2" in shown
        then = await answer(past, "replay", "--resource", "session/s1", "--at", past.ids[2])
        assert [row["ref"] for row in then["alive"]] == ["session/s1"]
        assert then["lives"][0]["ended_ms"] is None


class TestStep:
    async def test_forward_and_back(self, past: SimpleNamespace) -> None:
        """Keys through a pipe go forward and back; the state at each stop is that of the fold."""
        done = await run(past, "replay", "--step", "--json", keys="nnnnpp.nq")
        stops = [json.loads(line) for line in done.stdout.splitlines()]
        assert [stop["step"] for stop in stops] == [0, 1, 2, 3, 4, 3, 2, 3]
        assert stops[3] == stops[5] == stops[7]
        for stop in stops[1:]:
            ms, number = map(int, stop["id"].split("-"))
            state = await fold_log(past.log, until=(ms, number))
            assert sum(stop["alive"].values()) == len(state.processes[P].resources)

    async def test_end_and_edges(self, past: SimpleNamespace) -> None:
        """`e` goes to the end, beyond which there is nothing; nor is there before the beginning."""
        done = await run(past, "replay", "--step", keys="penN")
        assert "that was the first" in done.stdout
        assert "[8] " in done.stdout
        assert done.stdout.count("that was the last") == 2
        assert "1 runner" in done.stdout

    async def test_only_one_resource(self, past: SimpleNamespace) -> None:
        """With --resource it stops at the events about that one only, in both directions."""
        options = ["--step", "--json", "--resource", "session/s1", "--from", past.ids[0]]
        done = await run(past, "replay", *options, keys="nnnp")
        stops = [json.loads(line) for line in done.stdout.splitlines()]
        types = [stop["event"] and stop["event"]["type"] for stop in stops]
        assert types == [None, "created", "reused", "cleanup_requested", "reused"]

    async def test_on_a_terminal(self, past: SimpleNamespace) -> None:
        """On a terminal single keys, arrows among them, are enough, without Return."""
        shown = await asyncio.to_thread(on_a_terminal, past, [b"n", b"\x1b[C", b"\x1b[D", b"q"])
        assert re.findall(r"\[(\d)\] ", shown) == ["0", "1", "2", "1"]
        assert "    resource: runner/r1\r\n    process: svc@host:1:1\r\n" in shown
        assert "q quit" in shown


def on_a_terminal(past: SimpleNamespace, keys: list[bytes]) -> str:
    """What `replay --step` shows on a pseudo-terminal; each key is typed once the last was answered."""
    import os

    main, side = pty.openpty()
    command = [sys.executable, "-m", "reconciler", "replay", "--step"]
    command += ["--url", past.url, "--namespace", past.namespace]
    shown = b""
    with subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200", "NO_COLOR": "1"},
    ) as process:  # fmt: skip
        os.close(side)
        for number, key in enumerate(keys):
            while shown.count(b"q quit") <= number:
                assert select.select([main], [], [], 20)[0], shown
                shown += os.read(main, 4096)
            os.write(main, key)
        process.wait(20)
    os.close(main)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())


class TestExport:
    async def test_cloud_events(self, past: SimpleNamespace, tmp_path: Path) -> None:
        """Each line is a CloudEvent 1.0: required attributes, lawful names, no two of the same id."""
        file = tmp_path / "log.jsonl"
        assert (await answer(past, "replay", "--export", str(file)))["events"] == 8
        events = [json.loads(line) for line in file.read_text().splitlines()]
        assert [event["subject"] for event in events][1] == "runner/r1"
        for event in events:
            assert event["specversion"] == "1.0"
            assert all(isinstance(event[name], str) and event[name] for name in
                       ("id", "source", "type", "subject", "time", "datacontenttype"))  # fmt: skip
            assert re.fullmatch(r"\S+", event["source"])
            assert datetime.fromisoformat(event["time"]).tzinfo is not None
            assert all(re.fullmatch(r"[a-z0-9]{1,20}", name) for name in event), event.keys()
            assert isinstance(event["data"], dict)
        assert len({(event["source"], event["id"]) for event in events}) == 8
        assert [entry.name for entry in os.scandir(tmp_path)] == [file.name], "no part is left"

    async def test_a_stranger_reads_them(self, past: SimpleNamespace, tmp_path: Path) -> None:
        """The CloudEvents SDK takes every line, and checks it."""
        pytest.importorskip("cloudevents.core")
        from cloudevents.core.formats.json import JSONFormat
        from cloudevents.core.v1.event import CloudEvent

        file = tmp_path / "log.ndjson"
        await answer(past, "replay", "--export", str(file), "--resource", "session/s1")
        read = [JSONFormat().read(CloudEvent, line) for line in file.read_bytes().splitlines()]
        assert [event.get_type() for event in read] == [
            f"agent-reconciler.{type}"
            for type in ("created", "reused", "cleanup_requested", "cleaned_up")
        ]
        assert all(event.get_subject() == "session/s1" for event in read)

    async def test_parquet(self, past: SimpleNamespace, tmp_path: Path) -> None:
        """A Parquet file has a row an event, with typed columns."""
        parquet = pytest.importorskip("pyarrow.parquet")
        file = tmp_path / "log.parquet"
        await answer(past, "replay", "--export", str(file), "--from", past.ids[1])
        rows = parquet.read_table(file).to_pylist()
        assert [row["ref"] for row in rows[:2]] == ["session/s1", "session/s2"]
        assert rows[0]["uses"] == ["runner/r1"]
        assert rows[0]["at"].tzinfo is not None
        assert json.loads(rows[2]["attrs"]) == {"in_use": 1}

    async def test_parquet_without_pyarrow(
        self, past: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without pyarrow one line says what to install; nothing is written."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        file = tmp_path / "log.parquet"
        assert "agent-reconciler[parquet]" in await refused(past, "replay", "--export", str(file))
        assert list(os.scandir(tmp_path)) == []


class TestBadInput:
    async def test_time_in_the_future(self, past: SimpleNamespace) -> None:
        """A time that has not come is refused, whichever bound it is."""
        for option in ("--at", "--from", "--to"):
            message = await refused(past, "replay", option, "2999-01-01")
            assert f"{option} 2999-01-01 00:00:00.000 UTC is in the future" in message
        assert "in the future" in await refused(past, "replay", "--at", "999999999999999-0")

    async def test_entry_that_does_not_exist(self, past: SimpleNamespace) -> None:
        """An id that no entry has is refused with the nearest before and after."""
        first = int(past.ids[0].split("-")[0])
        message = await refused(past, "replay", "--at", f"{first - 1}-7")
        assert past.ids[0] in message
        message = await refused(past, "replay", "--from", f"{past.ids[6]}7")
        assert past.ids[6] in message

    async def test_before_the_beginning(self, past: SimpleNamespace) -> None:
        """A time before the log began, or before 1970, is a moment at which nothing was alive."""
        for moment in ("2001-01-01", "1960-01-01", "20010101", "1000", "0", "0.5"):
            assert (await answer(past, "replay", "--at", moment))["alive"] == []

    @pytest.mark.parametrize(
        ("text", "ms"),
        [
            ("1000", 1_000_000), ("1763733780.5", 1_763_733_780_500),
            ("20010101", 978_307_200_000), ("99999999", 99_999_999_000),
        ],
    )  # fmt: skip
    def test_seconds_or_date(self, text: str, ms: int) -> None:
        """Digits are seconds since 1970, but for eight that are a date."""
        assert parse_moment(text)[0] == ms

    async def test_unknown_resource(self, past: SimpleNamespace) -> None:
        """A resource that the log never heard of is refused with the nearest."""
        assert "session/s1" in await refused(past, "replay", "--resource", "session/s11")

    @pytest.mark.parametrize(
        ("arguments", "needle"),
        [
            (["--resource", "session/s11"], "session/s1"),
            (["--resource", "runner/zz", "-f"], "runner/zz: the log of namespace"),
            (["--process", "svd"], "nearest are svc"),
            (["--process", "svd", "-f", "--json"], "nearest are svc"),
            (["--process", "nobody@nowhere:1:1", "--lines", "0"], "never heard of process"),
        ],
    )
    async def test_log_of_what_does_not_exist(
        self, past: SimpleNamespace, arguments: list[str], needle: str
    ) -> None:
        """`log` of a resource or process that the log never heard of is refused with the nearest."""
        async with asyncio.timeout(30):
            assert needle in await refused(past, "log", *arguments)

    async def test_log_of_what_exists(self, past: SimpleNamespace) -> None:
        """`log` of a process, by id or name, and of a resource prints what is about it."""
        for options in (["--process", "svc"], ["--process", P], ["--resource", "session/s1"]):
            assert "session/s1" in (await run(past, "log", *options)).stdout
        none = await run(past, "log", "--process", "worker-p3-e2", "--resource", "runner/r1")
        assert (none.returncode, none.stdout) == (0, "")

    @pytest.mark.parametrize(
        ("arguments", "needle"),
        [
            (["--from", "2021-01-02", "--to", "2021-01-01"], "give the earlier one first"),
            (["--from", "noon-ish"], "--from 'noon-ish'"),
            (["--to", "99999999999999999999-0"], "neither a time nor an entry id"),
            (["--at", "2021-01-01", "--to", "2021-01-01"], "the one or the other"),
            (["--step", "--export", "x.jsonl"], "do not go together"),
            (["--at", "25:00:00"], "--at '25:00:00' is neither"),
            (["--at", "1763733780000"], "neither a time nor an entry id"),
            (["--export", "events.xml"], ".parquet"),
            (["--export", "events"], "--export events: its ending is no format"),
            (["--export", ""], "needs the name of a file"),
            (["--export", "/nowhere/at/all/log.jsonl"], "/nowhere/at/all/log.jsonl"),
            (["--export", "/proc/log.jsonl"], "cannot be written"),
        ],
    )
    async def test_one_line(self, past: SimpleNamespace, arguments: list[str], needle: str) -> None:
        """Nonsense is told in one line with status 2."""
        assert needle in await refused(past, "replay", *arguments)


class TestLostBeginning:
    @pytest.fixture
    async def cut(self, redis_url: str, namespace: str) -> AsyncIterator[SimpleNamespace]:
        """A log whose first entries were dropped: the archive is off."""
        async with connect(redis_url) as store:
            story = await begin(store, namespace)
            await story.write(40)
            state = await fold_log(story.log)
            before = {(p.id, ref) for p in state.processes.values() for ref in p.resources}
            await story.archive("off")
            await story.write(20)
            yield SimpleNamespace(story=story, before=before, url=redis_url, namespace=namespace)

    @pytest.mark.parametrize("options", [["--to", "{end}"], ["--step"], ["--export", "{file}"]])
    async def test_is_told(self, cut: SimpleNamespace, tmp_path: Path, options: list[str]) -> None:
        """What begins with the log says in one line what is missing, and from when on all is there."""
        end = (await cut.story.log.last())[0]
        words = [w.format(end=end, file=tmp_path / "log.jsonl") for w in options]
        done = await run(cut, "replay", *words, "--json", keys="nn")
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
        assert "incomplete: events up to " in done.stderr
        assert "of partition 0 were dropped (archive: off)" in done.stderr
        for line in done.stdout.splitlines():
            json.loads(line)
        complete = re.search(r"from (\S+ \S+) UTC on", done.stderr)
        assert complete
        later = await run(cut, "replay", *words, "--from", complete[1].replace(" ", "T"), "--json")
        assert (later.returncode, later.stderr) == (0, "")

    async def test_log_of_what_may_have_been_dropped(self, cut: SimpleNamespace) -> None:
        """`log` of what it does not know says that a part of it was dropped."""
        for options in (["--resource", "runner/nothere"], ["--process", "nothere"]):
            message = await refused(cut, "log", *options)
            assert "never heard of" in message
            assert "were dropped (archive: off)" in message

    async def test_complete_is_complete(self, cut: SimpleNamespace) -> None:
        """From the moment that is named on, the state is that of all that ever happened."""
        done = await run(cut, "replay", "--to", (await cut.story.log.last())[0])
        complete = re.search(r"from (\S+ \S+) UTC on", done.stderr)
        assert complete
        moment = complete[1].replace(" ", "T")
        alive = (await answer(cut, "replay", "--at", moment))["alive"]
        assert cut.before
        assert {(row["process"], row["ref"]) for row in alive} == cut.before
        refused_before = await refused(cut, "replay", "--at", "2001-01-01")
        assert "ask for a later moment" in refused_before

    async def test_no_word_where_nothing_is_missing(self, past: SimpleNamespace) -> None:
        """A whole log is looked at without a word about it."""
        for options in (["--to", past.ids[6]], ["--step"]):
            assert (await run(past, "replay", *options, keys="n")).stderr == ""
