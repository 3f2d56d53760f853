"""Random operations give the same answers, and the same errors, on Redis and on ADK's in-memory service.

Each step does one thing to both services, under a clock and a source of ids that both see alike, and
compares what comes back. `AsInMemory` runs with `accept_stale`, where nothing may differ; `Refusing`
runs as the service is by default, and knows when a copy is stale. The intended differences that the
machine steps around are marked, and listed in docs/session-service.md.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from google.adk.errors import StaleSessionError
from google.adk.events.event import Event
from google.adk.events.event_actions import EventActions
from google.adk.platform import time as platform_time
from google.adk.platform import uuid as platform_uuid
from google.adk.sessions import InMemorySessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.genai import types
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from adapters.adk import RedisSessionService

APPS = st.sampled_from(["app", "app/{x}"])
USERS = st.sampled_from(["ann", "ben:1", ""])
IDS = st.sampled_from(["s", "t", " s ", "u/é", "\n"])
NEW_IDS = st.one_of(IDS, st.none(), st.just(""))
KEYS = st.sampled_from(["k", "l", "app:k", "user:k", "temp:k", "app:", "user:", "temp:", "={\0}:"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
STATES = st.dictionaries(KEYS, JSON, max_size=4)
TIMES = st.integers(0, 30).map(lambda tick: 1_000_000.0 + tick / 7)
CONFIGS = st.none() | st.builds(
    GetSessionConfig,
    num_recent_events=st.none() | st.integers(0, 6),
    after_timestamp=st.none() | st.just(0.0) | TIMES,
)
PARTS = st.one_of(
    st.builds(types.Part, text=st.text(max_size=8)),
    st.builds(
        types.Part,
        function_call=st.builds(
            types.FunctionCall,
            name=st.just("f"),
            args=st.dictionaries(st.just("a"), JSON, max_size=1),
        ),
    ),
    st.builds(types.Part, inline_data=st.builds(types.Blob, data=st.binary(max_size=8))),
)
EVENTS = st.builds(
    Event,
    author=st.sampled_from(["user", "agent"]),
    invocation_id=st.sampled_from(["", "i1"]),
    id=st.sampled_from(["", "", "same"]),  # mostly a new one, sometimes one that others have
    timestamp=TIMES,
    partial=st.sampled_from([None, None, None, False, True]),
    content=st.none() | st.builds(types.Content, parts=st.lists(PARTS, max_size=2)),
    actions=st.builds(EventActions, state_delta=STATES, escalate=st.none() | st.booleans()),
    long_running_tool_ids=st.none() | st.sets(st.sampled_from(["a", "b"])),
    custom_metadata=st.none() | st.dictionaries(st.text(max_size=3), JSON, max_size=1),
    branch=st.none() | st.just("a.b"),
    error_code=st.none() | st.just("STOP"),
)


@dataclass
class Copy:
    """One session object of each service, loaded at the same time.

    Attributes:
        incarnation: of the stored session.
        version: how many events it had when the copy was last in step with it.
    """

    memory: Session
    redis: Session
    incarnation: int
    version: int


@dataclass
class Sent:
    name: tuple[str, str, str]
    event: Event


@dataclass
class Stored:
    incarnation: int
    version: int = 0


def plain(value: Any) -> Any:
    """What is compared: everything but the marker of storage, which the in-memory service has not."""
    if isinstance(value, Session):
        return {name: getattr(value, name) for name in Session.model_fields}
    return value


class Machine(RuleBasedStateMachine):
    url: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    _namespaces = itertools.count()

    copies: Bundle[Copy] = Bundle("copies")
    sent: Bundle[Sent] = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.runner.get_loop()
        self.memory = InMemorySessionService()
        namespace = f"{type(self).__name__}-{next(self._namespaces)}"
        self.redis = RedisSessionService(self.url, namespace, **self.options)
        # Another process: it sees the events only from outside.
        self.other = RedisSessionService(self.url, namespace, cache_bytes=20_000, **self.options)
        self.stored: dict[tuple[str, str, str], Stored] = {}
        self.incarnations = itertools.count()
        self.tick = 0

    def teardown(self) -> None:
        self.run(self.redis.close())
        self.run(self.other.close())
        self.runner.close()

    def run(self, doing: Coroutine[Any, Any, Any]) -> Any:
        async def at_this_tick() -> Any:
            ids = itertools.count()
            platform_time.set_time_provider(lambda: 1_000_000.0 + self.tick / 3)
            platform_uuid.set_id_provider(lambda: f"id-{self.tick}-{next(ids)}")
            return await doing

        return self.runner.run(at_this_tick())

    def both(self, method: str, *, redis: RedisSessionService | None = None, **args: Any) -> Any:
        """Calls both services, compares the answers or the errors, and answers with both."""
        self.tick += 1
        answers = []
        for service in (self.memory, redis or self.redis):
            try:
                answers.append(self.run(getattr(service, method)(**args)))
            except Exception as error:
                answers.append(error)
        mine, theirs = answers
        if isinstance(mine, Exception):
            assert (type(theirs), str(theirs)) == (type(mine), str(mine))
        else:
            assert plain(theirs) == plain(mine)
        return mine, theirs

    def copy_of(self, memory: Session, redis: Session) -> Copy:
        stored = self.stored[memory.app_name, memory.user_id, memory.id]
        return Copy(memory, redis, stored.incarnation, stored.version)

    @initialize(target=copies, app=APPS, user=USERS)
    def begin(self, app: str, user: str) -> Any:
        return self.create(app, user, "s", {})

    @rule(target=copies, app=APPS, user=USERS, session_id=NEW_IDS, state=STATES)
    def create(self, app: str, user: str, session_id: str | None, state: dict[str, Any]) -> Any:
        mine, theirs = self.both(
            "create_session", app_name=app, user_id=user, session_id=session_id, state=state
        )
        if isinstance(mine, Exception):
            return multiple()
        self.stored[app, user, mine.id] = Stored(next(self.incarnations))
        return self.copy_of(mine, theirs)

    @rule(target=copies, app=APPS, user=USERS, session_id=IDS, config=CONFIGS, other=st.booleans())
    def get(
        self, app: str, user: str, session_id: str, config: GetSessionConfig | None, other: bool
    ) -> Any:
        mine, theirs = self.both(
            "get_session",
            redis=self.other if other else None,
            app_name=app,
            user_id=user,
            session_id=session_id,
            config=config,
        )
        return multiple() if mine is None else self.copy_of(mine, theirs)

    @rule(target=copies, held=copies, config=CONFIGS, other=st.booleans())
    def open_again(self, held: Copy, config: GetSessionConfig | None, other: bool) -> Any:
        name = held.memory
        return self.get(name.app_name, name.user_id, name.id, config, other)

    @rule(target=sent, held=copies, event=EVENTS)
    def append(self, held: Copy, event: Event) -> Any:
        return self.deliver(held, event)

    def deliver(self, held: Copy, event: Event) -> Any:
        session = held.memory
        name = (session.app_name, session.user_id, session.id)
        stored = self.stored.get(name)
        mine, theirs = event.model_copy(deep=True), event.model_copy(deep=True)
        known = not event.partial and self.known(name, event)
        if known and any(key.startswith("temp:") for key in event.actions.state_delta):
            # Intended difference 2: temp state does not make an event another one.
            return multiple()
        stale = (
            stored is not None
            and not self.options.get("accept_stale")
            and (held.incarnation, held.version) != (stored.incarnation, stored.version)
        )
        if stale and not event.partial and not known:
            # Intended difference 1: the in-memory service takes what a stale copy appends.
            before = held.redis.model_copy(deep=True)
            with pytest.raises(StaleSessionError):
                self.run(self.redis.append_event(held.redis, theirs))
            assert plain(held.redis) == plain(before)
            assert theirs == event
            return multiple()
        length = len(self.events(name))
        errors: list[Any] = []
        for service, copy, its in (
            (self.memory, held.memory, mine),
            (self.redis, held.redis, theirs),
        ):
            try:
                self.run(service.append_event(copy, its))
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[0] == errors[1]
        if errors[0]:
            return multiple()
        assert theirs == mine
        assert plain(held.redis) == plain(held.memory)
        if len(self.events(name)) > length:
            assert stored is not None
            stored.version += 1
            held.incarnation, held.version = stored.incarnation, stored.version
        return Sent(name, mine)

    def events(self, name: tuple[str, str, str]) -> list[Event]:
        app, user, session_id = name
        session = self.memory.sessions.get(app, {}).get(user, {}).get(session_id)
        return session.events if session else []

    def known(self, name: tuple[str, str, str], event: Event) -> bool:
        trimmed = self.redis._trim_temp_delta_state(event.model_copy(deep=True))
        return any(trimmed == other for other in self.events(name) if other.id == event.id)

    @rule(held=copies, sent=sent)
    def deliver_again(self, held: Copy, sent: Sent) -> None:
        session = held.memory
        name = (session.app_name, session.user_id, session.id)
        if self.known(name, sent.event) and sent.event not in session.events:
            # Intended difference 3: a copy that lacks just this event gets it.
            self.run(self.redis.append_event(session.model_copy(deep=True), sent.event))
            return
        self.deliver(held, sent.event)

    @rule(held=consumes(copies))
    def delete(self, held: Copy) -> None:
        session = held.memory
        self.both(
            "delete_session",
            app_name=session.app_name,
            user_id=session.user_id,
            session_id=session.id,
        )
        self.stored.pop((session.app_name, session.user_id, session.id), None)

    @rule(app=APPS, user=USERS, session_id=IDS)
    def delete_by_name(self, app: str, user: str, session_id: str) -> None:
        self.both("delete_session", app_name=app, user_id=user, session_id=session_id)
        self.stored.pop((app, user, session_id.strip()), None)

    @rule(app=APPS, user=st.none() | USERS, other=st.booleans())
    def list_sessions(self, app: str, user: str | None, other: bool) -> None:
        redis = self.other if other else None
        self.tick += 1
        mine = self.run(self.memory.list_sessions(app_name=app, user_id=user))
        theirs = self.run((redis or self.redis).list_sessions(app_name=app, user_id=user))
        assert list(map(plain, theirs.sessions)) == list(map(plain, mine.sessions))

    @rule(app=APPS, user=USERS)
    def user_state(self, app: str, user: str) -> None:
        self.both("get_user_state", app_name=app, user_id=user)

    @invariant()
    def everything_is_the_same(self) -> None:
        for app, user, session_id in list(self.stored):
            self.both("get_session", app_name=app, user_id=user, session_id=session_id)


class AsInMemory(Machine):
    options: ClassVar[dict[str, Any]] = {"accept_stale": True}


class Refusing(Machine):
    options: ClassVar[dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def _machines_use(redis_url: str) -> None:
    Machine.url = redis_url


SETTINGS = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
AsInMemory.TestCase.settings = SETTINGS
Refusing.TestCase.settings = SETTINGS


class TestAsInMemory(AsInMemory.TestCase):  # type: ignore[name-defined,misc]
    """With accept_stale, every answer is that of the in-memory service."""


class TestRefusing(Refusing.TestCase):  # type: ignore[name-defined,misc]
    """By default, every answer is that of the in-memory service, but that stale copies are refused."""
