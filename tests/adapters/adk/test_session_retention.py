"""Conversations are kept for `session_retention` after their last use, then archived, and go.

Written by a real `RedisSessionService`, ended by what a worker runs. Time passes by setting the last use
of a conversation back; everything else is as in production.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.runners import Runner

import reconciler.session_retention as module
from adapters import Host
from adapters.adk import AdkRuntime, LifecyclePlugin, RedisSessionService, restore_session
from adapters.adk.sessions_in_use import SessionsInUse
from reconciler import Policy, find_drift
from reconciler.fleet import fold_log
from reconciler.session_retention import SessionRetention
from store import EventLog, Fenced, LifecycleEvent, Store
from store.channel import WorkerChannel
from store.conversation_archive import read_archived
from store.errors import ArchiveError
from store.event import process_id
from store.keys import Keys
from store.lease import Lease, release_lease, take_lease
from store.namespace import Namespace, open_namespace
from store.retention import Retention, write_retention
from store.verify import verify_log
from tests.adapters.adk.sessions import NAME, MakeService, filled, said, texts
from tests.adapters.adk.talk import Listener, Workshop, message
from tests.support import entries_of, eventually

DAY_MS = 86400_000


class Keeper:
    """What a worker has to end conversations with, under a lease of its own."""

    def __init__(self, namespace: Namespace, lease: Lease, policy: Policy) -> None:
        self.channel = WorkerChannel(namespace, lease, process_id(f"worker-p0-e{lease.epoch}"))
        self.retention = SessionRetention(namespace, lambda: {0: self.channel}, policy)

    async def look(self) -> None:
        """What the worker does every few seconds; errors are not swallowed here."""
        await self.retention.keep("app", self.channel)


class Place:
    """A namespace of one partition, its archive, and ways to look at it."""

    def __init__(self, space: Namespace, archive: Path) -> None:
        self.space = space
        self.store = space.store
        self.archive = archive
        self.log = EventLog(space.store, space)

    async def keeper(self, **policy: Any) -> Keeper:
        """A worker takes the partition over from whoever has it."""
        held = await self.store.redis.get(self.space.keys.partition(0).lease)
        if held is not None:
            holder, epoch = held.decode().rsplit(" ", 1)
            await release_lease(self.space, Lease(0, holder, int(epoch)))
        lease = await take_lease(self.space, 0, process_id("worker"), 600_000)
        assert isinstance(lease, Lease)
        return Keeper(self.space, lease, Policy(**policy))

    async def age(self, days: float = 31, **name: str) -> None:
        """As if the conversation had not been used for so long."""
        names = NAME | name
        keys = Keys(self.space.name).app_sessions(names["app_name"])
        member = keys.session(names["user_id"], names["session_id"]).member
        at = await self.store.now_ms() - round(days * DAY_MS)
        assert await self.store.redis.zadd(keys.used, {member: at}, xx=True, ch=True) == 1

    async def told(self) -> list[LifecycleEvent]:
        """The events about conversations."""
        found = [entry.event for entry in await entries_of(self.log)]
        return [event for event in found if event.ref.startswith("conversation/")]

    def files(self) -> list[Path]:
        return sorted(self.archive.glob("**/conversations/**/*.jsonl.gz"))

    async def keys(self) -> set[str]:
        found = [key async for key in self.store.redis.scan_iter(f"ar:{{{self.space.name}/adk/*")]
        return {key.decode().partition("}:")[2] for key in found}


@pytest.fixture
async def place(store: Store, namespace: str, tmp_path: Path) -> Place:
    space = await open_namespace(store, namespace, 1)
    await write_retention(space, Retention(str(tmp_path / "archive")))
    return Place(space, tmp_path / "archive")


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
        self, place: Place, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What does not read back as it was written does not count as archived."""
        from fsspec.implementations.local import LocalFileSystem

        await filled(make_service(), 3)
        await place.age()
        whole = LocalFileSystem.cat_file
        monkeypatch.setattr(
            LocalFileSystem, "cat_file", lambda self, path, **more: whole(self, path, **more)[:-9]
        )
        with pytest.raises(ArchiveError, match="not what was written: nothing was deleted"):
            await (await place.keeper()).look()
        assert await make_service().get_session(**NAME) is not None

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


class TestNobodyElse:
    """The lease of the partition, and whoever comes back meanwhile."""

    async def test_somebody_comes_back_at_that_very_moment(
        self, place: Place, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A user who opens, or goes on with, a conversation that has just been archived keeps it."""
        service = make_service()
        session = await filled(service, 3)
        archive = module.archive_conversation
        comes_back: list[Callable[[], Awaitable[Any]]] = [
            lambda: make_service().get_session(**NAME),
            lambda: service.append_event(session, said("back")),
        ]

        async def archived_but(*args: Any) -> Any:
            done = await archive(*args)
            await comes_back.pop(0)()
            return done

        monkeypatch.setattr(module, "archive_conversation", archived_but)
        while comes_back:
            await place.age()
            await (await place.keeper()).look()
            assert await make_service().get_session(**NAME) is not None
        assert texts(await make_service().get_session(**NAME)) == ["0", "1", "2", "back"]
        assert await place.told() == []
        # Much later it is due after all, and its file is replaced by the whole of it.
        monkeypatch.setattr(module, "archive_conversation", archive)
        await place.age()
        await (await place.keeper()).look()
        (file,) = place.files()
        assert len(read_archived(file.read_bytes())[1]) == 4

    async def test_a_worker_whose_lease_went_on_does_nothing(
        self, place: Place, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that stood still between archiving and deleting is refused once another has taken over,
        and the conversation is ended once."""
        await filled(make_service(), 3)
        await place.age()
        old = await place.keeper()
        archive, stood_still = module.archive_conversation, asyncio.Event()
        go_on = asyncio.Event()

        async def slow(*args: Any) -> Any:
            done = await archive(*args)
            stood_still.set()
            await go_on.wait()
            return done

        monkeypatch.setattr(module, "archive_conversation", slow)
        task = asyncio.create_task(old.look())
        await stood_still.wait()
        monkeypatch.setattr(module, "archive_conversation", archive)
        new = await place.keeper(session_retention="off")
        await new.look()
        go_on.set()
        with pytest.raises(Fenced):
            await task
        assert texts(await make_service().get_session(**NAME)) == ["0", "1", "2"]
        await place.age()
        with pytest.raises(Fenced):
            await old.look()
        await (await place.keeper()).look()
        assert len(await place.told()) == 1

    @pytest.mark.parametrize("killed_before", ["write", "told"])
    async def test_a_worker_that_is_killed_in_between(
        self,
        place: Place,
        make_service: MakeService,
        monkeypatch: pytest.MonkeyPatch,
        killed_before: str,
    ) -> None:
        """What it deleted and had not told, the next one tells; at worst it is told twice, alike."""

        async def killed(*_: Any, **__: Any) -> None:
            raise asyncio.CancelledError

        await filled(make_service(), 1)
        await place.age()
        first = await place.keeper()
        with monkeypatch.context() as patch:
            if killed_before == "write":
                patch.setattr(WorkerChannel, "write", killed)
            else:
                patch.setattr(module, "told", killed)
            with pytest.raises(asyncio.CancelledError):
                await first.look()
        assert await make_service().get_session(**NAME) is None
        await (await place.keeper()).look()
        await (await place.keeper()).look()
        told = await place.told()
        assert len(told) == (1 if killed_before == "write" else 2)
        assert (
            len({(e.ref, e.attrs["incarnation"], e.attrs["archived"]) for e in told if e.attrs})
            == 1
        )

    async def test_a_run_that_takes_longer_than_the_retention(
        self, place: Place, make_service: MakeService, host: Host
    ) -> None:
        """A session that its host knows to be in use is not due, though nothing is appended to it."""
        service = make_service(host=host)
        service._host._in_use = SessionsInUse(service._stores, service._still_used, every=0.02)
        await filled(service, 1)
        async with host.acquire("session/s"):
            await self.is_noted(place)
        assert await make_service().get_session(**NAME) is not None

    async def is_noted(self, place: Place) -> None:
        """A use is noted of the session, though nothing happens to it; a worker leaves it alone."""
        await place.age()
        used = Keys(place.space.name).app_sessions("app").used

        async def noted() -> bool:
            at = await place.store.redis.zscore(used, "user/s")
            return bool(at > await place.store.now_ms() - 60_000)

        await eventually(noted)
        await (await place.keeper()).look()

    async def test_the_same_in_the_runtime_and_with_the_plugin(
        self, place: Place, make_service: MakeService, host: Host
    ) -> None:
        """A service that has no host of its own hears from theirs: an open chat, a run that is on."""
        service = make_service()
        service._host._in_use = SessionsInUse(service._stores, service._still_used, every=0.02)
        async with (
            AdkRuntime(host, service, Workshop(), app_name="app") as runtime,
            runtime.chat("s", "user", {"name": "cook"}),
        ):
            await self.is_noted(place)
        model = Listener()
        app = App(
            name="app",
            root_agent=LlmAgent(name="a", model=model),
            plugins=[LifecyclePlugin(host)],
        )
        async with Runner(app=app, session_service=service) as runner:

            async def run() -> int:
                answers = runner.run_async(
                    user_id="user", session_id="s", new_message=message("wait")
                )
                return len([event async for event in answers])

            running = asyncio.create_task(run())
            await model.waiting.wait()
            await self.is_noted(place)
            model.gate.set()
            assert await running == 1
        assert service._host._in_use._tasks
        await service.close()
        assert not service._host._in_use._tasks


class TestTheLog:
    """How the end of a conversation stands in the log."""

    async def test_it_is_no_drift(self, place: Place, make_service: MakeService) -> None:
        """No process holds a conversation: the fold has no ghost of it and no process that was none, and
        the chains of the log are whole."""
        await filled(make_service(), 1)
        await place.age()
        await (await place.keeper()).look()
        state = await fold_log(place.log)
        assert state.processes == {}
        assert list(find_drift(state, {}, Policy(), await place.store.now_ms())) == []
        assert (await verify_log(place.log)).problems == []

    async def test_a_session_that_expires_by_ttl_is_told(
        self, place: Place, make_service: MakeService
    ) -> None:
        """What Redis dropped by its time to live is in the log, too, also where nobody uses the app."""
        await filled(make_service(ttl=0.05), 2)
        keeper = await place.keeper()

        async def told() -> bool:
            await keeper.look()
            return bool(await place.told())

        await eventually(told)
        await keeper.look()
        (event,) = await place.told()
        assert (event.ref, event.reason) == (
            "conversation/app/user/s",
            "ttl: its time to live was over",
        )
        assert await place.keys() == {"keeper"}

    async def test_a_session_made_anew_after_its_ttl(
        self, place: Place, make_service: MakeService
    ) -> None:
        """One that expired and was made again under its name is told once, and the new one lives."""
        service = make_service(ttl=0.05)
        await filled(service, 2)

        async def gone() -> bool:
            return not (await service.list_sessions(app_name="app")).sessions

        await eventually(gone)
        await filled(make_service(), 1)
        await (await place.keeper()).look()
        assert [event.reason for event in await place.told()] == ["ttl: its time to live was over"]
        assert texts(await make_service().get_session(**NAME)) == ["0"]

    async def test_the_service_notices_what_has_gone(
        self, place: Place, make_service: MakeService, host: Host
    ) -> None:
        """Who opens a session that has gone meanwhile has its resource cleaned up, and is told."""
        heard: list[tuple[str, str]] = []
        service = make_service(host=host, on_lifecycle=lambda *what: heard.append(what[:2]))
        await filled(service, 1)
        assert "session/s" in host.entries
        await place.age()
        await (await place.keeper()).look()
        assert await service.get_session(**NAME) is None
        assert "session/s" not in host.entries
        assert heard == [("created", "session/s"), ("cleaned_up", "session/s")]
        assert await service.get_session(**NAME) is None
        assert len(heard) == 2


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
