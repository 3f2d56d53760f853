"""What the tests of the runtime share: agents to talk to, and a reconciler with little patience."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from adapters import Host
from adapters.adk import AdkRuntime
from reconciler import Policy, Reconciler
from store import Store

COOK, CLERK = {"name": "cook"}, {"name": "clerk"}


@asynccontextmanager
async def reconciling(
    store: Store, namespace: str, host: Host, **policy: Any
) -> AsyncIterator[Reconciler]:
    """The reconciler in this process, with nothing idle for long."""
    limits = {"session_idle_timeout": 0.05, "runner_idle_timeout": 0.05, "backoff": 0.05, **policy}
    async with Reconciler(
        store, namespace=namespace, policy=Policy(**limits), hosts=[host]
    ) as worker:
        yield worker


def is_empty(runtime: AdkRuntime) -> bool:
    return not any(runtime.sizes().values())
