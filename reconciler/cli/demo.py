"""`agent-reconciler demo`: a service that leaks, and the reconciler that cleans it up, before your eyes.

Three real processes that share nothing but Redis: an embedded redis-server, the chat service of
examples/leaky_chat.py on real google-adk, and a worker. This command starts them, watches through
Redis like anybody else, and stops them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import reconciler
from reconciler.cli.log import line
from reconciler.cli.output import console, emit, size, table
from reconciler.describe import describe
from reconciler.fleet import Fleet, read_fleet
from reconciler.phrases import counted
from store.connection import Store, connect
from store.errors import ReconcilerError
from store.log import EventLog
from store.namespace import Namespace, open_namespace

NAMESPACE = "demo"
IDLE_SECONDS = 2.0
"""Idle limits of the demo; so short that it can be watched."""
_READY_SECONDS = 60.0
_LOG_LINES = 12
_KINDS = ("session", "runner", "agent", "recovery_record", "config_lock")


@click.command(short_help="Watch a leaking chat service being cleaned up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option(
    "--chats", type=click.IntRange(1, 5000), default=300, show_default=True, help="Conversations."
)
@click.option(
    "--seconds",
    type=click.FloatRange(5, 600),
    default=50.0,
    show_default=True,
    help="How long the clean-up may take.",
)
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where Redis keeps its data; a temporary folder if left out.",
)
def demo(as_json: bool, chats: int, seconds: float, keep: bool, folder: Path | None) -> int:
    """Watch a leaking chat service being cleaned up. Status 0 only if nothing is left."""
    example = find_example()
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ar-demo-")))
        place = place.absolute()
        report = asyncio.run(_demo(place, example, chats, seconds, keep, quiet=as_json))
    if as_json:
        emit(report)
    else:
        _show(report)
    return 0 if report["left"] == 0 else 1


def find_example() -> Path:
    """The program of the demo host, in a checkout or as it was installed.

    Raises:
        ReconcilerError: it is not there, or google-adk is not.
    """
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.adk") is None:
        raise ReconcilerError(
            "the demo needs google-adk: install it with `pip install 'agent-reconciler[adk,embedded]'`"
        )
    root = Path(reconciler.__file__).parent.parent
    for place in ("examples", "agent_reconciler_examples"):
        if (found := root / place / "leaky_chat.py").exists():
            return found
    raise ReconcilerError(f"the demo host examples/leaky_chat.py is not in {root}: install again")


async def _demo(
    folder: Path, example: Path, chats: int, seconds: float, keep: bool, *, quiet: bool
) -> dict[str, Any]:
    url = f"embedded://{folder}"
    async with connect(url) as store:
        namespace = await open_namespace(store, NAMESPACE)
        say = _Say(quiet)
        say(
            f"a redis-server runs in {folder}; a chat service has {chats} conversations and leaks …"
        )
        host = [str(example), "--url", url, "--namespace", NAMESPACE, "--chats", str(chats)]
        async with _child(host) as service:
            ready = await _first_line(service)
            before = await _settled(store, namespace, ready["process"])
            say(
                f"… done: {sum(registries(before).values())} entries in its registries. "
                f"Now a worker starts; idle limits are {IDLE_SECONDS:g} s, so that you can watch"
            )
            limits = [
                f"{name}_idle_timeout={IDLE_SECONDS}" for name in ("session", "runner", "agent")
            ]
            limits += [
                f"owner_timeout={IDLE_SECONDS}",
                f"idle_timeouts.recovery_record={IDLE_SECONDS}",
            ]
            settings = [part for limit in limits for part in ("--set", limit)]
            worker = ["-m", "reconciler", "worker", "--url", url, "--namespace", NAMESPACE]
            began = time.monotonic()
            async with _child([*worker, "--http", "off", *settings]):
                after = await _watch(store, namespace, ready["process"], seconds, quiet=quiet)
                took = time.monotonic() - began
                if keep:
                    await _wait_for_interrupt(say, url)
        done = await _count_outcomes(EventLog(store, namespace))
    return _report(before, after, took, done)


class _Say:
    """Prints progress on a terminal or a pipe, and nothing where JSON is wanted."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)


@asynccontextmanager
async def _child(arguments: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python program of ours, stopped at the end. What it logs is kept for when it fails."""
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
        try:
            yield process
            if process.returncode is not None:
                raise ReconcilerError(_last_words(arguments, errors.fileno()))
        except _Silent:
            raise ReconcilerError(_last_words(arguments, errors.fileno())) from None
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 10)
                except TimeoutError:
                    process.kill()
                    await process.wait()


class _Silent(Exception):
    """A child ended, or said nothing in time."""


def _last_words(arguments: list[str], descriptor: int) -> str:
    text = Path(f"/proc/self/fd/{descriptor}").read_text(errors="replace").strip().splitlines()
    return f"{' '.join(arguments[:3])} ended before its time: {text[-1] if text else 'it said nothing'}"


async def _first_line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_READY_SECONDS):
            text = await process.stdout.readline()
    except TimeoutError:
        raise _Silent from None
    if not text:
        raise _Silent
    ready: dict[str, Any] = json.loads(text)
    return ready


async def _look(store: Store, namespace: Namespace, process: str) -> tuple[Fleet, dict[str, int]]:
    """The fleet, and how full each registry of the service is, with its memory and descriptors."""
    fleet = await read_fleet(store, namespace)
    summary = fleet.summaries.get(process)
    if summary is None:
        return fleet, {}
    counts = {registry.name: registry.count for registry in summary.registries}
    return fleet, counts | {"rss": summary.rss, "fds": summary.fds}


async def _settled(store: Store, namespace: Namespace, process: str) -> dict[str, int]:
    """The registries once everything that was recorded has been published."""
    deadline = time.monotonic() + 10
    while True:
        fleet, counts = await _look(store, namespace, process)
        summary, state = fleet.summaries.get(process), fleet.state.processes.get(process)
        if summary and state and summary.as_of == state.seq and summary.outbox == 0:
            return counts
        if time.monotonic() > deadline:
            raise ReconcilerError(f"{process} did not publish its inventory within 10 s")
        await asyncio.sleep(0.05)


def registries(counts: dict[str, int]) -> dict[str, int]:
    """The registries alone, without memory and descriptors."""
    return {name: count for name, count in counts.items() if name not in {"rss", "fds"}}


async def _watch(
    store: Store, namespace: Namespace, process: str, seconds: float, *, quiet: bool
) -> dict[str, int]:
    """Shows what goes on until every registry is empty, or the time is up."""
    deadline = time.monotonic() + seconds
    out = console()
    shown = contextlib.nullcontext() if quiet or not out.is_terminal else Live(console=out)
    recent: deque[Text] = deque(maxlen=_LOG_LINES)
    event_log = EventLog(store, namespace)
    position = max((await event_log.last()).values())
    with shown as live:
        while True:
            fleet, counts = await _look(store, namespace, process)
            async for entry in event_log.read(position):
                position = entry.id
                recent.append(_short(line(entry)))
            if live is not None:
                live.update(_picture(fleet, counts, recent))
            empty = counts and not any(registries(counts).values())
            if (empty and not fleet.drift) or time.monotonic() > deadline:
                return counts
            await asyncio.sleep(0.1)


def _short(text: Text) -> Text:
    """A line of the log that stays one line, without date and writer."""
    short = text[len("2026-11-21 ") :]
    short.no_wrap, short.overflow = True, "ellipsis"
    return short


def _picture(fleet: Fleet, counts: dict[str, int], recent: deque[Text]) -> Group:
    facts = describe(fleet)
    alive = Table.grid(padding=(0, 2))
    kinds = [*_KINDS, *sorted(set(facts["resources"]) - set(_KINDS))]
    alive.add_row(
        Text("alive", style="bold"),
        *(f"{facts['resources'].get(kind, 0)} {kind}" for kind in kinds),
    )
    alive.add_row(
        Text("drift", style="bold"), *(f"{count} {sort}" for sort, count in facts["drift"].items())
    )
    memory = f"{size(counts.get('rss', 0))}", f"{counts.get('fds', 0)} file descriptors"
    alive.add_row(Text("process", style="bold"), *memory)
    return Group(alive, Text(""), *recent)


async def _count_outcomes(event_log: EventLog) -> dict[str, int]:
    """How many resources of each kind went, and how many orders ended how."""
    done: Counter[str] = Counter()
    async for entry in event_log.read():
        event = entry.event
        if event.type == "cleaned_up" and event.order_id:
            done["index_entry" if "registry" in (event.attrs or {}) else event.kind] += 1
        elif event.type in {"cleanup_failed", "cleanup_refused"}:
            done[str(event.type)] += 1
    return dict(done)


async def _wait_for_interrupt(say: _Say, url: str) -> None:
    say(f"everything goes on running; look around with `agent-reconciler status --url {url} "
        f"--namespace {NAMESPACE}`, end with Ctrl-C")  # fmt: skip
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def _report(
    before: dict[str, int], after: dict[str, int], took: float, done: dict[str, int]
) -> dict[str, Any]:
    left = sum(registries(after).values()) if after else sum(registries(before).values())
    names = dict.fromkeys([*registries(before), *registries(after)])
    return {
        "before": {name: before.get(name, 0) for name in names},
        "after": {name: after.get(name, 0) for name in names},
        "memory_bytes": {"before": before.get("rss"), "after": after.get("rss")},
        "file_descriptors": {"before": before.get("fds"), "after": after.get("fds")},
        "torn_down": done,
        "seconds": round(took, 1),
        "left": left,
    }


def _show(report: dict[str, Any]) -> None:
    out = console()
    rows: list[tuple[Any, ...]] = [
        (name, count, report["after"][name]) for name, count in report["before"].items()
    ]
    memory, fds = report["memory_bytes"], report["file_descriptors"]
    rows.append(("memory", size(memory["before"] or 0), size(memory["after"] or 0)))
    rows.append(("file descriptors", fds["before"], fds["after"]))
    out.print(table("the chat service", ["registry", "before#", "after#"], rows))
    done = ", ".join(f"{count} {kind}" for kind, count in report["torn_down"].items())
    out.print(f"torn down in {report['seconds']} s: {done or 'nothing'}")
    left = report["left"]
    out.print(
        "nothing is left" if left == 0 else f"{counted(left, 'entry is', 'entries are')} LEFT"
    )
