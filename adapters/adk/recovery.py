"""Recovery of ADK sessions: archive one before it goes, bring it back when it is asked for again.

A service that keeps conversations itself (Redis, a database) gets a record without transcript; the
conversation is where it was. `InMemorySessionService` forgets a session when it is deleted, so its
events go into the record, and from there back into the memory of whichever process asks next.
"""

from __future__ import annotations

import json
import time
from typing import Any

from google.adk.events.event import Event
from google.adk.sessions import BaseSessionService, InMemorySessionService, Session
from google.adk.sessions.base_session_service import GetSessionConfig
from google.adk.sessions.state import State

from adapters.adk.session_codec import decode_event, encode_event, plain_state
from adapters.host import Host
from store.connection import Store
from store.conversation_archive import read_archived
from store.namespace import DEFAULT_NAMESPACE
from store.recovery import RETENTION, RecoveryRecord, RecoveryStore

_ANY_SIZE = 2**62
_SHARED = (State.APP_PREFIX, State.USER_PREFIX)
WITHOUT_EVENTS = GetSessionConfig(num_recent_events=0)


def get_recovery_store(
    where: Host | Store,
    namespace: str | None = None,
    *,
    retention: float | None = RETENTION,
) -> RecoveryStore:
    """The recovery records beside a host's log, or of a store.

    Args:
        where: a host that has started, or an open store.
        namespace: the host's, or `default`, unless given.
        retention: seconds that a record is kept; None keeps it for ever.

    Raises:
        NamespaceError, PolicyError: see `RecoveryStore`.
    """
    if isinstance(where, Host):
        return RecoveryStore(where.store, namespace or where.namespace_name, retention=retention)
    return RecoveryStore(where, namespace or DEFAULT_NAMESPACE, retention=retention)


def keeps_in_memory(service: BaseSessionService) -> bool:
    """The service's sessions end with the process."""
    return isinstance(service, InMemorySessionService)


async def archive_session(
    recovery: RecoveryStore,
    service: BaseSessionService,
    *,
    app_name: str,
    user_id: str,
    session_id: str,
    agent: str | None = None,
    process: str = "",
) -> RecoveryRecord | None:
    """Saves what is needed to go on with a session later, here or in another process.

    Args:
        recovery: where to.
        service: that has the session; it is left as it is.
        app_name: of the session.
        user_id: of the session.
        session_id: of the session.
        agent: a name for the agent that it used last.
        process: that saves it.

    Returns:
        The record as it was saved; None when there is no such session.

    Raises:
        NotJson: a value of its state, or an event, has no JSON form; the message names it.
        TooLarge, RedisUnavailable: see `RecoveryStore.save`.
    """
    doing = f"archive_session of session/{session_id}"
    in_memory = keeps_in_memory(service)
    session = await service.get_session(
        app_name=app_name,
        user_id=user_id,
        session_id=session_id,
        config=None if in_memory else WITHOUT_EVENTS,
    )
    if session is None:
        return None
    transcript = state = None
    if in_memory:
        state = plain_state(session.state, where=doing)
        transcript = tuple(
            encode_event(event, where=doing, limit=_ANY_SIZE).decode() for event in session.events
        )
    record = RecoveryRecord(
        app_name,
        user_id,
        session_id,
        time.time(),
        process,
        agent,
        state or {},
        transcript,
        session.last_update_time,
    )
    await recovery.save(record)
    return record


async def load_archived_session(
    recovery: RecoveryStore,
    service: BaseSessionService,
    *,
    app_name: str,
    user_id: str,
    session_id: str,
) -> Session | None:
    """Brings an archived session back into a service that has lost it, with its history and state.

    App and user state that the service has already win over what was saved. The record stays until it
    expires or is purged: should this process die, the next one starts from it again.

    Args:
        recovery: where from.
        service: where to. One that has the session is left as it is, unless it has only the beginning,
            because it was cut short when it was brought back: then the rest follows.
        app_name: of the session.
        user_id: of the session.
        session_id: of the session.

    Returns:
        The session, without its events; None when neither the service nor a transcript has it.

    Raises:
        MalformedEntry: the record cannot be read.
        RedisUnavailable: Redis does not answer.
    """
    names = {"app_name": app_name, "user_id": user_id, "session_id": session_id}
    held = await service.get_session(**names, config=WITHOUT_EVENTS)
    if held is not None and keeps_in_memory(service):
        return held
    record = await recovery.load(app_name, user_id, session_id)
    if record is None or record.transcript is None:
        return held
    return await _bring_back(service, record, f"load_archived_session of session/{session_id}")


async def restore_session(service: BaseSessionService, archived: bytes) -> Session:
    """Brings back a conversation that a worker archived after `session_retention`.

    Its own state is as it was. App and user state, which were never archived, stay as they are now, and
    the events no longer say how they changed them.

    Args:
        service: where to. If it has a session of that name, that one is left as it is, unless it is the
            beginning of this one, because an earlier attempt was cut short: then the rest follows.
        archived: the file, whose place is in the log: `agent-reconciler log --resource
            conversation/APP/USER/ID`.

    Returns:
        The session, without its events.

    Raises:
        ArchiveError: it is not such a file, or some of it is missing; nothing was changed.
        MalformedEntry: an event that this version of ADK cannot read; nothing was changed.
        RedisUnavailable: Redis does not answer; the same call again goes on where this one stopped.
    """
    about, lines = read_archived(archived)
    record = RecoveryRecord(
        about["app"],
        about["user"],
        about["id"],
        saved_at=0.0,
        state=about["state"],
        transcript=tuple(json.dumps(line["e"]) for line in lines),
        updated_at=about["updated_at"],
    )
    return await _bring_back(service, record, f"restore_session of session/{record.session}")


async def _bring_back(service: BaseSessionService, record: RecoveryRecord, where: str) -> Session:
    """Makes a session of a record with a transcript, or goes on with one that was cut short."""
    names = {"app_name": record.app, "user_id": record.user, "session_id": record.session}
    # Decoded before anything is created: a record that cannot be read changes nothing.
    events = [decode_event(text.encode(), where=where) for text in record.transcript or ()]
    session = await service.get_session(**names, config=None)
    if session is None:
        session = await service.create_session(**names, state=await _state_for(service, record))
        missing = events
    else:
        missing = _missing(session, record, events)
    if isinstance(service, InMemorySessionService):
        # Not by append_event: that would apply each state change of old once more, over newer state
        # of the user and the app.
        if missing:
            stored = service.sessions[record.app][record.user][session.id]
            stored.events.extend(missing)
            stored.last_update_time = record.updated_at
    else:
        for event in missing:
            await service.append_event(session, _without_shared(event))
    found = await service.get_session(**names, config=WITHOUT_EVENTS)
    return session if found is None else found


def _missing(session: Session, record: RecoveryRecord, events: list[Event]) -> list[Event]:
    """What a session lacks that has the beginning of these events; nothing if it is another one."""
    held = [event.id for event in session.events]
    if held != [event.id for event in events[: len(held)]]:
        return []
    if not held and _own(session.state) != _own(record.state):
        return []  # Somebody began anew.
    return events[len(held) :]


def _own(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith(_SHARED)}


def _without_shared(event: Event) -> Event:
    changes = event.actions.state_delta
    if not any(key.startswith(_SHARED) for key in changes):
        return event
    actions = event.actions.model_copy(update={"state_delta": _own(changes)})
    return event.model_copy(update={"actions": actions})


async def _state_for(service: BaseSessionService, record: RecoveryRecord) -> dict[str, Any]:
    known: set[str] = set()
    if any(key.startswith(_SHARED) for key in record.state):
        user_state = await service.get_user_state(app_name=record.app, user_id=record.user)
        known = {State.USER_PREFIX + key for key in user_state}
        if isinstance(service, InMemorySessionService):
            known |= {State.APP_PREFIX + key for key in service.app_state.get(record.app, {})}
    return {key: value for key, value in record.state.items() if key not in known}


async def purge_archived_session(
    recovery: RecoveryStore, *, app_name: str, user_id: str, session_id: str
) -> bool:
    """Deletes what was archived of a session; False when nothing was.

    Raises:
        RedisUnavailable: Redis does not answer.
    """
    return await recovery.purge(app_name, user_id, session_id)
