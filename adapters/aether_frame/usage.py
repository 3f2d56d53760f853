"""Who uses what in a frame, and what a request is at work in.

The frame says it in several places: `_agent_runners`, the fields of a chat, `active_tasks`. What runs
on a runner, and who acquired it, is counted by us. From all this follows, for any moment, whether a
runner or a session is in use.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from heapq import nlargest
from typing import Any

from adapters.aether_frame.runner import OpenRunner


class Usage:
    """The relations of one frame.

    Args:
        changed: called with references whose use may have changed.

    Attributes:
        runners, chats: the frame's dicts; empty where it has none.
        sessions: runner id -> the sessions in it.
        opened: runner id -> its Runner object, until that is closed.
        acquired: runner id -> how many requests have it acquired, by our count.
    """

    def __init__(self, changed: Callable[[Iterable[str]], None]) -> None:
        self.runners: Mapping[Any, Any] = {}
        self.chats: Mapping[Any, Any] = {}
        self.sessions: dict[str, Mapping[Any, Any]] = {}
        self.opened: dict[str, OpenRunner] = {}
        self.acquired: dict[str, int] = {}
        self._changed = changed
        self._agents_of: dict[str, dict[str, None]] = {}
        self._runner_of: dict[str, str] = {}
        self._session_of: dict[str, str] = {}
        self._chat_of: dict[str, str] = {}
        self._held: dict[str, frozenset[str]] = {}
        self._thread = threading.get_ident()
        self._loop = _running_loop()

    # --- relations ------------------------------------------------------------------------------

    def map_agent(self, agent: str, runner: str | None) -> None:
        """`_agent_runners` maps an agent to this runner now; None is no longer to any."""
        before = self._runner_of.pop(agent, None)
        if runner is not None:
            self._runner_of[agent] = runner
        if before == runner:
            return
        if before is not None:
            agents = self._agents_of[before]
            del agents[agent]
            if not agents:
                del self._agents_of[before]
        if runner is not None:
            self._agents_of.setdefault(runner, {})[agent] = None
        self._changed(f"runner/{one}" for one in (before, runner) if one is not None)

    def agents_of(self, runner: str) -> list[str]:
        """The agents that are mapped to a runner."""
        return list(self._agents_of.get(runner, ()))

    def runner_of(self, agent: str) -> str | None:
        """The runner that an agent is mapped to."""
        return self._runner_of.get(agent)

    def used_by_runner(self, id: str, context: Any) -> list[str]:
        """What a runner keeps alive."""
        return [f"agent/{agent}" for agent in self._agents_of.get(id, ())]

    def used_by_chat(self, id: str, chat: Any) -> list[str]:
        """What a chat keeps alive; its fields change in place."""
        session = getattr(chat, "active_adk_session_id", None)
        runner = getattr(chat, "active_runner_id", None)
        agent = getattr(chat, "active_agent_id", None)
        if self._session_of.get(id) != session:
            self.chat_left(id, chat)
            if session:
                self._session_of[id], self._chat_of[session] = session, id
        uses = (("session/adk:", session), ("runner/", runner), ("agent/", agent))
        return [f"{kind}{one}" for kind, one in uses if one]

    def chat_left(self, id: Any, chat: Any) -> None:
        """A chat is gone."""
        session = self._session_of.pop(str(id), None)
        if session is not None:
            self._chat_of.pop(session, None)

    # --- in use ---------------------------------------------------------------------------------

    def holders(self, runner: str, context: Any = None) -> int:
        """How many requests hold a runner, or run on it."""
        opened = self.opened.get(runner)
        return max(self._acquired(runner), opened.running if opened is not None else 0)

    def _acquired(self, runner: str) -> int:
        """By our count or the frame's own, whichever is more."""
        active = _count(part_of(self.runners.get(runner), "active_tasks"))
        return max(self.acquired.get(runner, 0), active)

    def holders_of_open(self, id: str, opened: OpenRunner) -> int:
        """How many use a Runner object, which may have left `runners` already."""
        return max(opened.running, self.acquired.get(opened.owner.partition("/")[2], 0))

    def chat_holders(self, id: str, chat: Any) -> int:
        """1 while a request is at work in a chat."""
        runner = getattr(chat, "active_runner_id", None)
        session = getattr(chat, "active_adk_session_id", None)
        return int(bool(runner) and session in self.held_sessions(str(runner)))

    def held_sessions(self, runner: str) -> frozenset[str]:
        """The sessions of a runner that requests are at work in.

        Of a run it is known in which. A request that only holds the runner is at work in one of its
        sessions, most likely the one used last: as many of these are held as there are such requests.
        """
        if (known := self._held.get(runner)) is not None:
            return known
        opened = self.opened.get(runner)
        held = set(opened.runs) if opened is not None else set()
        others = self._acquired(runner) - (opened.running if opened is not None else 0)
        if others > 0:
            idle = [id for id in self.sessions.get(runner, ()) if id not in held]
            held.update(nlargest(others, idle, key=self._last_activity))
        answer = frozenset(held)
        if answer and self._loop is not None and threading.get_ident() == self._thread:
            # It is asked for every session of the runner in turn: kept until the loop goes on.
            self._held[runner] = answer
            self._loop.call_soon(self._held.clear)
        return answer

    def _last_activity(self, session: str) -> float:
        chat = self.chats.get(self._chat_of.get(session))
        if chat is None:
            # A chat is told its session after it was put into its dict, and nobody is told of that.
            of_session = (c for c in self.chats.values() if _session_of(c) == session)
            chat = next(of_session, None)
        moment = getattr(chat, "last_activity", None)
        return moment.timestamp() if isinstance(moment, datetime) else 0.0

    # --- what is noted as it happens ------------------------------------------------------------

    def acquire(self, runner: str, by: int) -> None:
        """A request acquired a runner, or let it go (`by` is 1 or -1)."""
        before = self.held_sessions(runner)
        count = self.acquired.pop(runner, 0) + by
        if count > 0:
            self.acquired[runner] = count
        self._held.clear()
        self._note(runner, before | self.held_sessions(runner))

    def run(self, opened: OpenRunner, session: str) -> None:
        """A run began or ended; it may be in a thread of its own."""
        runner = opened.owner.partition("/")[2]
        if self._loop is None or threading.get_ident() == self._thread:
            self._note(runner, [session])
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note, runner, [session])

    def _note(self, runner: str, sessions: Iterable[str]) -> None:
        self._held.clear()
        refs = [f"runner/{runner}", f"adk_runner/{runner}"]
        for session in sessions:
            refs.append(f"session/adk:{session}")
            if (chat := self._chat_of.get(session)) is not None:
                refs.append(f"session/{chat}")
        self._changed(refs)


def _session_of(chat: Any) -> Any:
    return getattr(chat, "active_adk_session_id", None)


def part_of(context: Any, name: str) -> Any:
    """A part of an entry of `runners`, which is a dict, or an object in other versions."""
    if isinstance(context, dict):
        return context.get(name)
    return getattr(context, name, None)


def _count(tasks: Any) -> int:
    """How many `active_tasks` speaks of: it may be a number, or hold the tasks themselves."""
    if isinstance(tasks, int):
        return max(0, tasks)
    if isinstance(tasks, Sequence | set | frozenset | dict):
        return len(tasks)
    return int(bool(tasks))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
