"""The spill file: events that wait for Redis on disk, beside the service, when memory is full.

One file per process incarnation, locked (flock) as long as that lives, so that whoever can lock a file
knows that its process is dead. A line of text names the process; then come records, each
`mark, length, seq, CRC-32, payload`, little-endian. A record that was torn by a crash, or damaged, is
passed over and the next one is found by its mark: what is missing shows by its seq. Nothing here waits
for the disk's own cache but `sync`: the file outlives the process, not the machine.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self
from zlib import crc32

from store.keys import key_part

SPILL_LIMIT = 1 << 30
"""Bytes that a spill file may have, unless told otherwise."""
_SUFFIX = ".spill"
_TITLE = "agent-reconciler spill 1 "
_MARK = b"\xa5ev\x01"
_HEAD = struct.Struct("<4sIQI")
_LARGEST_PAYLOAD = 1 << 24
_WINDOW = 1 << 20


class NotASpillFile(ValueError):
    """The file does not begin like a spill file."""


class SpillFile:
    """The spill file of one process incarnation; the methods block, call them in a thread.

    Attributes:
        path: where it is.
        process: whose events it holds.
        last_seq: of the last event written by this object.
        skipped: bytes that were passed over because they are not a record.
    """

    def __init__(self, path: Path, process: str, fd: int, start: int, limit: int) -> None:
        self.path = path
        self.process = process
        self.last_seq = 0
        self.skipped = 0
        self._fd = fd
        self._start = self._read_at = start
        self._end = os.fstat(fd).st_size
        self._limit = limit

    @classmethod
    def create(cls, folder: Path, process: str, limit: int = SPILL_LIMIT) -> Self:
        """A new file for a process, locked.

        Args:
            folder: where; it is made if need be.
            process: the incarnation.
            limit: bytes that it may have.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (key_part(process) + _SUFFIX)
        # Locked before it has its name: nobody may take it for the file of a dead process.
        unnamed = path.with_suffix(".new")
        fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            title = (_TITLE + json.dumps({"process": process}) + "\n").encode()
            os.write(fd, title)
            unnamed.rename(path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                unnamed.unlink()
            raise
        return cls(path, process, fd, len(title), limit)

    @classmethod
    def left_behind(cls, path: Path) -> Self | None:
        """The file of a dead process, locked; None when its process lives, or it is gone.

        Raises:
            NotASpillFile: it does not begin like one.
            OSError: it cannot be read.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another one may have sent and removed it between our open and our lock.
            if os.fstat(fd).st_ino != path.stat().st_ino:
                raise FileNotFoundError(path)
            title, found, _ = os.pread(fd, 4096, 0).partition(b"\n")
            if not found or not title.startswith(_TITLE.encode()):
                raise NotASpillFile(f"{path} is not a spill file")
            process = json.loads(title[len(_TITLE) :])["process"]
            return cls(path, str(process), fd, len(title) + 1, 0)
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return None
        except (ValueError, KeyError, TypeError) as error:
            os.close(fd)
            raise NotASpillFile(f"{path} is not a spill file") from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def size(self) -> int:
        """Bytes of records in it."""
        return self._end - self._start

    def append(self, first: int, payloads: Sequence[bytes]) -> None:
        """Writes events; all of them or, as far as a reader sees, none.

        Args:
            first: seq of the first.
            payloads: encoded events, in order.

        Raises:
            OSError: the disk is full, or the limit of the file is reached.
        """
        records = bytearray()
        for seq, payload in enumerate(payloads, first):
            check = crc32(payload, seq & 0xFFFFFFFF)
            records += _HEAD.pack(_MARK, len(payload), seq, check)
            records += payload
        if self._end + len(records) > self._limit:
            raise OSError(errno.ENOSPC, f"its limit of {self._limit} bytes is reached")
        try:
            self._write(records)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(records)
        self.last_seq = first + len(payloads) - 1

    def _write(self, records: bytearray) -> None:
        left, at = memoryview(records), self._end
        while left:
            written = os.pwrite(self._fd, left, at)
            left, at = left[written:], at + written

    def read(self, count: int) -> list[tuple[int, bytes]]:
        """The next events, (seq, payload), at most `count`; empty at the end.

        Damaged stretches are passed over and counted in `skipped`.

        Raises:
            OSError: it cannot be read now; nothing was passed over.
        """
        found: list[tuple[int, bytes]] = []
        at, skipped = self._read_at, self.skipped
        while len(found) < count and at < self._end:
            record = self._record(at)
            if record is None:
                following = self._next_record(at + 1)
                skipped += following - at
                at = following
                continue
            found.append(record)
            at += _HEAD.size + len(record[1])
        self._read_at, self.skipped = at, skipped
        return found

    def _record(self, at: int) -> tuple[int, bytes] | None:
        head = os.pread(self._fd, _HEAD.size, at)
        if len(head) < _HEAD.size:
            return None
        mark, length, seq, check = _HEAD.unpack(head)
        if mark != _MARK or length > min(_LARGEST_PAYLOAD, self._end - at - _HEAD.size):
            return None
        payload = os.pread(self._fd, length, at + _HEAD.size)
        if len(payload) < length or crc32(payload, seq & 0xFFFFFFFF) != check:
            return None
        return seq, payload

    def _next_record(self, at: int) -> int:
        """Where the next whole record begins; the end when there is none."""
        for mark in self._marks(at):
            if self._record(mark) is not None:
                return mark
        return self._end

    def _marks(self, at: int) -> Iterator[int]:
        while at < self._end:
            window = os.pread(self._fd, _WINDOW, at)
            position = window.find(_MARK)
            while position >= 0:
                yield at + position
                position = window.find(_MARK, position + 1)
            if len(window) < _WINDOW:
                return
            at += len(window) - len(_MARK) + 1

    def rewind(self) -> None:
        """Reads from the beginning again."""
        self._read_at = self._start

    def reset(self) -> None:
        """Everything in it was sent: it is empty again."""
        os.ftruncate(self._fd, self._start)
        self._end = self._read_at = self._start

    def sync(self) -> None:
        """Waits until the disk has it."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Lets go of the file and leaves it for the next incarnation."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()


def spill_files(folder: Path) -> list[Path]:
    """The spill files in a folder, of whatever process, oldest first."""
    found = []
    for path in folder.glob("*" + _SUFFIX):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]
