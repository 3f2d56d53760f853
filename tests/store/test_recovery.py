"""Recovery records: saved, loaded, purged, and gone when their time is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from store import Store, connect
from store.errors import MalformedEntry, PolicyError, RedisUnavailable, TooLarge
from store.recovery import RecoveryRecord, RecoveryStore
from tests.support import RedisProcess, eventually

RECORD = RecoveryRecord(
    "app", "u", "s", 1.5, "svc@h:1:2", "cook", {"a": [1, {"b": None}]}, ("{}", '{"x":"ü"}'), 2.5
)


@pytest.fixture
def records(store: Store, namespace: str) -> RecoveryStore:
    return RecoveryStore(store, namespace)


class TestRecords:
    async def test_what_is_saved_is_loaded(self, records: RecoveryStore) -> None:
        """A record comes back as it was, with a transcript and without."""
        await records.save(RECORD)
        assert await records.load("app", "u", "s") == RECORD
        bare = RecoveryRecord("app", "u", "s", 3.0)
        await records.save(bare)
        assert await records.load("app", "u", "s") == bare

    async def test_names_are_told_apart(self, records: RecoveryStore) -> None:
        """App, user and session each count, whatever characters they have."""
        await records.save(RecoveryRecord("a", "u/x", "s}:{", 1.0))
        assert await records.load("a", "u", "x/s}:{") is None
        assert await records.load("a", "u/x", "s}:{") is not None

    async def test_purge(self, records: RecoveryStore) -> None:
        """A purged record is gone, and purging nothing says so."""
        await records.save(RECORD)
        assert await records.purge("app", "u", "s")
        assert not await records.purge("app", "u", "s")
        assert await records.load("app", "u", "s") is None

    async def test_records_expire(self, store: Store, namespace: str) -> None:
        """After its retention a record is gone; `None` keeps it."""
        records = RecoveryStore(store, namespace, retention=0.05)
        await records.save(RECORD)
        await RecoveryStore(store, namespace, retention=None).save(
            RecoveryRecord("app", "u", "kept", 1.0)
        )

        async def gone() -> bool:
            return await records.load("app", "u", "s") is None

        await eventually(gone)
        assert await records.load("app", "u", "kept") is not None

    async def test_one_that_cannot_be_read(
        self, records: RecoveryStore, store: Store, namespace: str
    ) -> None:
        """What is no record is an error that names the session, and not a guess."""
        await records.save(RECORD)
        key = f"ar:{{{namespace}/adk/app}}:recovery:u/s"
        await store.redis.set(key, b"nonsense")
        with pytest.raises(MalformedEntry, match="session/s: it cannot be read"):
            await records.load("app", "u", "s")
        await store.redis.unlink(key)

    async def test_too_large(self, store: Store, namespace: str) -> None:
        """A record beyond the limit is refused, and the one before stays."""
        records = RecoveryStore(store, namespace, max_bytes=300)
        await records.save(RECORD)
        huge = RecoveryRecord("app", "u", "s", 2.0, transcript=tuple(map(str, range(5000))))
        with pytest.raises(TooLarge, match="recovery record of session/s"):
            await records.save(huge)
        assert await records.load("app", "u", "s") == RECORD

    async def test_redis_away(self, folder: Path, own_redis: RedisProcess) -> None:
        """When Redis is gone each call says what it was about."""
        async with connect(own_redis.url) as store:
            records = RecoveryStore(store)
            own_redis.kill()
            with pytest.raises(RedisUnavailable, match="saving the recovery record of session/s"):
                await records.save(RECORD)

    @pytest.mark.parametrize("retention", [0, -1.0])
    def test_a_retention_that_cannot_be_meant(self, retention: float) -> None:
        """Zero is no way to switch something off."""
        with pytest.raises(PolicyError, match="retention"):
            RecoveryStore(Store("unix:///nowhere"), retention=retention)
