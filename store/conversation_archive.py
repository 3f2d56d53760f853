"""A conversation in the archive: one file of compressed JSON lines for each.

`<archive>/<namespace>/conversations/<app>/<user>/<session>.<incarnation>.jsonl.gz`, so that what is
kept of one user is one folder, to be read with `zcat` or removed. The first line says which
conversation it is and holds its state; each further line is an event as it stood in the stream:
`{"id":"1763733780000-1","t":1763733780.1,"e":{…}}`. A conversation that is archived again after
somebody had come back replaces its file: events are only ever added.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from store.archive import Archive
from store.conversations import Conversation
from store.errors import ArchiveError
from store.lease import Lease
from store.segment import time_of

_DOTS = re.compile(r"\.+")


@dataclass(frozen=True, slots=True)
class Archived:
    """Where a conversation was archived, and how many events it has."""

    path: str
    events: int


async def archive_conversation(
    archive: Archive,
    conversation: Conversation,
    pages: AsyncIterator[list[tuple[bytes, bytes, bytes]]],
    lease: Lease,
) -> Archived:
    """Writes a conversation, reads it back, and compares.

    Args:
        archive: where to.
        conversation, pages: what `store.conversations` read.
        lease: of the writer.

    Raises:
        ArchiveError: it could not be written, or what is there now is something else.
    """
    packed: list[bytes] = []
    events = 0
    async for page in pages:
        events += len(page)
        lines = b"".join(_event_line(*entry) for entry in page)
        packed.append(await asyncio.to_thread(gzip.compress, lines, 6, mtime=0))
    head = gzip.compress(_head_line(conversation, events), 6, mtime=0)
    data = b"".join([head, *packed])
    await asyncio.to_thread(read_archived, data)
    keys = conversation.keys
    user, _, session = keys.member.partition("/")
    folder = f"conversations/{_name(keys.app.part)}/{_name(user)}"
    name = f"{session}.{conversation.incarnation}.jsonl.gz"
    path = await asyncio.to_thread(
        archive.keep_file, lease.partition, folder, name, data, lease.epoch
    )
    return Archived(path, events)


def _name(part: str) -> str:
    """A key part as the name of a folder: `.` and `..` are folders already."""
    return part.replace(".", "%2E") if _DOTS.fullmatch(part) else part


def _head_line(conversation: Conversation, events: int) -> bytes:
    about = {
        "app": conversation.app,
        "user": conversation.user,
        "id": conversation.id,
        "incarnation": conversation.incarnation,
        "updated_at": conversation.updated_at,
        "used": time_of(f"{conversation.used_ms}-0"),
        "events": events,
    }
    # The values are JSON already, and stay as they were written.
    state = b",".join(
        json.dumps(key).encode() + b":" + _one_line(text)
        for key, text in conversation.state.items()
    )
    return b'%b,"state":{%b}}\n' % (json.dumps(about).encode()[:-1], state)


def _event_line(entry_id: bytes, timestamp: bytes, text: bytes) -> bytes:
    return b'{"id":"%b","t":%b,"e":%b}\n' % (entry_id, timestamp, _one_line(text))


def _one_line(text: bytes) -> bytes:
    # Within JSON a line break can only stand between tokens.
    return text.replace(b"\n", b" ")


def read_archived(data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A conversation from its file: what the first line says, and its events as they are in the lines.

    The first has `app`, `user`, `id`, `incarnation`, `updated_at` (seconds since 1970), `used`, `events`
    (how many) and `state`; each of the others `id`, `t` and `e`.

    Raises:
        ArchiveError: it is not such a file, or some of it is missing.
    """
    try:
        head, *lines = gzip.decompress(data).splitlines()
        about = json.loads(head)
        events = [json.loads(line) for line in lines]
        missing = about["events"] - len(events)
        lacking = {"app", "user", "id", "state", "updated_at"} - set(about)
        if lacking or not all("e" in event for event in events):
            raise ValueError(f"its lines lack {', '.join(lacking) or 'events'}")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"it is not an archived conversation, or is damaged: {error}") from None
    if missing:
        raise ArchiveError(f"the archived conversation is damaged: {missing} events are missing")
    return about, events
