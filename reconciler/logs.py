"""Structured logs: readable on a terminal, one JSON object a line in a pipe. On standard error."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor


def configure(*, as_json: bool = False, level: int = logging.INFO) -> None:
    """Sets up structlog for a program of this project.

    Args:
        as_json: JSON on a terminal too.
        level: of the least important line that is shown.
    """
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty() and not as_json:
        processors.append(structlog.dev.ConsoleRenderer())
    else:
        processors += [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
