"""The closed chain: the end of a session, a runner or an agent ends what hangs on it.

Whoever begins: the worker by an order, the service by a call, or somebody who takes an entry out of
a dict. The frame's own methods do the work; what they forget is made good here where it cannot wait
(closing the Runner, the agent that stayed behind), and by the reconciler where it can (entries of
indexes). Nothing that a request holds is ended on behalf of the worker.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

from adapters.aether_frame.binding import AdkSession, Binding, Teardowns
from adapters.aether_frame.substitution import find
from adapters.entry import current_order
from store.logs import get_logger

log = get_logger("adapters.aether_frame")

_CLOSE_SECONDS = 10.0
"""How long a service's own call of `cleanup_runner` waits for the Runner to be closed."""


class Chain:
    """Ends things of one frame, and looks over the methods with which the frame does."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._usage = binding.usage
        self._ending: set[str] = set()
        self._healing = asyncio.Lock()

    @property
    def teardowns(self) -> Teardowns:
        """How the executor ends each kind."""
        return Teardowns(self.end_session, self.end_chat, self.end_runner, self.end_agent)

    def wrap_methods(self) -> None:
        """Looks over the methods that begin or end something, of these objects alone."""
        binding = self._binding
        for owner, name in (
            (binding.adapter, "_mapping_lock"),
            (binding.adapter, "cleanup_chat_session"),
            (binding.adapter, "_handle_agent_cleanup"),
            (binding.runner_manager, "remove_session_from_runner"),
        ):
            find(owner, name)  # They are called later; what is missing is said now.
        for owner, name, wrapper in (
            (binding.runner_manager, "cleanup_runner", self._cleanup_runner),
            (binding.runner_manager, "get_or_create_runner", self._get_or_create_runner),
            (binding.runner_manager, "mark_runner_activity", self._mark_runner_activity),
            (binding.runner_manager, "acquire_runner", self._acquire_runner),
            (binding.agent_manager, "cleanup_agent", self._cleanup_agent),
        ):
            if (method := find(owner, name)) is not None:
                binding.places.put(owner, name, wraps(method)(wrapper(method)))
        finder = getattr(binding.runner_manager, "get_runner_for_agent", None)
        if finder is not None:
            healing = wraps(finder)(self._get_runner_for_agent(finder))
            binding.places.put(binding.runner_manager, "get_runner_for_agent", healing)

    # --- teardowns, called by the executor --------------------------------------------------------

    async def end_session(self, id: str, session: AdkSession) -> None:
        """Ends a session inside a runner."""
        manager = self._binding.runner_manager
        remove = getattr(manager, "remove_session_from_runner", None)
        if remove is not None:
            await _result(remove(session.runner_id, session.id))
        sessions = self._usage.sessions.get(session.runner_id)
        if sessions is not None and session.id in sessions:
            if remove is not None:
                raise RuntimeError("remove_session_from_runner left it in the runner")
            dict_of: Any = sessions
            del dict_of[session.id]

    async def end_chat(self, id: str, chat: Any) -> None:
        """Ends a chat: nobody else calls the frame's `cleanup_chat_session`."""
        binding = self._binding
        cleanup = getattr(binding.adapter, "cleanup_chat_session", None)
        if cleanup is not None:
            ended = await _result(cleanup(id))
        elif (
            cleanup := getattr(binding.session_manager, "cleanup_chat_session", None)
        ) is not None:
            ended = await _result(
                cleanup(id, binding.runner_manager, agent_manager=binding.agent_manager)
            )
        else:
            return
        if ended is False and self._usage.chats.get(id) is chat:
            raise RuntimeError("cleanup_chat_session refused")

    async def end_runner(self, id: str, context: Any) -> None:
        """Ends a runner with the frame's `cleanup_runner`."""
        await self._let_mapping_settle(f"runner/{id}")
        cleanup = getattr(self._binding.runner_manager, "cleanup_runner", None)
        if cleanup is not None:
            await _result(cleanup(id))
            if self._usage.runners.get(id) is context:
                raise RuntimeError("cleanup_runner left it in `runners`")

    async def end_agent(self, id: str, agent: Any) -> None:
        """Ends an agent with what the frame has for it."""
        await self._let_mapping_settle(f"agent/{id}")
        await self._end_agent(id)
        agents = self._binding.agents
        if agents is not None and agents.get(id) is agent:
            raise RuntimeError("cleanup_agent left it in `_agents`")

    async def _end_agent(self, id: str) -> None:
        binding = self._binding
        for owner, name in (
            (binding.adapter, "_handle_agent_cleanup"), (binding.agent_manager, "cleanup_agent"),
        ):  # fmt: skip
            cleanup = getattr(owner, name, None)
            if cleanup is not None and binding.agents is not None and id in binding.agents:
                await _result(cleanup(id))

    async def _let_mapping_settle(self, ref: str) -> None:
        """Waits while a request chooses from the mappings: it may choose this very resource."""
        lock = getattr(self._binding.adapter, "_mapping_lock", None)
        if not isinstance(lock, asyncio.Lock) or not lock.locked():
            return
        async with lock:
            pass
        entry = self._binding.host.entries.get(ref)
        if entry is None or entry.registry is None:
            return
        registry, id = entry.registry, ref.partition("/")[2]
        held = registry.in_use is not None and registry.in_use(id, entry.obj)
        used = registry.used is not None and registry.used(id, entry.obj) != entry.mark
        if held or used or self._binding.host.user_of(ref):
            raise RuntimeError("a request chose it while the order waited for the mappings")

    # --- methods of the runner manager ------------------------------------------------------------

    def _cleanup_runner(self, cleanup: Callable[..., Any]) -> Callable[..., Any]:
        async def cleanup_runner(runner_id: str, *args: Any, **kwargs: Any) -> Any:
            order = current_order.get()
            if order is not None and self._usage.holders(runner_id):
                log.info(
                    "a request holds the runner: it stays", runner=runner_id, order_id=order.id
                )
                return False
            entry = self._binding.host.entries.get(f"runner/{runner_id}")
            agents = {ref.partition("/")[2]: None for ref in (entry.uses if entry else ())}
            agents.update(dict.fromkeys(self._usage.agents_of(runner_id)))
            known = runner_id in self._usage.runners
            opened = self._usage.opened.get(runner_id)
            outermost = runner_id not in self._ending
            self._ending.add(runner_id)
            try:
                done = await _result(cleanup(runner_id, *args, **kwargs))
                if known and runner_id not in self._usage.runners:
                    for agent in agents:
                        await self._end_left_agent(agent, runner_id)
            finally:
                if outermost:
                    self._ending.discard(runner_id)
            if order is None and opened is not None and runner_id not in self._usage.runners:
                await self._close(opened)
            return done

        return cleanup_runner

    async def _end_left_agent(self, agent: str, runner_id: str) -> None:
        """Ends the agent of a runner that is gone, if the frame has left it behind."""
        if self._usage.runner_of(agent) in (None, runner_id):
            try:
                await self._end_agent(agent)
            except Exception as error:
                log.warning("agent not cleaned up; the reconciler tries again",
                            agent=agent, reason=str(error))  # fmt: skip

    async def _close(self, opened: Any) -> None:
        """Closes a Runner for the service, which does not; what fails is left to the reconciler."""
        if self._usage.holders_of_open(opened.key, opened):
            return  # A run is under way on it: closed when that has ended.
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await opened.close()
        except Exception as error:
            reason = str(error) or type(error).__name__
            log.warning("runner not closed; the reconciler tries again",
                        runner=opened.key, reason=reason)  # fmt: skip
        else:
            self._binding.open_runners.pop(opened.key, None)

    def _get_or_create_runner(self, get: Callable[..., Any]) -> Callable[..., Any]:
        async def get_or_create_runner(agent_config: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = self._runner_for(agent_config)
            if chosen is not None:
                self._usage.acquire(chosen, 1)  # Not torn down while a session is made in it.
            try:
                answer = await _result(get(agent_config, *args, **kwargs))
            finally:
                if chosen is not None:
                    self._usage.acquire(chosen, -1)
            if isinstance(answer, tuple) and answer:
                self._binding.host.entry_used(f"runner/{answer[0]}")
            return answer

        return get_or_create_runner

    def _runner_for(self, agent_config: Any) -> str | None:
        """The runner that the frame would reuse for a configuration, where it can be asked."""
        manager = self._binding.runner_manager
        for name in ("compute_config_hash", "_hash_config"):
            if callable(compute := getattr(manager, name, None)):
                try:
                    runner = getattr(manager, "config_to_runner", {}).get(compute(agent_config))
                except Exception:
                    return None  # What is wrong with it, the frame itself says.
                return runner if runner in self._usage.runners else None
        return None

    def _mark_runner_activity(self, mark: Callable[..., Any]) -> Callable[..., Any]:
        def mark_runner_activity(runner_id: str, *args: Any, **kwargs: Any) -> Any:
            answer = mark(runner_id, *args, **kwargs)
            entry = self._binding.host.entries.get(f"runner/{runner_id}")
            if entry is not None:
                seq = entry.seq
                self._binding.host.look_at(entry)
                if entry.seq == seq:
                    self._binding.host.entry_used(entry.ref)
            return answer

        return mark_runner_activity

    def _acquire_runner(self, acquire: Callable[..., Any]) -> Callable[..., Any]:
        @asynccontextmanager
        async def acquire_runner(runner_id: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            self._usage.acquire(runner_id, 1)
            try:
                async with acquire(runner_id, *args, **kwargs) as value:
                    yield value
            finally:
                self._usage.acquire(runner_id, -1)

        return acquire_runner

    def _get_runner_for_agent(self, get: Callable[..., Any]) -> Callable[..., Any]:
        async def get_runner_for_agent(agent_id: str, *args: Any, **kwargs: Any) -> Any:
            async with self._healing:
                await self._heal(agent_id)
            return await _result(get(agent_id, *args, **kwargs))

        return get_runner_for_agent

    async def _heal(self, agent_id: str) -> None:
        """Gives an agent that has lost its runner a new one; the frame would only fail."""
        binding = self._binding
        if binding.agents is None or binding.agent_runners is None:
            return
        agent = binding.agents.get(agent_id)
        config = (getattr(binding.agent_manager, "_agent_configs", None) or {}).get(agent_id)
        adk_agent = getattr(agent, "adk_agent", None)
        alive = binding.agent_runners.get(agent_id) in self._usage.runners
        if alive or config is None or adk_agent is None:
            return
        runner_id, _ = await binding.runner_manager.get_or_create_runner(
            config, None, adk_agent, create_session=False, allow_reuse=False
        )
        binding.agent_runners[agent_id] = runner_id
        log.info(
            "the agent had lost its runner and has a new one", agent=agent_id, runner=runner_id
        )

    # --- method of the agent manager --------------------------------------------------------------

    def _cleanup_agent(self, cleanup: Callable[..., Any]) -> Callable[..., Any]:
        async def cleanup_agent(agent_id: str, *args: Any, **kwargs: Any) -> Any:
            runner_id = self._usage.runner_of(agent_id)
            done = await _result(cleanup(agent_id, *args, **kwargs))
            if (
                runner_id is not None
                and runner_id in self._usage.runners
                and runner_id not in self._ending
                and self._usage.agents_of(runner_id) in ([], [agent_id])
                and not self._usage.holders(runner_id)
                and (self._binding.agents is None or agent_id not in self._binding.agents)
            ):
                # A runner is of one agent: without it no request can reach it.
                await _result(self._binding.runner_manager.cleanup_runner(runner_id))
            return done

        return cleanup_agent


async def _result(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer
