"""How long `append_event` and `get_session` take, as the conversation grows, on six session services.

All run on this machine, in one run, turn by turn at each length, on the same events; what counts are
the ratios. ADK's community Redis service needs an older redis-py, so it runs in a virtual environment
of its own, made on first use, as a child of this script that takes commands from its standard input.

    python benchmarks/session_service.py [--quick] [--plot FILE] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from pathlib import Path
from statistics import median
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
PEER = "google-adk-community"
LENGTHS = (10, 100, 1_000, 10_000)
NAME = {"app_name": "bench", "user_id": "user"}


# --- what runs in both processes: only google-adk is imported ---------------------------------------


def make_event(number: int) -> Any:
    """An event as a chat has them: 400 characters of text and a small change of state."""
    from google.adk.events.event import Event
    from google.adk.events.event_actions import EventActions
    from google.genai import types

    return Event(
        author="user" if number % 2 else "agent",
        invocation_id=f"invocation-{number}",
        content=types.Content(role="user", parts=[types.Part(text="twenty characters.. " * 20)]),
        actions=EventActions(state_delta={"turn": number}),
    )


class Contender(Protocol):
    """One service. Times are in seconds."""

    async def fill(self, name: str, count: int) -> None: ...
    async def append(self, name: str, times: int) -> list[float]: ...
    async def get(self, name: str, times: int, look: bool = False) -> list[float]: ...
    async def close(self) -> None: ...


class InProcess:
    """A service in this process.

    Args:
        service: of ADK's interface.
        at_once: a session is filled by handing over one that holds the events already; for a service
            that writes the whole session on each append, and would take hours otherwise.
    """

    def __init__(self, service: Any, *, at_once: bool = False) -> None:
        self.service = service
        self.at_once = at_once
        self.sessions: dict[str, Any] = {}

    async def fill(self, name: str, count: int) -> None:
        session = self.sessions.get(name)
        if session is None:
            session = await self.service.create_session(**NAME, session_id=name)
            self.sessions[name] = session
        missing = count - len(session.events)
        if self.at_once and missing > 1:
            session.events.extend(make_event(number) for number in range(missing - 1))
            missing = 1
        for number in range(missing):
            await self.service.append_event(session, make_event(number))

    async def append(self, name: str, times: int) -> list[float]:
        took = []
        for number in range(times):
            event = make_event(number)
            start = time.perf_counter()
            await self.service.append_event(self.sessions[name], event)
            took.append(time.perf_counter() - start)
        return took

    async def get(self, name: str, times: int, look: bool = False) -> list[float]:
        took = []
        for _ in range(times + 1):
            start = time.perf_counter()
            session = await self.service.get_session(**NAME, session_id=name)
            if look:
                for event in session.events:
                    event.content  # noqa: B018
            took.append(time.perf_counter() - start)
            if len(session.events) != len(self.sessions[name].events):
                raise SystemExit(f"{type(self.service).__name__} lost events")
        return took[1:]  # the first is the one that had not seen them

    async def close(self) -> None:
        close = getattr(self.service, "close", None)
        if close is not None:
            await close()


async def serve_commands(uri: str) -> None:
    """The child: takes one command per line, answers with one line."""
    from google.adk_community.sessions.redis_session_service import RedisSessionService

    contender = InProcess(RedisSessionService(uri=uri), at_once=True)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        method, *args = json.loads(line)
        print(json.dumps(await getattr(contender, method)(*args)), flush=True)


# --- the child as a contender -----------------------------------------------------------------------


class Child:
    """The community service, in its own process and virtual environment."""

    def __init__(self, python: Path, uri: str) -> None:
        self._process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--child", uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{PEER} ended with status {self._process.wait()}")
        return json.loads(line)

    async def _ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return await asyncio.to_thread(self._answer)

    async def fill(self, name: str, count: int) -> None:
        await self._ask("fill", name, count)

    async def append(self, name: str, times: int) -> list[float]:
        return await self._ask("append", name, times)  # type: ignore[no-any-return]

    async def get(self, name: str, times: int, look: bool = False) -> list[float]:
        return await self._ask("get", name, times, look)  # type: ignore[no-any-return]

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def peer_python(say: Any) -> Path | None:
    """The interpreter of the peer's virtual environment, made if it is not there; None if it cannot."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "agent-reconciler" / "bench" / PEER
    python = folder / "bin" / "python"
    check = [
        str(python),
        "-W",
        "ignore",
        "-c",
        "import google.adk_community.sessions.redis_session_service",
    ]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    say(f"making a virtual environment for {PEER} (once)")
    try:
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", PEER]
        subprocess.run(command, capture_output=True, check=True, timeout=900)
        subprocess.run(check, capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", b"") or b""
        print(
            f"!!! {PEER} could not be installed and is SKIPPED, its number is not shown: {error} "
            f"{output.decode(errors='replace')[-300:]}",
            file=sys.stderr,
        )
        return None
    return python


# --- the run ----------------------------------------------------------------------------------------

OURS, SHARING, UNSEEN = "ours", "ours, share_events", "ours, nothing seen"
LOOKED = "ours, every event looked at"
DATABASE, COMMUNITY = "ADK database (sqlite+aiosqlite)", "ADK community Redis"


async def contenders(folder: str, url: str, say: Any) -> dict[str, Contender]:
    from google.adk.sessions import InMemorySessionService
    from google.adk.sessions.database_session_service import DatabaseSessionService
    from google.adk.sessions.sqlite_session_service import SqliteSessionService

    sys.path.insert(0, str(ROOT))
    from adapters.adk import RedisSessionService

    # More than the default, so that the longest session stays remembered among the others.
    room = 512 * 2**20
    found: dict[str, Contender] = {
        OURS: InProcess(RedisSessionService(url, "ours", cache_bytes=room)),
        SHARING: InProcess(RedisSessionService(url, "shared", cache_bytes=room, share_events=True)),
        UNSEEN: InProcess(RedisSessionService(url, "unseen", cache_bytes=0)),
        "ADK in memory": InProcess(InMemorySessionService()),
        "ADK SQLite": InProcess(SqliteSessionService(f"{folder}/sqlite.db")),
        DATABASE: InProcess(DatabaseSessionService(f"sqlite+aiosqlite:///{folder}/database.db")),
    }
    python = peer_python(say)
    if python is not None:
        found[COMMUNITY] = Child(python, url)
    return found


Took = dict[str, dict[str, dict[int, float]]]
"""Median seconds by what was done, service and length."""


async def growth(contender: Contender) -> float:
    """How much longer an append takes at 1,000 events than at 10, measured turn by turn."""
    short: list[float] = []
    long: list[float] = []
    await contender.fill("long", 1000)
    for number in range(60):
        await contender.fill(f"short-{number}", 10)
        short += await contender.append(f"short-{number}", 5)
        long += await contender.append("long", 5)
    return median(long) / median(short)


async def measure(lengths: list[int], say: Any) -> tuple[Took, float]:
    """All medians, and the growth of our own append."""
    from store.embedded import EmbeddedServer

    took: Took = {"append_event": {}, "get_session": {}}
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "redis")
        await server.start()
        running = await contenders(folder, f"unix://{server.socket}", say)
        try:
            for length in lengths:
                # Short sessions would grow too much while measured, so there are several of them.
                names = [f"{length}-{n}" for n in range(8 if length < 100 else 1)]
                rounds = 5 if length < 100 else 20
                appends: dict[str, list[float]] = {label: [] for label in running}
                for label, contender in running.items():
                    say(f"{length} events: filling {label}")
                    for name in names:
                        await contender.fill(name, length)
                for _ in range(2):
                    for label, contender in running.items():
                        say(f"{length} events: append_event of {label}")
                        for name in names:
                            appends[label] += await contender.append(name, rounds // 2)
                for label, times_of in appends.items():
                    took["append_event"].setdefault(label, {})[length] = median(times_of)
                times = 5 if length > 1000 else 15
                for label, contender in running.items():
                    say(f"{length} events: get_session of {label}")
                    got = await contender.get(names[0], times)
                    took["get_session"].setdefault(label, {})[length] = median(got)
                got = await running[OURS].get(names[0], times, look=True)
                took["get_session"].setdefault(LOOKED, {})[length] = median(got)
            say("append_event of ours at 10 and at 1,000 events, in turn")
            grown = await growth(running[OURS])
        finally:
            for contender in running.values():
                await contender.close()
            await asyncio.to_thread(server.stop)
    return took, grown


def numbers_to_hold(took: Took, grown: float) -> list[dict[str, Any]]:
    append, get = took["append_event"], took["get_session"]
    ours, theirs = append[OURS][1000], append[DATABASE][1000]
    opened = get[DATABASE][1000] / get[OURS][1000]
    held = [
        ("append_event, 1,000 events against 10", grown, "at most", 1.2),
        ("append_event at 1,000, ADK database against ours", theirs / ours, "at least", 8),
        ("get_session of 1,000 seen, ADK database against ours", opened, "at least", 20),
    ]
    if COMMUNITY in append:
        ratio = append[COMMUNITY][1000] / ours
        held.append(
            ("append_event at 1,000, ADK community Redis against ours", ratio, "at least", 20)
        )
    return [
        {
            "what": what,
            "ratio": ratio,
            "bound": f"{sense} {bound}",
            "held": ratio <= bound if sense == "at most" else ratio >= bound,
        }
        for what, ratio, sense, bound in held
    ]


def table(title: str, rows: dict[str, dict[int, float]]) -> str:
    lengths = sorted(rows[OURS])
    ours = rows[OURS]
    lines = [f"\n{title}: median ms at so many events (times ours)"]
    lines.append(" " * 34 + "".join(f"{length:>20,}" for length in lengths))
    for label, row in rows.items():
        cells = "".join(
            f"{f'{row[n] * 1e3:.3f} ({row[n] / ours[n]:.1f}x)':>20}" if n in row else f"{'-':>20}"
            for n in lengths
        )
        lines.append(f"  {label:<32}{cells}")
    return "\n".join(lines)


def plot(took: Took, path: Path) -> bool:
    try:
        import matplotlib as mpl
    except ImportError:
        print("!!! no plot: matplotlib is not installed", file=sys.stderr)
        return False
    mpl.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for panel, (what, rows) in zip(panels, took.items(), strict=True):
        for label, row in rows.items():
            style = "-o" if label.startswith("ours") else "--s"
            panel.plot(list(row), [seconds * 1e3 for seconds in row.values()], style, label=label)
        panel.set(title=what, xlabel="events in the session", xscale="log", yscale="log")
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0].set_ylabel("median, ms")
    panels[1].legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="up to 1,000 events")
    parser.add_argument("--plot", type=Path, default=ROOT / "artefacts" / "session_service.png")
    parser.add_argument("--json", action="store_true", help="one object, for machines")
    parser.add_argument("--child", metavar="URI", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        asyncio.run(serve_commands(options.child))
        return 0

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    sys.path.insert(0, str(ROOT))
    lengths = [length for length in LENGTHS if length <= 1000 or not options.quick]
    took, grown = asyncio.run(measure(lengths, say))
    say("")
    held = numbers_to_hold(took, grown)
    if options.json:
        print(json.dumps({"seconds": took, "numbers_to_hold": held}))
    else:
        for title, rows in took.items():
            print(table(title, rows))
        print("\nnumbers to hold")
        for number in held:
            mark = "held" if number["held"] else "NOT HELD"
            print(f"  {number['what']:<56} {number['ratio']:8.2f}  {number['bound']:<14} {mark}")
    if plot(took, options.plot) and not options.json:
        print(f"\nplot: {os.path.relpath(options.plot)}")
    return 0 if all(number["held"] for number in held) else 1


if __name__ == "__main__":
    sys.exit(main())
