"""The logs of the command line: readable on a terminal, one JSON object a line in a pipe.

They go to standard error, with what libraries have to say of warnings and errors.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

_OURS = ("store", "reconciler", "adapters")


def configure(*, as_json: bool = False, level: int = logging.INFO) -> None:
    """Sets up logging for a program of this project.

    Args:
        as_json: JSON on a terminal too.
        level: of the least important line of our own that is shown.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(on_terminal=sys.stderr.isatty() and not as_json))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


class _Lines(logging.Formatter):
    def __init__(self, *, on_terminal: bool) -> None:
        super().__init__()
        render: list[Processor] = [structlog.processors.TimeStamper(fmt="iso", utc=True)]
        if on_terminal:
            render.append(structlog.dev.ConsoleRenderer())
        else:
            render.append(structlog.processors.dict_tracebacks)
            render.append(structlog.processors.JSONRenderer(default=str))
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        said: EventDict = {
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "fields", {"logger": record.name}),
            "level": record.levelname.lower(),
        }
        if record.exc_info:
            said["exc_info"] = record.exc_info
        text: Any = said
        for step in self._render:
            text = step(None, record.levelname.lower(), text)
        return str(text)
