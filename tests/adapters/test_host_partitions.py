"""A host that says how many partitions its namespace must have."""

from __future__ import annotations

import pytest

from adapters import Host
from reconciler import Reconciler
from store import NamespaceError, Store
from store.namespace import open_namespace


async def test_host_makes_the_namespace(store: Store, namespace: str) -> None:
    """Who comes first chooses the number; a reconciler that says the same joins."""
    async with Host.connect(store, name="svc", namespace=namespace, partitions=3):
        assert (await open_namespace(store, namespace)).partitions == 3
        async with Reconciler(store, namespace=namespace, partitions=3) as reconciler:
            assert reconciler.namespace.partitions == 3


async def test_mismatch_is_refused(store: Store, namespace: str) -> None:
    """Another number is refused in one line that names both."""
    await open_namespace(store, namespace, 3)
    with pytest.raises(NamespaceError, match="has 3 partitions, not 4"):
        await Host.connect(store, name="svc", namespace=namespace, partitions=4).start()
    with pytest.raises(NamespaceError, match="has 3 partitions, not 4"):
        await Reconciler(store, namespace=namespace, partitions=4).open()
