"""How a copy of a session is told from the stored one, and an event from another.

A `Session` that this service gave out carries, as ADK's `_storage_update_marker`, the incarnation of
the stored session and the entry id of the last event it holds. The script that appends compares that
with what is stored; here is what it is given, and what is made of its answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.adk.events.event import Event
from google.adk.sessions.session import Session
from google.adk.sessions.state import State

from adapters.adk.session_cache import Entry, number_of
from adapters.adk.session_codec import decode_event


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
