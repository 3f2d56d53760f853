"""Keeps conversations for `session_retention` after their last use; then they are archived, and go.

The conversations of an app are looked after by whoever acts for one partition, found by the app's
name, so there is one worker for each. Archive first, read back; then one script looks again whether
somebody came back, deletes, and notes the end; then the log is told, under the lease; then the note
goes. Killed at any point, a conversation is at worst in both places, or its end told twice, with the
same incarnation. Nothing is deleted unarchived unless the operator wrote `archive: off`, or the app
declared it ephemeral.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import msgspec
from redis.exceptions import RedisError

from reconciler.moment import span
from reconciler.policy import Policy
from store.archive import Archive
from store.channel import WorkerChannel
from store.conversation_archive import archive_conversation
from store.conversations import (
    Note,
    claim,
    conversation_ref,
    drop_name,
    end_conversation,
    events_of,
    known_apps,
    partition_of_app,
    read_conversation,
    told,
)
from store.errors import ArchiveError, Fenced, SequenceGap
from store.event import EventRow, Scalar
from store.lease import Lease
from store.logs import get_logger
from store.messages import NO_PROCESS
from store.namespace import Namespace
from store.refusals import Unavailable
from store.retention import OFF, read_retention

log = get_logger("reconciler.retention")

_AT_ONCE = 100
_OF_ONE = (ArchiveError, RedisError, msgspec.MsgspecError, LookupError, ValueError, TypeError)
"""What a conversation raises that is damaged, or that the archive does not take."""
_FAILURES = 10
"""So many conversations that cannot be archived, one after the other, are the fault of the archive."""


class SessionRetention:
    """Ends the conversations that nobody used for as long as they are kept.

    Args:
        namespace: of the log.
        channels: gives what the worker acts for: partition -> the end to write to.
        policy: says how long.
    """

    def __init__(
        self,
        namespace: Namespace,
        channels: Callable[[], Mapping[int, WorkerChannel]],
        policy: Policy,
    ) -> None:
        self._namespace = namespace
        self._channels = channels
        self._looking = asyncio.Lock()
        self._said: set[tuple[str, str]] = set()
        seconds = policy.session_retention
        self._retention_ms = None if seconds is None else round(seconds * 1000)

    async def look(self) -> None:
        """Goes through the apps whose conversations are this worker's to look after.

        Nothing happens while an earlier call is still at it.
        """
        if self._looking.locked():
            return
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        try:
            for app in await known_apps(self._namespace):
                channel = self._channels().get(partition_of_app(self._namespace, app))
                if channel is not None:
                    await self._try(app, channel)
        except Unavailable as error:
            log.warning("conversations not looked at: Redis is away", error=str(error))

    async def _try(self, app: str, channel: WorkerChannel) -> None:
        try:
            await self.keep(app, channel)
        except Fenced as error:
            log.warning("conversations left: the lease is gone", app=app, error=str(error))
        except SequenceGap as error:
            log.warning("ended conversations not told: Redis forgot", app=app, error=str(error))
        except Unavailable:
            raise
        except _OF_ONE as error:
            log.error("conversations not archived: they stay", app=app, error=str(error))

    async def keep(self, app: str, channel: WorkerChannel) -> None:
        """Ends what is due of one app, and tells what ended.

        Raises:
            Fenced: the lease is no longer held; what ended is told by the next worker.
            ArchiveError: the archive cannot be written; what is not in it stays.
        """
        retention = await read_retention(self._namespace)
        archive = None
        if retention.archive not in (None, OFF):
            archive = await asyncio.to_thread(Archive, retention.archive, self._namespace.name)
        # Where there is no archive, and nobody said that there shall be none, nothing is due.
        limit = self._retention_ms if retention.archive is not None else None
        staying = failures = 0
        while True:
            due, ended = await claim(
                self._namespace, app, channel.lease, limit, most=_AT_ONCE, skip=staying
            )
            if ended:
                await self._tell(app, channel, ended)
            for member in due:
                if self._channels().get(channel.lease.partition) is not channel:
                    raise Fenced(f"partition {channel.lease.partition} was given up meanwhile")
                try:
                    gone = await self._end(app, member, channel.lease, archive)
                    failures = 0
                except Unavailable:
                    raise
                except _OF_ONE as error:
                    if archive is not None:
                        await asyncio.to_thread(archive.try_writing)
                    failures += 1
                    if failures > _FAILURES:
                        raise
                    # Others can perhaps be archived: what is wrong may be with this one.
                    self._say_once(app, member, error)
                    gone = False
                staying += not gone
            if not due and len(ended) < _AT_ONCE:
                return

    def _say_once(self, app: str, member: str, error: Exception) -> None:
        if (app, member) not in self._said:
            log.error(
                "a conversation cannot be archived: it stays",
                app=app,
                member=member,
                error=f"{type(error).__name__}: {error}",
            )
            self._said = {*self._said, (app, member)} if len(self._said) < _AT_ONCE else set()

    async def _end(self, app: str, member: str, lease: Lease, archive: Archive | None) -> bool:
        """Ends one conversation; False when it stays."""
        assert self._retention_ms is not None
        found = await read_conversation(self._namespace, app, member)
        if found is None:
            await drop_name(self._namespace, app, member, lease)
            return True
        note = Note(
            member,
            "ephemeral" if found.ephemeral else "retention",
            found.incarnation,
            used_ms=found.used_ms,
            events=int(found.last.partition("-")[2]),
        )
        if archive is not None and not found.ephemeral:
            pages = events_of(self._namespace, found)
            kept = await archive_conversation(archive, found, pages, lease)
            note = Note(member, note.reason, note.incarnation, kept.path, kept.events, note.used_ms)
        outcome = await end_conversation(self._namespace, found, lease, self._retention_ms, note)
        if outcome == "used":
            log.info("conversation used again while it was archived", ref=found.ref)
        # One that changed is due again if it is; its new last use says so.
        return outcome in {"ended", "gone", "used"}

    async def _tell(
        self, app: str, channel: WorkerChannel, ended: list[tuple[bytes, Note]]
    ) -> None:
        """Writes what ended into the log, then takes the notes away."""
        await channel.write([self._event(app, note) for _, note in ended])
        await told(self._namespace, app, channel.lease, [raw for raw, _ in ended])
        log.info("conversations ended", app=app, count=len(ended))

    def _event(self, app: str, note: Note) -> EventRow:
        attrs: dict[str, Scalar] = {}
        if note.incarnation:
            attrs |= {"incarnation": note.incarnation, "events": note.events}
        if note.archived:
            attrs["archived"] = note.archived
        ref = conversation_ref(self._namespace.keys.app_sessions(app), note.member)
        return EventRow(
            "cleaned_up",
            ref,
            "",
            0,
            time.time(),
            NO_PROCESS,
            reason=self._reason(note),
            attrs=attrs,
        )

    def _reason(self, note: Note) -> str:
        match note.reason:
            case "retention":
                where = "archived" if note.archived else "not archived: the archive is off"
                return f"retention: not used for {self._days()}; {where}"
            case "ephemeral":
                return f"retention: ephemeral, and not used for {self._days()}"
            case "ttl":
                return "ttl: its time to live was over"
            case _:
                return "gone: its keys were deleted by hand"

    def _days(self) -> str:
        return "its time" if self._retention_ms is None else span(self._retention_ms)
