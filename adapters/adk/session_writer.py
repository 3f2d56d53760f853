"""Appends an event to a stored session, and tells a copy from the stored one and an event from another.

A `Session` that the service gave out carries, as ADK's `_storage_update_marker`, the incarnation of the
stored session and the entry id of the last event it holds. The script that appends compares that with
what is stored, and answers with the events that have the same id, if any; what to make of its answer is
decided here.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.adk.errors import StaleSessionError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.sessions.session import Session
from google.adk.sessions.state import State

from adapters.adk.session_cache import Entry, SessionCache, number_of
from adapters.adk.session_codec import decode_event, encode_event, encode_state
from adapters.adk.session_options import Options
from adapters.adk.stored_sessions import Append, StoredSessions
from store.keys import SessionKeys


class SessionWriter:
    """Appends events to stored sessions.

    Args:
        stored: the sessions in Redis.
        cache: what this process has seen of them; it is brought along.
        options: of the service.
    """

    def __init__(self, stored: StoredSessions, cache: SessionCache, options: Options) -> None:
        self._stored = stored
        self._cache = cache
        self._options = options

    async def append(
        self, keys: SessionKeys, session: Session, event: Event
    ) -> tuple[bytes, bytes] | None:
        """Appends an event to the stored session; the copy and the event are left as they are.

        Args:
            keys: of the session.
            session: the writer's copy; nobody else appends through it meanwhile.
            event: to append.

        Returns:
            Incarnation and entry id, for the copy to follow; None when the event was stored long ago,
            and the copy has nothing to follow.

        Raises:
            SessionNotFoundError, StaleSessionError, NotJson, TooLarge, RedisUnavailable: see
                `RedisSessionService.append_event`.
        """
        doing = f"append_event to session/{session.id}"
        ttl, limit = self._options.ttl_ms(session.app_name), self._options.max_event_bytes
        changes = event.actions.state_delta if event.actions else {}
        delta = encode_state(changes, where=doing, limit=limit)
        text = encode_event(without_temp(event), where=doing, limit=limit)
        fresh = freshness(session, self._options.accept_stale)
        event_id = event.id.encode("utf-8", "surrogatepass")
        append = Append(fresh, event_id, text, event.timestamp, delta)
        answer = await self._stored.append(keys, append, 0, ttl=ttl, doing=doing)
        while answer.outcome == "known":
            entry_id = find_equal(text, answer.same, doing)
            if entry_id is None:
                # Other events have its id: all are kept.
                differing = len(answer.same)
                answer = await self._stored.append(keys, append, differing, ttl=ttl, doing=doing)
            elif follows(session, answer.incarnation, entry_id):
                # Stored by an earlier attempt whose answer was lost on the way.
                return answer.incarnation, entry_id
            else:
                return None
        if answer.outcome == "gone":
            raise SessionNotFoundError(f"Session {session.id} not found.")
        if answer.outcome == "stale":
            raise StaleSessionError(
                f"The session {session.id} was changed in storage since it was loaded. Load it "
                "again with get_session before appending more events."
            )
        with self._cache.lock:
            known = self._cache.get(keys.session)
            if known and (known.incarnation, known.last) == (answer.incarnation, answer.before):
                known.extend([(answer.entry_id, text)])
                self._cache.put(keys.session, known)
        return answer.incarnation, answer.entry_id


def marker_of(incarnation: bytes, last: bytes) -> str:
    """What a copy carries that holds the events up to `last`."""
    return f"{incarnation.decode()}/{last.decode()}"


def freshness(session: Session, accept_stale: bool) -> tuple[str, str | bytes, str]:
    """How the script can tell whether a copy is stale, as its first three arguments."""
    if accept_stale:
        return "any", "", ""
    if session._storage_update_marker is not None:
        return "marker", session._storage_update_marker, ""
    # A session that did not come from here, or went through JSON: what the database service does.
    last = session.events[-1].id if session.events else ""
    return "event", last.encode("utf-8", "surrogatepass"), repr(session.last_update_time)


def follows(session: Session, incarnation: bytes, entry_id: bytes) -> bool:
    """Whether an entry is the one right after what a copy holds."""
    held, _, last = (session._storage_update_marker or "").rpartition("/")
    return held == incarnation.decode() and number_of(entry_id) == number_of(last.encode()) + 1


def find_equal(text: bytes, stored: Iterable[Entry], doing: str) -> bytes | None:
    """The entry id of the stored event that equals this one, if there is any."""
    for entry_id, other in stored:
        if other == text or decode_event(other, where=doing) == decode_event(text, where=doing):
            return entry_id
    return None


def without_temp(event: Event) -> Event:
    """The event as it is stored: `temp:` state is of the invocation, not of the session."""
    changes = event.actions.state_delta if event.actions else {}
    if not any(key.startswith(State.TEMP_PREFIX) for key in changes):
        return event
    kept = {key: value for key, value in changes.items() if not key.startswith(State.TEMP_PREFIX)}
    actions = event.actions.model_copy(update={"state_delta": kept})
    return event.model_copy(update={"actions": actions})
