"""The log of one execution: opened with its first line, closed on every path.

The logger that `execution_log` gives is not in the tree of `logging.getLogger`, which keeps every name
for ever. With a `SharedLog` all executions write into one rotating file, and one file is open however
many run.

The one thing to know: which execution a record belongs to is told by a context variable, so what is
logged by the code and the tasks of an execution reaches its file also through other loggers.
"""

from __future__ import annotations

import itertools
import logging
import logging.handlers
import re
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType
from zlib import crc32

from adapters.host import Host
from adapters.registry import Registry

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
SHARED_FORMAT = "%(asctime)s %(execution)s %(levelname)s %(name)s %(message)s"

execution: ContextVar[str | None] = ContextVar("agent_reconciler_execution", default=None)
"""The execution that the running code belongs to, while its log is open."""

declared: weakref.WeakSet[logging.Handler] = weakref.WeakSet()
"""File handlers of ours: they are closed by whoever opened them."""

ended: weakref.WeakSet[logging.Logger] = weakref.WeakSet()
"""Loggers of executions that have ended: what else is attached to them has lost its owner."""

_registries: weakref.WeakKeyDictionary[Host, Registry] = weakref.WeakKeyDictionary()
_logs: weakref.WeakKeyDictionary[logging.Handler, ExecutionLog] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


def _registry_of(host: Host) -> Registry:
    """The registry of execution logs of a host; the first who needs it makes it."""
    registry = _registries.get(host)
    if registry is None or registry.host is not host:
        registry = host.registry("log_handler", name="execution logs", teardown=_end)
        _registries[host] = registry
    return registry


def _end(id: str, handler: logging.Handler) -> None:
    log = _logs.get(handler)
    if log is not None:
        log.close()


class SharedLog:
    """One rotating file for many executions: open while any of them runs, and only once.

    Args:
        path: of the file.
        max_bytes: it is rotated beyond that.
        backups: rotated files that are kept.
        format: of a line; `%(execution)s` in it is the id of the execution.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int = 10_000_000,
        backups: int = 5,
        format: str = SHARED_FORMAT,
    ) -> None:
        self.path = Path(path)
        self._options = {"maxBytes": max_bytes, "backupCount": backups, "encoding": "utf-8"}
        self._formatter = logging.Formatter(format)
        self._file: logging.handlers.RotatingFileHandler | None = None
        self._users = 0

    def begin(self) -> logging.handlers.RotatingFileHandler:
        """One more execution writes; the first has the file opened with its first line."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = logging.handlers.RotatingFileHandler(
                self.path,
                delay=True,
                **self._options,  # type: ignore[arg-type]
            )
            self._file.setFormatter(self._formatter)
            declared.add(self._file)
        self._users += 1
        return self._file

    def end(self) -> None:
        """One execution fewer; the last one closes the file."""
        self._users -= 1
        if self._users == 0 and self._file is not None:
            file, self._file = self._file, None
            file.close()


class _Passing(logging.Handler):
    """Passes records on to the file that executions share."""

    def __init__(self, shared: SharedLog) -> None:
        super().__init__()
        self._shared: SharedLog | None = shared
        self._file = shared.begin()

    def emit(self, record: logging.LogRecord) -> None:
        if self._shared is not None:
            self._file.handle(record)

    def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.end()
        super().close()


class ExecutionLog:
    """The log of one execution; made by `execution_log`. It is entered once."""

    def __init__(
        self,
        execution_id: str,
        open_handler: Callable[[], logging.Handler],
        logger: logging.Logger | None,
        level: int,
        host: Host | None,
    ) -> None:
        self.execution_id = execution_id
        self.ref = execution_id if "/" in execution_id else f"execution/{execution_id}"
        self._open_handler = open_handler
        self._captured = logger
        self._level = level
        self._host = host
        self._handler: logging.Handler | None = None
        self._own: logging.Logger | None = None
        self._attached: logging.Logger | None = None
        self._token: Token[str | None] | None = None
        self._id = ""
        self._began = False

    def _mine(self, record: logging.LogRecord) -> bool:
        of: str | None = getattr(record, "execution", None) or execution.get()
        if of != self.execution_id:
            return False
        record.execution = of
        return True

    def __enter__(self) -> logging.Logger:
        logger = logging.Logger(f"execution.{self.execution_id}", self._level)
        logger.parent = self._captured or logging.getLogger()
        logger.addFilter(self._mark)
        self._own = logger
        handler = self._handler = self._open_handler()
        try:
            handler.addFilter(self._mine)
            self._attached = self._captured or logger
            self._attached.addHandler(handler)
            self._token = execution.set(self.execution_id)
            _logs[handler] = self
            self._announce(handler)
        except BaseException:
            self.close()
            raise
        return logger

    def _mark(self, record: logging.LogRecord) -> bool:
        record.execution = self.execution_id
        return True

    def _announce(self, handler: logging.Handler) -> None:
        if self._host is None:
            return
        if self.ref not in self._host.entries:
            self._host.record("created", self.ref)
            self._began = True
        registry = _registry_of(self._host)
        name = self.execution_id
        self._id = name if name not in registry else f"{name}#{next(_numbers)}"
        registry[self._id] = handler
        self._host.link(f"log_handler/{self._id}", owned_by=self.ref)

    def close(self) -> None:
        """Closes the handler, once. Leaving the `with` does it."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        try:
            if self._attached is not None:
                self._attached.removeHandler(handler)
        finally:
            handler.close()
            if self._own is not None:
                ended.add(self._own)
            if self._host is not None:
                _registry_of(self._host).pop(self._id, None)
                if self._began:
                    self._host.record("cleaned_up", self.ref, reason="the execution has ended")

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._token is not None:
                execution.reset(self._token)
        except ValueError:
            pass  # Left in another context, as generators are: there it was never set.
        finally:
            self.close()

    async def __aenter__(self) -> logging.Logger:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


def execution_log(
    execution_id: str,
    folder: str | Path = "logs",
    *,
    shared: SharedLog | None = None,
    logger: logging.Logger | str | None = None,
    level: int = logging.INFO,
    format: str = FORMAT,
    host: Host | None = None,
) -> ExecutionLog:
    """The log of one execution: `with execution_log("e1") as log:`, or `async with`.

    Its file is `<folder>/<execution_id>.log`, opened with the first line and closed on every path.

    Args:
        execution_id: of the execution; a reference, `kind/id`, names a resource that exists.
        folder: for one file per execution.
        shared: the file that executions share, instead of one of its own.
        logger: whatever is logged to it, or below it, by code of this execution goes there too.
        level: from which on the logger that is given lets records through.
        format: of a line in a file of its own.
        host: that shows execution and handler to the reconciler; None does without one.

    Raises:
        OSError: when it is entered and the folder cannot be made.
    """

    def open_handler() -> logging.Handler:
        if shared is not None:
            return _Passing(shared)
        path = Path(folder) / file_name(execution_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter(format))
        declared.add(handler)
        return handler

    captured = logging.getLogger(logger) if isinstance(logger, str) else logger
    return ExecutionLog(execution_id, open_handler, captured, level, host)


def file_name(execution_id: str) -> str:
    """The file of an execution: its id, with what a file name cannot have replaced."""
    plain = re.sub(r"[^\w.-]", "_", execution_id).lstrip(".")[:150]
    if plain != execution_id:
        plain += f"-{crc32(execution_id.encode()):08x}"  # Two ids do not become one file.
    return f"{plain}.log"
