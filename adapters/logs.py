"""Logs of the adapters: structured, and told through the standard `logging` of the host service.

A library does not print. The service decides by its own logging set-up what is shown and where; a
record's message is `event key=value …`, and the values are its attributes too.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog


def get_logger(name: str) -> Any:
    """A structlog logger that ends in the standard logger `name`."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.ExceptionRenderer(),
            structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True),
        ],
    )
