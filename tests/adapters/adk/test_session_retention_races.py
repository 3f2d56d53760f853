"""The end of a conversation among others: who comes back, who takes over, who is killed, and the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.adk.agents import LlmAgent
from google.adk.apps import App
from google.adk.runners import Runner

import reconciler.session_retention as module
from adapters import Host
from adapters.adk import AdkRuntime, LifecyclePlugin, RedisSessionService
from adapters.adk.live_sessions import Identity
from adapters.adk.sessions_in_use import SessionsInUse
from reconciler import Policy, find_drift
from reconciler.fleet import fold_log
from store import Fenced
from store.channel import WorkerChannel
from store.conversation_archive import read_archived
from store.errors import RedisUnavailable
from store.keys import Keys
from store.verify import verify_log
from tests.adapters.adk.keeping import Place
from tests.adapters.adk.sessions import NAME, MakeService, filled, said, texts
from tests.adapters.adk.talk import Listener, Workshop, message
from tests.support import RedisProcess, eventually, remove_folder, short_folder


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

    async def test_an_outage_does_not_end_the_looking(self) -> None:
        """While Redis is away uses cannot be noted; when it is back, they are again."""
        redis = RedisProcess(short_folder())
        redis.start()
        try:
            async with (
                Host.connect(redis.url, name="chat") as host,
                RedisSessionService(redis.url, host=host) as service,
            ):
                refused: list[Exception] = []

                async def still_used(identities: list[Identity]) -> None:
                    try:
                        await service._still_used(identities)
                    except Exception as error:
                        refused.append(error)
                        raise

                service._host._in_use = SessionsInUse(service._stores, still_used, every=0.02)
                await filled(service, 1)
                with host.acquire("session/s"):
                    redis.kill()
                    await eventually(lambda: len(refused) > 1)
                    redis.start()
                    used = Keys("default").app_sessions("app").used
                    store = await service._stores.open()
                    back = await store.now_ms()

                    async def noted() -> bool:
                        return bool(await store.redis.zscore(used, "user/s") > back)

                    await eventually(noted)
                assert {type(error) for error in refused} == {RedisUnavailable}
        finally:
            redis.kill()
            remove_folder(redis.folder)

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
