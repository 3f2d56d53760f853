"""Logs: structured, and told through the standard `logging` of whatever program this runs in.

A library does not print. The program decides by its own logging set-up what is shown and where: the
command line by `reconciler.logs`, a service by its own. A record's message is `event key=value …`;
`record.event` and `record.fields` have the parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

AGAIN_SECONDS = 60.0


def get_logger(name: str) -> Any:
    """A structlog logger that ends in the standard logger `name`."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            _as_record,
        ],
    )


def _as_record(
    _: Any, __: str, said: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """What the standard logger is called with; a traceback is left to its formatters."""
    event = str(said.pop("event"))
    options = {
        key: said.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in said
    }
    text = " ".join([event, *(f"{key}={value!r}" for key, value in said.items())])
    # A formatter fills in what follows a percent sign only where there are arguments: there are none.
    return (text,), {**options, "extra": {"event": event, "fields": dict(said)}}


class Trouble:
    """A trouble that may last: said when it begins, then once a minute, and when it is over.

    Args:
        log: where to.
        event: what is said of it.
    """

    def __init__(self, log: Any, event: str) -> None:
        self._log = log
        self._event = event
        self._began = self._again = 0.0

    def say(self, **fields: Any) -> None:
        """It is there, or there still."""
        now = time.monotonic()
        self._began = self._began or now
        if now >= self._again:
            self._again = now + AGAIN_SECONDS
            self._log.warning(self._event, **fields)

    def over(self) -> None:
        """It is not there, or no longer."""
        if self._began:
            seconds = round(time.monotonic() - self._began, 1)
            self._began = self._again = 0.0
            self._log.info("over: " + self._event, seconds=seconds)
