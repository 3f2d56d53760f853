"""Writes events for other programs: CloudEvents 1.0 as JSON lines, or Parquet for SQL.

CloudEvents: `source` is the process that wrote the event and `id` its number in it, so that an event
that is exported twice is known as the same one. Their `time` is that of Redis, like every time that
is decided by. A file stands under its name only once it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import quote

import msgspec

from store.errors import ReconcilerError
from store.event import LogEntry

TYPE_PREFIX = "agent-reconciler."
_ROWS = 20_000
"""Events in one row group of a Parquet file."""
_NOT_DATA = {"digest", "schema_version"}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}


class ExportError(ReconcilerError):
    """A file that events cannot be exported to."""


class Writer(Protocol):
    """Takes events, one by one."""

    def write(self, entry: LogEntry) -> None: ...


def cloud_event(entry: LogEntry, namespace: str) -> dict[str, Any]:
    """An event as a CloudEvent, version 1.0 of the specification, in its JSON format.

    Args:
        entry: the event with its place in the log.
        namespace: of the log.
    """
    event = entry.event
    data = event.model_dump(mode="json", exclude_none=True, exclude=_NOT_DATA)
    return {
        "specversion": "1.0",
        "type": f"{TYPE_PREFIX}{event.type}",
        "source": f"/agent-reconciler/{quote(namespace)}/{quote(event.process, safe='@:')}",
        "id": str(event.seq),
        "time": _rfc3339(entry.at_ms),
        "subject": event.ref,
        "datacontenttype": "application/json",
        # Extensions: lower-case letters and digits only, says the specification.
        "entryid": entry.id,
        "partition": entry.partition,
        "data": data,
    }


def _rfc3339(ms: int) -> str:
    return (
        datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"
    )


def exporting(path: Path, namespace: str) -> AbstractContextManager[Writer]:
    """A writer for a file whose ending says the format.

    Raises:
        ExportError: the ending is unknown, pyarrow is missing, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix in _JSON_LINES:
        return _cloud_events(path, namespace)
    if suffix == ".parquet":
        return _parquet(path)
    if not path.name:
        raise ExportError("--export needs the name of a file, FILE.jsonl or FILE.parquet")
    raise ExportError(
        f"--export {path}: its ending is no format: give .jsonl (CloudEvents, one a line) or .parquet"
    )


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when it is complete, and is not there when something went wrong."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
        part.replace(path)
    except OSError as error:
        raise ExportError(
            f"--export {path}: cannot be written ({error.strerror or error}): give a path in a folder "
            "that exists, that may be written to, and has room"
        ) from None
    finally:
        part.unlink(missing_ok=True)


class _CloudEvents:
    def __init__(self, file: IO[bytes], namespace: str) -> None:
        self._file, self._namespace = file, namespace

    def write(self, entry: LogEntry) -> None:
        self._file.write(msgspec.json.encode(cloud_event(entry, self._namespace)) + b"\n")


@contextmanager
def _cloud_events(path: Path, namespace: str) -> Iterator[Writer]:
    with _whole(path) as file:
        yield _CloudEvents(file, namespace)


class _Parquet:
    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text, whole = pa.string(), pa.int64()
        self._schema = pa.schema(
            [
                ("entry_id", text), ("at", pa.timestamp("ms", tz="UTC")), ("partition", pa.int32()),
                ("type", text), ("kind", text), ("ref", text), ("process", text), ("seq", whole),
                ("host_at", pa.float64()), ("holder", text), ("uses", pa.list_(text)),
                ("owned_by", text), ("reason", text), ("order_id", text), ("attrs", text),
                ("trace_id", text), ("digest", text),
            ]
        )  # fmt: skip
        self._table = pa.Table
        self._out = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, entry: LogEntry) -> None:
        event = entry.event
        attrs = None if event.attrs is None else msgspec.json.encode(event.attrs).decode()
        self._rows.append(
            {
                "entry_id": entry.id, "at": entry.at_ms, "partition": entry.partition,
                "type": str(event.type), "kind": event.kind, "ref": event.ref,
                "process": event.process, "seq": event.seq, "host_at": event.at,
                "holder": event.holder, "uses": None if event.uses is None else list(event.uses),
                "owned_by": event.owned_by, "reason": event.reason, "order_id": event.order_id,
                "attrs": attrs, "trace_id": event.trace_id, "digest": event.digest,
            }
        )  # fmt: skip
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        self._out.write_table(self._table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self.flush()
        self._out.close()


@contextmanager
def _parquet(path: Path) -> Iterator[Writer]:
    try:
        import pyarrow.parquet  # noqa: F401 - asked for before anything is written
    except ImportError:
        raise ExportError(
            f"--export {path}: Parquet needs pyarrow: install it with "
            "`pip install 'agent-reconciler[parquet]'`, or export to .jsonl"
        ) from None
    with _whole(path) as file:
        writer = _Parquet(file)
        yield writer
        writer.close()
