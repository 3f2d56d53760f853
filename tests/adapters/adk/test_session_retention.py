"""Conversations are kept for `session_retention` after their last use, then archived, and go.

Written by a real `RedisSessionService`, ended by what a worker runs.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.sessions import Session

from adapters.adk import RedisSessionService, restore_session
from store import Store
from store.conversation_archive import read_archived
from store.errors import ArchiveError, RedisUnavailable
from store.keys import Keys
from store.retention import Retention, write_retention
from tests.adapters.adk.keeping import DAY_MS, Place
from tests.adapters.adk.sessions import NAME, MakeService, filled, said, texts


class TestTheEnd:
    """What was not used for its time is archived, and goes."""

    async def test_archived_then_deleted_then_told(
        self, place: Place, make_service: MakeService
    ) -> None:
        """State and events are in one file; the session is not found; app and user state stay; the log
        says what went, why and where to."""
        service = make_service()
        session = await service.create_session(
            **NAME, state={"own": {"a": [1]}, "user:u": 2, "app:a": 3}
        )
        for number in range(1200):
            await service.append_event(session, said(f"line\n{number}", state={"n": number}))
        before = list(session.events)
        await place.age()
        await (await place.keeper()).look()

        assert await service.get_session(**NAME) is None
        assert (await service.list_sessions(app_name="app")).sessions == []
        with pytest.raises(SessionNotFoundError, match="Session s not found"):
            await service.append_event(session, said("too late"))
        assert await place.keys() == {"state", "user:user:state", "keeper"}
        assert await service.get_user_state(app_name="app", user_id="user") == {"u": 2}

        (file,) = place.files()
        about, lines = read_archived(file.read_bytes())
        assert (about["app"], about["user"], about["id"]) == ("app", "user", "s")
        assert about["state"] == {"own": {"a": [1]}, "n": 1199}
        assert [Event.model_validate(line["e"]) for line in lines] == before
        assert len(gzip.decompress(file.read_bytes()).splitlines()) == 1201

        (event,) = await place.told()
        assert (event.type, event.ref) == ("cleaned_up", "conversation/app/user/s")
        assert event.reason == "retention: not used for 30 d; archived"
        assert event.attrs is not None
        assert event.attrs["archived"] == str(file)
        assert event.attrs["events"] == 1200
        assert event.attrs["incarnation"] == about["incarnation"]

    async def test_what_is_in_use_stays(self, place: Place, make_service: MakeService) -> None:
        """A conversation whose last use is within its time is left alone: created, opened, appended."""
        service = make_service()
        session = await filled(service, 2)
        for use in ("create", "open", "append"):
            if use == "open":
                await place.age()
                await service.get_session(**NAME)
            if use == "append":
                await place.age()
                await service.append_event(session, said("x"))
            await (await place.keeper()).look()
            assert await make_service().get_session(**NAME) is not None, use
            await place.age(29)
            await (await place.keeper()).look()
        assert place.files() == []
        assert await place.told() == []

    async def test_off_keeps_for_ever(self, place: Place, make_service: MakeService) -> None:
        """`session_retention=off` ends nothing."""
        await filled(make_service(), 1)
        await place.age(10_000)
        await (await place.keeper(session_retention="off")).look()
        assert await make_service().get_session(**NAME) is not None

    async def test_nothing_goes_unarchived(self, place: Place, make_service: MakeService) -> None:
        """Without an archive conversations stay; with `archive: off`, written by the operator, they go."""
        service = make_service()
        await filled(service, 3)
        await write_retention(place.space, Retention(None))
        await place.age()
        await (await place.keeper()).look()
        await place.age()
        assert await make_service().get_session(**NAME) is not None
        await write_retention(place.space, Retention("off"))
        await place.age()
        await (await place.keeper()).look()
        assert await service.get_session(**NAME) is None
        (event,) = await place.told()
        assert event.reason == "retention: not used for 30 d; not archived: the archive is off"
        assert "archived" not in (event.attrs or {})

    async def test_an_archive_that_cannot_be_written(
        self, place: Place, make_service: MakeService
    ) -> None:
        """Whatever is wrong with the archive, the conversation stays."""
        await filled(make_service(), 3)
        await place.age()
        place.archive.write_text("a file stands where the folder should be")
        with pytest.raises(ArchiveError, match="cannot write to the archive"):
            await (await place.keeper()).look()
        await (await place.keeper()).retention.look()  # The worker goes on.
        assert texts(await make_service().get_session(**NAME)) == ["0", "1", "2"]

    async def test_an_archive_that_forgets(
        self,
        place: Place,
        make_service: MakeService,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """What does not read back as it was written does not count as archived."""
        from fsspec.implementations.local import LocalFileSystem

        await filled(make_service(), 3)
        await place.age()
        whole = LocalFileSystem.cat_file
        monkeypatch.setattr(
            LocalFileSystem, "cat_file", lambda self, path, **more: whole(self, path, **more)[:-9]
        )
        await (await place.keeper()).look()
        assert "not what was written: nothing was deleted" in caplog.text
        assert await make_service().get_session(**NAME) is not None
        for number in range(20):
            await filled(make_service(), 1, session_id=f"s{number}")
            await place.age(session_id=f"s{number}")
        with pytest.raises(
            ArchiveError, match="not what was written"
        ):  # It is not the conversation.
            await (await place.keeper()).look()
        assert len((await make_service().list_sessions(app_name="app")).sessions) == 21

    async def test_one_that_cannot_be_archived(
        self, place: Place, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stays, and is told of; those that come after it go."""
        from reconciler import session_retention

        for number in range(5):
            await filled(make_service(), 1, session_id=f"s{number}")
            await place.age(days=60 - number, session_id=f"s{number}")
        archive = session_retention.archive_conversation

        async def refuses_the_oldest(at: Any, found: Any, *rest: Any) -> Any:
            if found.id == "s0":
                raise ArchiveError("its content cannot be written")
            return await archive(at, found, *rest)

        monkeypatch.setattr(session_retention, "archive_conversation", refuses_the_oldest)
        await (await place.keeper()).look()
        left = (await make_service().list_sessions(app_name="app")).sessions
        assert [one.id for one in left] == ["s0"]
        assert len(place.files()) == 4

    @pytest.mark.parametrize("damage", ["a field is gone", "its events are something else"])
    async def test_a_damaged_one(
        self, place: Place, make_service: MakeService, damage: str
    ) -> None:
        """It stays, and does not keep those that come after it."""
        for number in range(3):
            await filled(make_service(), 1, session_id=f"s{number}")
            await place.age(days=60 - number, session_id=f"s{number}")
        keys = Keys(place.space.name).app_sessions("app")
        own = keys.session(NAME["user_id"], "s0")
        if damage == "a field is gone":
            await place.store.redis.hdel(own.session, "at")
        else:
            await place.store.redis.set(own.events, "x")
        await (await place.keeper()).look()
        left = [
            number for number in range(3)
            if await place.store.redis.exists(keys.session(NAME["user_id"], f"s{number}").session)
        ]  # fmt: skip
        assert left == [0]

    async def test_many(self, place: Place, make_service: MakeService) -> None:
        """More than one round takes; only those that are due go."""
        service = make_service()
        for number in range(250):
            await filled(service, 1, user_id=f"u{number % 7}", session_id=f"s{number}")
            if number % 5:
                await place.age(user_id=f"u{number % 7}", session_id=f"s{number}")
        await (await place.keeper()).look()
        assert len(place.files()) == len(await place.told()) == 200
        left = (await service.list_sessions(app_name="app")).sessions
        assert sorted(int(one.id[1:]) for one in left) == list(range(0, 250, 5))

    @pytest.mark.parametrize(
        "name", ["..", ".", "a/b", "{tag}", "x" * 5000, "\ud800", "ünï", "%2F", "a\nb", "😀" * 150]
    )
    async def test_any_name(self, place: Place, make_service: MakeService, name: str) -> None:
        """Names of all sorts are archived within the archive, and told under a reference."""
        names = {"user_id": name, "session_id": name}
        await filled(make_service(), 2, **names)
        await place.age(**names)
        await (await place.keeper()).look()
        (file,) = place.files()
        assert file.resolve().is_relative_to(place.archive.resolve() / place.space.name)
        about, _ = read_archived(file.read_bytes())
        assert (about["user"], about["id"]) == (name, name)
        (event,) = await place.told()
        assert event.ref.count("/") == 3


class TestOldAndEphemeral:
    async def test_conversations_of_before(self, place: Place, make_service: MakeService) -> None:
        """Where last uses were not noted yet, they count from the first look of a worker."""
        await filled(make_service(), 1)
        used = Keys(place.space.name).app_sessions("app").used
        await place.store.redis.delete(used)
        await (await place.keeper()).look()
        at = await place.store.redis.zscore(used, "user/s")
        assert abs(at - await place.store.now_ms()) < 60_000
        await place.age()
        await (await place.keeper()).look()
        assert len(place.files()) == 1

    async def test_ephemeral_ones_are_not_archived(
        self, place: Place, make_service: MakeService
    ) -> None:
        """A conversation that was to go with its session, and outlived it because its process was
        killed, goes without leaving anything; without a worker Redis drops it."""
        service = make_service(ephemeral={"app"})
        await filled(service, 2)
        key = Keys(place.space.name).app_sessions("app").session("user", "s").session
        assert 29 * DAY_MS < await place.store.redis.pttl(key) <= 30 * DAY_MS
        await place.age()
        await (await place.keeper()).look()
        assert await service.get_session(**NAME) is None
        assert place.files() == []
        (event,) = await place.told()
        assert event.reason == "retention: ephemeral, and not used for 30 d"

    async def test_deleted_by_hand(self, place: Place, make_service: MakeService) -> None:
        """A name whose keys somebody deleted does not stay in the lists."""
        await filled(make_service(), 1)
        keys = Keys(place.space.name).app_sessions("app").session("user", "s")
        await place.store.redis.delete(keys.session, keys.events, keys.seen)
        await place.age()
        await (await place.keeper()).look()
        assert [event.reason for event in await place.told()] == [
            "gone: its keys were deleted by hand"
        ]
        assert await place.keys() == {"keeper"}

    async def test_brought_back(self, place: Place, make_service: MakeService) -> None:
        """An archived conversation can be restored, with its history and its own state; shared state is
        as it is now, and a session that is there is left alone."""
        service = make_service()
        session = await service.create_session(**NAME, state={"first": 1, "user:x": "old"})
        for number in range(5):
            change = {"n": number, "user:x": f"old {number}"}
            await service.append_event(session, said(str(number), state=change))
        await place.age()
        await (await place.keeper()).look()
        other = await service.create_session(
            **(NAME | {"session_id": "t"}), state={"user:x": "new"}
        )
        assert other.state == {"user:x": "new"}
        data = place.files()[0].read_bytes()
        for attempt in range(2):
            back = await restore_session(make_service(), data)
            assert back.state == {"first": 1, "n": 4, "user:x": "new"}, attempt
        got = await service.get_session(**NAME)
        assert texts(got) == ["0", "1", "2", "3", "4"]
        assert got is not None
        assert [event.id for event in got.events] == [event.id for event in session.events]
        await service.append_event(got, said("goes on"))

    @pytest.mark.parametrize("back", [0, 3])
    async def test_brought_back_in_two_attempts(
        self, place: Place, make_service: MakeService, monkeypatch: pytest.MonkeyPatch, back: int
    ) -> None:
        """A restoration that was cut short goes on when it is done again; one who began anew in between
        is left alone."""
        service = make_service()
        session = await service.create_session(**NAME, state={"first": 1})
        for number in range(5):
            await service.append_event(session, said(str(number), state={"n": number}))
        await place.age()
        await (await place.keeper()).look()
        data = place.files()[0].read_bytes()
        append = RedisSessionService.append_event

        async def cut_short(self: RedisSessionService, session: Session, event: Event) -> Event:
            if len(session.events) == back:
                raise RedisUnavailable("Redis went away")
            return await append(self, session, event)

        monkeypatch.setattr(RedisSessionService, "append_event", cut_short)
        with pytest.raises(RedisUnavailable):
            await restore_session(make_service(), data)
        monkeypatch.undo()
        assert (await restore_session(make_service(), data)).state == {"first": 1, "n": 4}
        assert texts(await service.get_session(**NAME)) == ["0", "1", "2", "3", "4"]

        await service.delete_session(**NAME)
        anew = await service.create_session(**NAME)
        await restore_session(make_service(), data)
        await service.append_event(anew, said("hello"))
        await restore_session(make_service(), data)
        assert texts(await service.get_session(**NAME)) == ["hello"]

    async def test_the_file_is_what_zcat_says(
        self, place: Place, make_service: MakeService
    ) -> None:
        """Each line is JSON; a file with lines missing is refused."""
        await filled(make_service(), 5)
        await place.age()
        await (await place.keeper()).look()
        data = place.files()[0].read_bytes()
        lines = gzip.decompress(data).splitlines(keepends=True)
        assert [json.loads(line)["e"]["author"] for line in lines[1:]] == ["user"] * 5
        with pytest.raises(ArchiveError, match="1 events are missing"):
            read_archived(gzip.compress(b"".join(lines[:-1])))
        with pytest.raises(ArchiveError, match="is damaged"):
            read_archived(data[:-20])
        with pytest.raises(ArchiveError, match="is not an archived conversation"):
            read_archived(gzip.compress(b'{"events": 0}\n'))
        with pytest.raises(ArchiveError, match="is not an archived conversation"):
            read_archived(b"something else")


async def test_a_service_without_a_worker_needs_none(
    service: RedisSessionService, store: Store, namespace: str
) -> None:
    """What waits for a worker to tell is bounded, so that nobody has to run one."""
    keys = Keys(namespace).app_sessions("app")
    await store.redis.zadd(keys.sessions, {f"user/gone{n}": 1 for n in range(900)})
    await store.redis.zadd(
        keys.ended, {f'{{"member":"{n}","reason":"ttl"}}': n for n in range(9_500)}
    )
    await filled(service, 1)
    assert await store.redis.zcard(keys.ended) == 10_000
    assert await store.redis.zcard(keys.sessions) == 1
    assert await store.redis.pttl(keys.ended) > 0
