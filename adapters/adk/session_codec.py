"""Between ADK's objects and what Redis holds: state values and events.

A state value is stored as JSON only if it reads back as the same value; what does not is refused
with its key. An event is stored as its JSON text, without the fields that are None: written in 5 us,
read in 20 us, which is why a process reads an event once only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.adk.events.event import Event
from google.adk.sessions.state import State
from pydantic import BaseModel, ValidationError

from store.errors import MalformedEntry, NotJson, TooLarge

_STATE_FIELD = b"="
_WRITE_JSON = Event.__pydantic_serializer__.to_json
_AS_PLAIN = Event.__pydantic_serializer__.to_python
_READ_JSON = Event.__pydantic_validator__.validate_json


@dataclass(frozen=True, slots=True)
class StateDelta:
    """A change of state, by scope, as fields and JSON texts that alternate.

    Attributes:
        session: the fields carry a `=` in front, to tell them from what else a session's hash holds.
        app: keys without `app:`.
        user: keys without `user:`.
    """

    session: list[bytes] = field(default_factory=list)
    app: list[bytes] = field(default_factory=list)
    user: list[bytes] = field(default_factory=list)

    def script_args(self) -> list[bytes | int]:
        """As the session scripts take it: three numbers of pairs, then all pairs."""
        counts = [len(scope) // 2 for scope in (self.session, self.app, self.user)]
        return [*counts, *self.session, *self.app, *self.user]


def encode_state(state: Mapping[str, Any], *, where: str, limit: int) -> StateDelta:
    """A state, or a change of it, as it is stored. What is `temp:` is left out.

    Args:
        state: key -> value, as ADK gives it.
        where: for messages, e.g. `create_session of session/s1`.
        limit: the most bytes it may take, keys included.

    Raises:
        NotJson: a value, or a key, that JSON cannot hold; the message names the key.
        TooLarge: it takes more than `limit`.
    """
    delta = StateDelta()
    size = 0
    for key, value in state.items():
        if not isinstance(key, str):
            raise NotJson(f"{where}: the state key {key!r} is not text; state keys must be")
        if key.startswith(State.TEMP_PREFIX):
            continue
        text = _encode_value(key, value, where)
        if key.startswith(State.APP_PREFIX):
            name, scope = _utf8(key.removeprefix(State.APP_PREFIX), key, where), delta.app
        elif key.startswith(State.USER_PREFIX):
            name, scope = _utf8(key.removeprefix(State.USER_PREFIX), key, where), delta.user
        else:
            name, scope = _STATE_FIELD + _utf8(key, key, where), delta.session
        scope += (name, text)
        size += len(name) + len(text)
    if size > limit:
        raise TooLarge(_too_large(where, "the state", size, limit))
    return delta


def _too_large(where: str, what: str, size: int, limit: int) -> str:
    return (
        f"{where}: {what} takes {size / 1e6:.1f} MB, the limit is {limit / 1e6:.1f} MB "
        "(max_event_bytes); nothing was stored. Large content belongs into an artifact service"
    )


def _utf8(text: str, key: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NotJson(f"{where}: state key {key!r} holds text that is not valid Unicode") from None


def _encode_value(key: str, value: Any, where: str) -> bytes:
    """A value as JSON.

    The short way first: whatever comes back equal from the C encoder and decoder is JSON. Only for
    the rest is it worth to look closer, to convert what may be converted or to say what is wrong.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if json.loads(text) == value:
            return _utf8(text, key, where)
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        plain = _plain(value, key)
        return _utf8(json.dumps(plain, ensure_ascii=False, separators=(",", ":")), key, where)
    except _NoJson as problem:
        raise NotJson(
            f"{where}: state key {key!r} cannot be stored: {problem}. State must be JSON: text, finite "
            "numbers, true, false, null, lists, and dicts with text keys; nothing was stored"
        ) from None
    except RecursionError:
        raise NotJson(
            f"{where}: state key {key!r} cannot be stored: it contains itself, or is nested too "
            "deeply; nothing was stored"
        ) from None


class _NoJson(Exception):
    pass


def _plain(value: Any, path: str) -> Any:
    """A value with its tuples as lists and its pydantic models as dicts; anything else is refused."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            _check_numbers(value, path)
            return value
        case list() | tuple():
            return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
        case dict():
            for key in value:
                if not isinstance(key, str):
                    raise _NoJson(f"{path} has the key {key!r}, and JSON keys are text")
            return {key: _plain(item, f"{path}[{key!r}]") for key, item in value.items()}
        case BaseModel():
            # ADK's own credential services put models into state and read dicts back.
            try:
                return value.model_dump(mode="json", exclude_none=True)
            except ValueError as error:
                raise _NoJson(f"{path} is a model that has no JSON form ({error})") from None
        case _:
            raise _NoJson(f"{path} is a {type(value).__name__}")


def _check_numbers(value: Any, path: str) -> None:
    """Refuses an infinity or NaN, wherever it is in a value."""
    match value:
        case float():
            if not math.isfinite(value):
                raise _NoJson(f"{path} is {value}, and JSON has no such number")
        case dict():
            for key, item in value.items():
                _check_numbers(item, f"{path}[{key!r}]")
        case list() | tuple() | set() | frozenset():
            for number, item in enumerate(value):
                _check_numbers(item, f"{path}[{number}]")


def plain_state(state: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A state as JSON values, without what is `temp:`.

    Raises:
        NotJson: a value that JSON cannot hold; the message names its key.
    """
    kept = {key: value for key, value in state.items() if not key.startswith(State.TEMP_PREFIX)}
    return {key: json.loads(_encode_value(key, value, where)) for key, value in kept.items()}


def session_state(fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The session's own state, from the fields of its hash."""
    return {
        key[1:].decode(): json.loads(text)
        for key, text in fields.items()
        if key.startswith(_STATE_FIELD)
    }


def shared_state(fields: Mapping[bytes, bytes], prefix: str = "") -> dict[str, Any]:
    """App or user state, from the fields of its hash, with `prefix` before each key."""
    return {prefix + key.decode(): json.loads(text) for key, text in fields.items()}


def merged_state(
    own: Mapping[bytes, bytes], app: Mapping[bytes, bytes], user: Mapping[bytes, bytes]
) -> dict[str, Any]:
    """A session's state as ADK gives it: its own, the app's and the user's."""
    return {
        **session_state(own),
        **shared_state(app, State.APP_PREFIX),
        **shared_state(user, State.USER_PREFIX),
    }


def encode_event(event: Event, *, where: str, limit: int) -> bytes:
    """An event as the JSON that is stored.

    Raises:
        NotJson: something in it has no JSON form, such as an infinity; the message says where.
        TooLarge: the JSON has more than `limit` bytes.
    """
    try:
        text = _WRITE_JSON(event, exclude_none=True)
        if b"null" in text:
            # Perhaps an infinity or NaN, of which pydantic makes null without a word.
            _check_numbers(_AS_PLAIN(event, exclude_none=True), "it")
    except _NoJson as problem:
        raise NotJson(
            f"{where}: event {event.id!r} of {event.author!r} cannot be stored: {problem}; nothing was "
            "stored"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        cause = str(error).splitlines()[0]
        raise NotJson(
            f"{where}: event {event.id!r} of {event.author!r} has no JSON form ({cause}); "
            "nothing was stored"
        ) from None
    if len(text) > limit:
        raise TooLarge(
            _too_large(where, f"event {event.id!r} of {event.author!r}", len(text), limit)
        )
    return text


def decode_event(text: bytes, *, where: str) -> Event:
    """An event from its JSON.

    Raises:
        MalformedEntry: it is not an event that this version of ADK can read.
    """
    try:
        event: Event = _READ_JSON(text)
        return event
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise MalformedEntry(
            f"{where}: not an event that this google-adk can read ({place}: {first['msg']}); was it "
            "written by a newer version?"
        ) from None
