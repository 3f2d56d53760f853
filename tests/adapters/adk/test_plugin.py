"""`LifecyclePlugin`: a service that keeps its own Runner is looked after all the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from google.adk.agents import BaseAgent, LlmAgent
from google.adk.agents.invocation_context import InvocationContext
from google.adk.apps import App
from google.adk.events.event import Event
from google.adk.models import LlmRequest, LlmResponse
from google.adk.runners import Runner
from google.adk.sessions import InMemorySessionService
from google.adk.tools.agent_tool import AgentTool
from google.genai import types

from adapters import Host
from adapters.adk import LifecyclePlugin
from reconciler import Policy, Reconciler
from store import Store
from tests.adapters.adk.talk import Listener, text_of
from tests.support import eventually

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def message(text: str) -> types.Content:
    return types.Content(role="user", parts=[types.Part(text=text)])


class Own(BaseAgent):
    """An agent that is no LlmAgent: ADK runs it another way."""

    model: Listener

    async def _run_async_impl(self, ctx: InvocationContext) -> AsyncGenerator[Event, None]:
        text = ctx.user_content.parts[0].text if ctx.user_content else ""
        if text == "wait":
            self.model.waiting.set()
            await self.model.gate.wait()
        if text == "fail":
            raise RuntimeError("the model failed")
        yield Event(author=self.name, content=message(f"heard {text}"))


class Service:
    """A service with one runner of its own, and the plugin."""

    def __init__(self, host: Host, kind: str = "llm", **options: Any) -> None:
        self.host = host
        self.model = Listener()
        self.plugin = LifecyclePlugin(host, **options)
        agent = (
            LlmAgent(name="cook", model=self.model)
            if kind == "llm"
            else Own(name="cook", model=self.model)
        )
        self.sessions = InMemorySessionService()
        app = App(name="kitchen", root_agent=agent, plugins=[self.plugin])
        self.runner = Runner(app=app, session_service=self.sessions, auto_create_session=True)

    def run(self, text: str) -> AsyncGenerator[Event, None]:
        return self.runner.run_async(user_id="u", session_id="s", new_message=message(text))

    async def say(self, text: str) -> str:
        async with aclosing(self.run(text)) as run:
            return text_of([event async for event in run])

    @property
    def in_use(self) -> dict[str, int]:
        """How many hold each resource, by kind; the hold of the runner's existence is not counted."""
        held = {ref.partition("/")[0]: entry.in_use for ref, entry in self.host.entries.items()}
        return {"session": held.get("session", 0), "runner": max(0, held.get("runner", 0) - 1)}


IDLE, BUSY = {"session": 0, "runner": 0}, {"session": 1, "runner": 1}


@pytest.fixture(params=["llm", "own"])
async def service(request: pytest.FixtureRequest, host: Host) -> AsyncIterator[Service]:
    made = Service(host, request.param)
    yield made
    await made.runner.close()


class TestRun:
    async def test_in_use_while_it_is_on(self, service: Service, host: Host) -> None:
        """Session and runner are held from the first event to the last, and known to be related."""
        talking = asyncio.create_task(service.say("wait"))
        await service.model.waiting.wait()
        assert service.in_use == BUSY
        assert service.plugin.runs == 1
        (runner,) = host.entries["session/s"].uses
        (agent,) = host.entries[runner].uses
        assert runner.startswith("runner/kitchen-")
        assert agent.endswith(":cook")
        service.model.gate.set()
        await talking
        assert service.in_use == IDLE
        assert service.plugin.runs == 0

    async def test_let_go_when_it_fails(self, service: Service) -> None:
        """A run that raises holds nothing afterwards."""
        with pytest.raises(RuntimeError, match="the model failed"):
            await service.say("fail")
        assert service.in_use == IDLE
        assert service.plugin.runs == 0

    async def test_let_go_when_its_task_is_cancelled(self, service: Service) -> None:
        """ADK tells no plugin of a cancelled run; it holds nothing afterwards all the same."""
        talking = asyncio.create_task(service.say("wait"))
        await service.model.waiting.wait()
        talking.cancel()
        await eventually(lambda: service.in_use == IDLE and service.plugin.runs == 0)

    @pytest.mark.parametrize("turns", range(8))
    async def test_let_go_when_cancelled_as_it_begins(self, service: Service, turns: int) -> None:
        """In whichever turn of the loop it is cancelled, nothing stays in use."""
        talking = asyncio.create_task(service.say("wait"))
        for _ in range(turns):
            await asyncio.sleep(0)
        talking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await talking
        await eventually(lambda: service.in_use == IDLE and service.plugin.runs == 0)

    async def test_let_go_when_cancelled_in_another_thread(
        self, service: Service, host: Host
    ) -> None:
        """The host hears of the run when the loop that wanted it has given up already."""

        async def given_up() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await service.say("wait")

        thread = threading.Thread(target=asyncio.run, args=(given_up(),))
        thread.start()
        thread.join()  # This loop, which is the host's, stands still meanwhile.
        turned = asyncio.Event()
        asyncio.get_running_loop().call_soon(turned.set)
        await turned.wait()
        assert service.in_use == IDLE
        assert "session/s" not in host.entries

    async def test_let_go_when_it_takes_too_long(self, service: Service) -> None:
        """Also where the task that drove the run lives on, as after a time limit."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await service.say("wait")

        def let_go() -> bool:
            gc.collect()
            return service.in_use == IDLE and service.plugin.runs == 0

        await eventually(let_go)

    async def test_let_go_when_the_reader_stops(self, service: Service) -> None:
        """Who stops reading and closes the run has ended it."""
        async with aclosing(service.run("hello")) as run:
            async for _ in run:
                assert service.in_use == BUSY
                break
        assert service.in_use == IDLE

    async def test_many_at_once(self, service: Service, host: Host) -> None:
        """Runs of several sessions are told apart, and all are let go."""
        await asyncio.gather(
            *(
                _drain(
                    service.runner.run_async(
                        user_id="u", session_id=f"s{n}", new_message=message("hello")
                    )
                )
                for n in range(10)
            )
        )
        assert sorted(ref for ref in host.entries if ref.startswith("session/")) == sorted(
            f"session/s{n}" for n in range(10)
        )
        assert all(e.in_use == 0 for ref, e in host.entries.items() if ref.startswith("session/"))
        assert service.plugin.runs == 0

    async def test_synchronous_run_in_a_thread(self, service: Service, host: Host) -> None:
        """ADK's Runner.run drives a loop in another thread; the host is told in its own."""

        def talk() -> list[Event]:
            return list(
                service.runner.run(user_id="u", session_id="s", new_message=message("hello"))
            )

        done: list[list[Event]] = []
        thread = threading.Thread(target=lambda: done.append(talk()))
        thread.start()
        await eventually(lambda: done, 10)
        thread.join()
        assert "hello" in text_of(done[0])
        await eventually(lambda: service.in_use == IDLE)
        assert "session/s" in host.entries


async def _drain(run: AsyncGenerator[Event, None]) -> None:
    async for _ in run:
        pass


class Delegating(Listener):
    """Has another agent answer."""

    async def generate_content_async(
        self, llm_request: LlmRequest, stream: bool = False
    ) -> AsyncGenerator[LlmResponse, None]:
        last = llm_request.contents[-1].parts[-1]
        if last.function_response is None:
            part = types.Part(function_call=types.FunctionCall(name="inner", args={"request": "?"}))
        else:
            part = types.Part(text=f"inner says {last.function_response.response}")
        yield LlmResponse(content=types.Content(role="model", parts=[part]))


async def test_an_agent_as_a_tool_is_part_of_the_run(host: Host) -> None:
    """The session that ADK makes for the inner agent, and drops, is nobody's business."""
    service = Service(host)
    service.runner.agent.model = Delegating()  # type: ignore[attr-defined]
    inner = Listener()
    service.runner.agent.tools.append(AgentTool(LlmAgent(name="inner", model=inner)))  # type: ignore[attr-defined]
    assert "heard 1: ?" in await service.say("hello")
    assert inner.shown == [["?"]]
    assert sorted(ref.partition("/")[0] for ref in host.entries) == ["agent", "runner", "session"]
    assert service.in_use == IDLE
    await service.runner.close()


class TestTeardown:
    async def test_idle_sessions_go_and_the_runner_stays(
        self, service: Service, host: Host, store: Store, namespace: str
    ) -> None:
        """Nobody said how to end the runner, so it is not ended; closing it takes it out of the log."""
        policy = Policy(session_idle_timeout=0.05, runner_idle_timeout=0.05)
        async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]) as worker:
            await service.say("hello")
            await eventually(lambda: "session/s" not in host.entries)
            result = await worker.reconcile()
            assert not result.as_dict()["failed"]
            assert len(host.entries) == 2
            await service.say("hello again")
            await eventually(lambda: "session/s" not in host.entries)
        await service.runner.close()
        assert not host.entries

    async def test_session_of_a_run_that_is_on_stays(
        self, service: Service, host: Host, store: Store, namespace: str
    ) -> None:
        """However short the limit is."""
        policy = Policy(session_idle_timeout=0.01)
        async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]) as worker:
            talking = asyncio.create_task(service.say("wait"))
            await service.model.waiting.wait()
            for _ in range(3):
                await worker.reconcile()
            assert "session/s" in host.entries
            service.model.gate.set()
            await talking
            await eventually(lambda: "session/s" not in host.entries)

    async def test_what_the_service_says(self, host: Host, store: Store, namespace: str) -> None:
        """`end_session` and `end_runner` are called for what is idle."""
        ended: list[Any] = []

        async def end_session(id: str, identity: Any) -> None:
            ended.append(identity)
            await service.sessions.delete_session(
                app_name=identity[0], user_id=identity[1], session_id=identity[2]
            )

        service = Service(host, end_session=end_session, end_runner=lambda id, _: ended.append(id))
        policy = Policy(
            session_idle_timeout=0.05, runner_idle_timeout=0.05, agent_idle_timeout=0.05
        )
        async with Reconciler(store, namespace=namespace, policy=policy, hosts=[host]):
            await service.say("hello")
            await eventually(lambda: not host.entries)
        assert ended[0] == ("kitchen", "u", "s")
        assert ended[1].startswith("kitchen-")
        assert not service.sessions.sessions["kitchen"]["u"]

    async def test_what_a_registry_holds_is_recognised(self, host: Host) -> None:
        """A runner in an observed dict is that runner, and not another one."""
        service = Service(host)
        holder = type("Holder", (), {})()
        holder.runners = {"r1": service.runner}
        host.observe(holder, "runners", kind="runner")
        await service.say("hello")
        assert host.entries["session/s"].uses == ("runner/r1",)
        assert sorted(host.entries) == ["runner/r1", "session/s"]
        await service.runner.close()
        assert "runner/r1" in host.entries
