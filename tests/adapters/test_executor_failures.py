"""Teardowns that fail, hang, or would lose data."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from adapters import Host
from store import NotAlive
from store.messages import Action
from tests.adapters.orders import Closing, carried_out, order, outcome
from tests.support import eventually


class TestFailure:
    """A teardown that fails, hangs, or would lose data."""

    async def test_fails(self, host: Host):
        """It stays, with the reason, and can be used and tried again."""

        def end(id: str, obj: Any) -> None:
            raise RuntimeError("it broke")

        registry = host.registry("session", {"s": 1}, teardown=end)
        assert await outcome(host, order(host, "session/s")) == ("cleanup_failed", "it broke")
        with host.acquire("session/s"):
            assert registry == {"s": 1}
        registry.teardown = None
        assert (await outcome(host, order(host, "session/s")))[0] == "cleaned_up"

    async def test_said_with_its_traceback(self, host: Host, caplog: pytest.LogCaptureFixture):
        """The log has what the service's function raised, and where."""
        host.registry("session", {"s": 1}, teardown=lambda id, obj: 1 / obj["size"])
        await outcome(host, order(host, "session/s"))
        (record,) = [one for one in caplog.records if "order failed" in one.getMessage()]
        assert vars(record)["fields"]["action"] == "teardown"
        assert record.exc_info is not None
        assert record.exc_info[0] is TypeError

    async def test_not_saved(self, host: Host):
        """When its recovery record cannot be saved it stays, and is not torn down."""
        session = Closing()

        def save(id: str, obj: Any) -> None:
            raise OSError("disk full")

        registry = host.registry("session", {"s": session}, save=save)
        kind, reason = await outcome(host, order(host, "session/s"))
        assert (kind, reason) == (
            "cleanup_failed", "it stays, its recovery record was not saved: disk full",
        )  # fmt: skip
        assert (session.closed, dict(registry)) == (0, {"s": session})

    async def test_saved_first(self, host: Host):
        """Its recovery record is saved before it is torn down."""
        did: list[str] = []
        host.registry(
            "session", {"s": 1},
            save=lambda *_: did.append("saved"), teardown=lambda *_: did.append("ended"),
        )  # fmt: skip
        await carried_out(host, order(host, "session/s"))
        assert did == ["saved", "ended"]

    async def test_hangs(self, host: Host):
        """A teardown that hangs is cancelled after its time; others are not held up by it."""
        cancelled = asyncio.Event()

        async def hang(id: str, obj: Any) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        host.registry("session", {"s": 1}, teardown=hang)
        host.registry("lock", {"l": 1})
        answers = await carried_out(
            host, order(host, "session/s", timeout=0.05), order(host, "lock/l")
        )
        assert answers["o-lock/l"] == [("cleaned_up", "idle")]
        assert answers["o-session/s"] == [
            ("cleanup_failed", "no end after 0.05 s; it was cancelled")
        ]
        await cancelled.wait()
        await eventually(lambda: not host.entries["session/s"].terminating)
        with host.acquire("session/s"):
            pass

    async def test_hangs_and_swallows_its_cancellation(self, host: Host):
        """One that goes on after its cancellation fails in time; until it ends nobody gets the object."""
        go = asyncio.Event()

        async def stubborn(id: str, obj: Any) -> None:
            while not go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await go.wait()

        registry = host.registry("session", {"s": 1}, teardown=stubborn)
        kind, _ = await outcome(host, order(host, "session/s", timeout=0.05))
        assert kind == "cleanup_failed"
        with pytest.raises(NotAlive), host.acquire("session/s"):
            pass
        kind, reason = await outcome(host, order(host, "session/s", id="o-2"))
        assert (kind, reason.startswith("busy")) == ("cleanup_refused", True)
        go.set()
        await eventually(lambda: not host.entries)
        assert registry == {}

    async def test_cancels_itself(self, host: Host):
        """A teardown that ends in a cancellation of its own has failed."""

        async def end(id: str, obj: Any) -> None:
            raise asyncio.CancelledError

        host.registry("session", {"s": 1}, teardown=end)
        assert (await outcome(host, order(host, "session/s")))[0] == "cleanup_failed"
        assert not host.entries["session/s"].terminating

    async def test_host_closes_meanwhile(self, host: Host):
        """A teardown that runs when the host is closed is cancelled with it."""
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def end(id: str, obj: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        host.registry("session", {"s": 1}, teardown=end)
        host.execute([order(host, "session/s")])
        await begun.wait()
        await host.close()
        async with asyncio.timeout(1):
            await cancelled.wait()

    async def test_one_that_raises_does_not_stop_the_others(self, host: Host):
        """An order that fails in a way nobody thought of leaves the others alone."""
        host.index("i", targets=lambda key, value: value, content={"k": ["session/x"]})
        host.registry("session", {"s": 1})
        drop = order(host, "session/x", action=Action.DROP_ENTRY, registry="i", key="k", id="o-1")

        def broken(key: Any, value: Any) -> list[str]:
            raise RuntimeError("broken")

        host.indexes["i"]._targets = broken
        answers = await carried_out(host, drop, order(host, "session/s", stage=1))
        assert answers["o-1"] == [("cleanup_failed", "broken")]
        assert answers["o-session/s"] == [("cleaned_up", "idle")]
