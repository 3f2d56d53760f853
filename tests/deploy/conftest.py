"""The services of compose.yaml, running, for the tests of one file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.local import Machine


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Redis, both workers and the chat service, all healthy by their own health checks."""
    with tempfile.TemporaryDirectory(prefix="ar-deploy-") as folder:
        made = Machine(Path(folder))
        try:
            for service in ("redis", "worker-1", "worker-2", "chat"):
                made.start(service)
            yield made
        finally:
            made.stop_all()
