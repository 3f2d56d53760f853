"""The archive: segments of the log in a folder, or at any URL that fsspec knows.

One folder per partition, `<url>/<namespace>/p0007/`, and in it for each segment a file of compressed
JSON lines and its index (see `store.segment`), and copies of snapshots. A segment counts from the
moment its index is there: data and index are written beside their place and renamed, data first, so
whoever is killed while writing leaves nothing that a reader would take for a segment. Segments that
overlap (the same entries, written again by the next worker) do no harm: reading goes by entry ids.

The calls of `Archive` block; callers on an event loop put them into a thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from store.connection import shown
from store.errors import ArchiveError
from store.position import RawEntry, id_key
from store.segment import DamagedSegment, Index, digest_of, read_block, read_blocks

_DATA = ".jsonl.gz"
_INDEX = ".index.json"
_SNAPSHOT = ".snapshot"
_NAME = re.compile(r"(\d+-\d+)_(\d+-\d+)\.index\.json")
_TEMPORARY = re.compile(r"\.(.+)\.e(\d+)\.tmp")


def place(url: str) -> str:
    """A URL or folder as it is recorded: a folder becomes absolute, for workers run elsewhere.

    Raises:
        ArchiveError: it names no place.
    """
    if not url.strip():
        # `--to "$UNSET"` would make whatever the present folder is the archive of all workers.
        raise ArchiveError(f"{url!r} is no place for an archive: give a folder, a URL, or off")
    return url if "://" in url or "::" in url else str(Path(url).expanduser().absolute())


class Archive:
    """The archive of one namespace at one place.

    Args:
        url: folder or fsspec URL.
        namespace: its name.

    Raises:
        ArchiveError: from every method, when the place cannot be used; in one line.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self._namespace = namespace
        with self._doing("use"):
            self._fs: Any
            self._fs, root = fsspec.core.url_to_fs(url)
            self._root = f"{str(root).rstrip('/')}/{namespace}"

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ArchiveError, DamagedSegment):
            raise
        except Exception as error:
            # fsspec is a door to a hundred libraries, each with errors of its own.
            said = getattr(error, "strerror", None) or str(
                error
            )  # Without the path, which follows.
            cause = " ".join(said.split()) or type(error).__name__
            raise ArchiveError(
                f"cannot {what} the archive {shown(self.url)}: {cause}; nothing was trimmed and nothing "
                "is lost: make the place usable, or name another with `agent-reconciler archive --to`"
            ) from error

    def _folder(self, partition: int) -> str:
        return f"{self._root}/p{partition:04d}"

    def path(self, partition: int, name: str) -> str:
        """Where the data of a segment is, for messages."""
        return f"{self._folder(partition)}/{name}{_DATA}"

    # --- write ----------------------------------------------------------------------------------

    def write(self, index: Index, data: bytes, epoch: int) -> None:
        """Writes a segment, reads it back, and compares.

        Args:
            index, data: the segment.
            epoch: of the lease of the writer, which names its temporary files.

        Raises:
            ArchiveError: it could not be written, or what is there now is something else.
        """
        folder = self._folder(index.partition)
        with self._doing("write to"):
            self._fs.makedirs(folder, exist_ok=True)
            self._sweep(folder, epoch)
            self._put(folder, index.name + _DATA, data, epoch)
            self._put(folder, index.name + _INDEX, msgspec.json.encode(index), epoch)
            back = self.index(index.partition, index.name)
            read = self.data(index.partition, index.name)
        entries = sum(len(block) for block in read_blocks(read)) if read == data else -1
        if back != index or entries != index.entries:
            raise ArchiveError(
                f"what was read back from {self.path(index.partition, index.name)} is not what was "
                "written: nothing was trimmed; see to the disk, then try again"
            )

    def keep_file(self, partition: int, folder: str, name: str, data: bytes, epoch: int) -> str:
        """Writes a file of another sort than a segment, reads it back, and compares.

        Args:
            partition: in whose folder it is written first; epochs can only be compared within one.
            folder: within that of the namespace.
            name: of the file; one that is there is replaced.
            data: its content.
            epoch: of the lease of the writer, which names its temporary files.

        Returns:
            Where it is.

        Raises:
            ArchiveError: it could not be written, or what is there now is something else.
        """
        path, beside = f"{self._root}/{folder}", self._folder(partition)
        with self._doing("write to"):
            self._fs.makedirs(path, exist_ok=True)
            self._fs.makedirs(beside, exist_ok=True)
            self._sweep(beside, epoch)
            self._put(path, name, data, epoch, beside)
            back = bytes(self._fs.cat_file(f"{path}/{name}"))
        if back != data:
            raise ArchiveError(
                f"what was read back from {path}/{name} is not what was written: nothing was deleted; "
                "see to the disk, then try again"
            )
        return f"{path}/{name}"

    def try_writing(self) -> None:
        """Writes a file and removes it, to learn early whether the place can be written to."""
        with self._doing("write to"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._put(self._root, ".writable", b"", 0)
            self._fs.rm_file(f"{self._root}/.writable")

    def _put(self, folder: str, name: str, data: bytes, epoch: int, beside: str = "") -> None:
        temporary = f"{beside or folder}/.{name}.e{epoch}.tmp"
        with self._fs.open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if isinstance(self._fs, LocalFileSystem):
                # What is about to be trimmed is nowhere else: it must survive a loss of power.
                os.fsync(file.fileno())
        self._fs.mv(temporary, f"{folder}/{name}")
        if isinstance(self._fs, LocalFileSystem):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _sweep(self, folder: str, epoch: int) -> None:
        """Removes what writers before this one left behind when they were killed."""
        for name in self._names(folder):
            found = _TEMPORARY.fullmatch(name)
            if found and int(found[2]) < epoch:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(f"{folder}/{name}")

    def write_snapshot(self, partition: int, position: str, sealed: bytes, epoch: int) -> None:
        """Keeps a copy of a snapshot beside the segments, so that old moments are near to one."""
        folder = self._folder(partition)
        with self._doing("write to"):
            self._fs.makedirs(folder, exist_ok=True)
            self._put(folder, position + _SNAPSHOT, sealed, epoch)

    # --- read -----------------------------------------------------------------------------------

    def _names(self, folder: str) -> list[str]:
        self._fs.invalidate_cache(folder)
        try:
            return [path.rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []

    def names(self, partition: int) -> list[tuple[str, str]]:
        """(first, last) entry of every segment, in their order."""
        with self._doing("read"):
            found = [_NAME.fullmatch(name) for name in self._names(self._folder(partition))]
        pairs = [(one[1], one[2]) for one in found if one]
        return sorted(pairs, key=lambda pair: (id_key(pair[0]), id_key(pair[1])))

    def snapshots(self, partition: int) -> list[str]:
        """Positions of the snapshots that were kept."""
        with self._doing("read"):
            names = self._names(self._folder(partition))
        return [name.removesuffix(_SNAPSHOT) for name in names if name.endswith(_SNAPSHOT)]

    def snapshot(self, partition: int, position: str) -> bytes:
        """A snapshot as it was given to `write_snapshot`."""
        with self._doing("read"):
            return bytes(self._fs.cat_file(f"{self._folder(partition)}/{position}{_SNAPSHOT}"))

    def index(self, partition: int, name: str) -> Index:
        """The index of a segment."""
        path = f"{self._folder(partition)}/{name}{_INDEX}"
        with self._doing("read"):
            text = self._fs.cat_file(path)
        try:
            return msgspec.json.decode(text, type=Index)
        except msgspec.MsgspecError as error:
            raise ArchiveError(
                f"{path} is damaged: {error}; see `agent-reconciler verify`"
            ) from None

    def data(self, partition: int, name: str) -> bytes:
        """The file of a segment."""
        with self._doing("read"):
            return bytes(self._fs.cat_file(self.path(partition, name)))

    def block(self, index: Index, number: int) -> list[RawEntry]:
        """The entries of one block."""
        block, path = index.blocks[number], self.path(index.partition, index.name)
        with self._doing("read"):
            packed = self._fs.cat_file(path, block.offset, block.offset + block.length)
        try:
            entries = read_block(packed)
        except DamagedSegment as error:
            raise ArchiveError(
                f"{path} is damaged: {error}; see `agent-reconciler verify`"
            ) from None
        return entries


def whole(index: Index, data: bytes) -> bool:
    """Whether the file of a segment is what its index says."""
    return digest_of(index.previous, index.after, data) == index.digest


def open_archives(urls: Iterable[str], namespace: str) -> list[Archive]:
    """The archives at these places."""
    return [Archive(url, namespace) for url in urls]
