"""The binding of one frame: its dicts as registries and indexes of a host.

What is alive: chats and ADK sessions (both `session`), `runner`, `agent`; besides these `adk_runner`,
the Runner object until it is closed, `config`, a configuration while a runner has it, and `creation`,
a task that makes a runner. Everything else is an index: its entries name some of these, and dangle
when that is gone. An entry with a lock that somebody holds or waits for names nothing, so that it
never dangles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from adapters.aether_frame.observed import KeyedIndex, NestedDict, WatchedRegistry
from adapters.aether_frame.runner import OpenRunner
from adapters.aether_frame.substitution import Substitutions, find
from adapters.aether_frame.usage import Usage, part_of
from adapters.host import Host
from adapters.observed_dict import ObservedDict, observable
from adapters.registry import Index, Registry, Teardown
from store.logs import get_logger

log = get_logger("adapters.aether_frame")

_LISTS = (list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True, eq=False)
class AdkSession:
    """A session inside a runner."""

    id: str
    runner_id: str
    session: Any


@dataclass(frozen=True, slots=True)
class Teardowns:
    """How each kind is ended."""

    session: Teardown
    chat: Teardown
    runner: Teardown
    agent: Teardown


class Binding:
    """One frame, bound to one host. `bind` puts the registries in place, `release` takes them away.

    Attributes:
        adapter, runner_manager, session_manager, agent_manager: the parts of the frame; None where
            this version has none.
        usage: who uses what.
        runners, chats, agents, agent_runners: the frame's own dicts, observed; None where it has
            none.
        sessions, open_runners: what is in runners.
        places: what was put where.
    """

    def __init__(self, host: Host, adapter: Any) -> None:
        self.host = host
        self.adapter = adapter
        self.runner_manager = find(adapter, "runner_manager")
        self.session_manager = find(adapter, "adk_session_manager")
        self.agent_manager = find(adapter, "agent_manager")
        self.usage = Usage(self.look_at)
        self.places = Substitutions()
        self._ours: list[Registry | Index] = []
        self._config_of: dict[str, str] = {}
        self._nested: dict[str, tuple[Any, dict[Any, Any], NestedDict]] = {}
        self._keyed: list[KeyedIndex] = []
        self.runners: Registry | None = None
        self.chats: Registry | None = None
        self.agents: Registry | None = None
        self.agent_runners: KeyedIndex | None = None

    # --- putting registries in place --------------------------------------------------------------

    def bind(self, end: Teardowns) -> None:
        """Observes every dict that this version of the frame has."""
        self._bind_own(end)
        usage, managers = self.usage, (self.runner_manager, self.session_manager)
        runner_manager, session_manager = managers
        self.agents = self._watch(
            self.agent_manager, "_agents", "agent", self._agent_came, self._agent_left,
            teardown=end.agent, used=self._agent_used,
        )  # fmt: skip
        self.runners = self._watch(
            runner_manager, "runners", "runner", self._runner_came, self._runner_left,
            teardown=end.runner, uses=usage.used_by_runner, in_use=usage.holders,
            used=lambda id, context: part_of(context, "last_activity"),
        )  # fmt: skip
        self.chats = self._watch(
            session_manager, "chat_sessions", "session", lambda id, chat: None, usage.chat_left,
            teardown=end.chat, uses=usage.used_by_chat, in_use=usage.chat_holders,
            used=lambda id, chat: getattr(chat, "last_activity", None),
            user=lambda id, chat: getattr(chat, "user_id", None),
        )  # fmt: skip
        usage.runners = {} if self.runners is None else self.runners
        usage.chats = {} if self.chats is None else self.chats
        self.agent_runners = self._keyed_index(
            self.adapter, "_agent_runners", _names_value("runner"), usage.map_agent
        )
        self._keyed_index(self.adapter, "_agent_sessions", self._sessions_named)
        self._keyed_index(self.agent_manager, "_agent_configs")
        self._keyed_index(self.agent_manager, "_agent_metadata")
        self._index(self.adapter, "_config_agents", _config_agents)
        self._index(runner_manager, "session_to_runner", _names_value("runner"))
        self._index(runner_manager, "config_to_runner", _names_value("runner"))
        self._index(runner_manager, "_config_locks", _names_key("config"))
        self._index(runner_manager, "_runner_locks", _names_key("runner"))
        self._index(runner_manager, "_config_creation_tasks", self._creation_named)
        self._index(session_manager, "_cleared_sessions", _names_key("session"))
        self._index(session_manager, "_pending_recoveries", _names_key("session"))
        # What hangs on runners and agents that were there before us:
        for key, context in list(usage.runners.items()):
            self._runner_came(key, context)
        if self.agents is not None:
            for index in self._keyed:
                for key in index.keys() - self.agents.keys():
                    index.end(key)

    def _bind_own(self, end: Teardowns) -> None:
        usage = self.usage
        self.open_runners: Registry = self._add(
            WatchedRegistry(
                "adk_runner", {}, name="runners not closed", id=str,
                came=lambda key, opened: None, left=self._runner_closed,
                owned_by=lambda id, opened: opened.owner, in_use=usage.holders_of_open,
                teardown=lambda id, opened: opened.close(),
            )
        )  # fmt: skip
        self.sessions: Registry = self._add(
            Registry(
                "session", name="sessions of runners", id=lambda key: f"adk:{key}",
                uses=lambda id, session: [f"runner/{session.runner_id}"],
                in_use=lambda id, session: int(session.id in usage.held_sessions(session.runner_id)),
                teardown=end.session,
            )
        )  # fmt: skip
        self.configs = self._add(Registry("config", name="configurations with a runner"))
        self.creations = self._add(Registry("creation", name="creations under way"))

    def _add(self, registry: Registry) -> Registry:
        self._ours.append(registry)
        return self.host.add(registry)

    def _put(self, owner: Any, attribute: str, make: Callable[[str, Any], Any]) -> Any:
        """Puts a registry or index in the place of a dict; None where there is none to observe.

        Raises:
            TypeError: it is observed already.
        """
        before = find(owner, attribute)
        if before is None:
            return None
        try:
            content = observable(before, attribute)
        except TypeError as error:
            if isinstance(before, ObservedDict):
                raise
            log.warning("going on without it", attribute=attribute, reason=str(error))
            return None
        name = attribute
        while name in self.host.indexes:
            name += "'"  # Another frame is attached to the same host.
        registry = make(name, content)
        parts = (self.adapter, self.runner_manager, self.session_manager, self.agent_manager)
        if not self.places.put_dict(
            [p for p in parts if hasattr(p, "__dict__")], content, registry
        ):
            reason = "it is not an attribute of the object itself"
            log.warning("going on without it", attribute=attribute, reason=reason)
            return None
        self._ours.append(registry)
        return self.host.add(registry)

    def _watch(
        self,
        owner: Any,
        attribute: str,
        kind: str,
        came: Callable[[Any, Any], None],
        left: Callable[[Any, Any], None],
        **options: Any,
    ) -> Registry | None:
        registry: Registry | None = self._put(
            owner,
            attribute,
            lambda name, content: WatchedRegistry(
                kind, content, name=name, came=came, left=left, **options
            ),
        )
        return registry

    def _index(
        self, owner: Any, attribute: str, targets: Callable[[Any, Any], Iterable[str]]
    ) -> None:
        self._put(
            owner, attribute, lambda name, content: Index(name, content=content, targets=targets)
        )

    def _keyed_index(
        self,
        owner: Any,
        attribute: str,
        targets: Callable[[Any, Any], Iterable[str]] | None = None,
        changed: Callable[[Any, Any], None] | None = None,
    ) -> KeyedIndex | None:
        index: KeyedIndex | None = self._put(
            owner,
            attribute,
            lambda name, content: KeyedIndex(
                name, "agent", content, targets=targets, changed=changed
            ),
        )
        if index is not None:
            self._keyed.append(index)
        return index

    def release(self) -> None:
        """Lets everything go: the frame is what it was, with the content that it has now."""
        for held in self._nested.values():
            _put_back(*held)
        self._nested.clear()
        left = [key for key, one in self.open_runners.items() if one.owner not in self.host.entries]
        if left:
            log.warning("dropped runners stay unclosed: nobody looks after them now", runners=left)
        for opened in self.open_runners.values():
            opened.release()
        for registry in reversed(self._ours):
            if registry.host is not None:
                self.host.remove(registry)
        self.places.take_back()

    def look_at(self, refs: Iterable[str]) -> None:
        """Has the host note, now, what changed in these."""
        for ref in refs:
            if (entry := self.host.entries.get(ref)) is not None:
                self.host.look_at(entry)

    # --- what comes and goes ------------------------------------------------------------------------

    def _runner_came(self, key: Any, context: Any) -> None:
        id = str(key)
        config = part_of(context, "config_hash")
        if config is not None:
            self._config_of[id] = config
            self.configs.setdefault(config, set()).add(id)
        runner = part_of(context, "runner")
        if runner is not None:
            self._watch_runner(id, runner)
        sessions = part_of(context, "sessions")
        if type(sessions) is dict and isinstance(context, dict):

            def came(session_id: Any, session: Any) -> None:
                self.sessions[session_id] = AdkSession(str(session_id), id, session)

            def left(session_id: Any, session: Any) -> None:
                self._session_left(id, session_id)

            nested = NestedDict(sessions, came=came, left=left)
            self._nested[id] = (context, sessions, nested)
            self.usage.sessions[id] = nested
            context["sessions"] = nested
            for session_id, session in sessions.items():
                came(session_id, session)

    def _runner_left(self, key: Any, context: Any) -> None:
        id = str(key)
        self.usage.sessions.pop(id, None)
        held = self._nested.pop(id, None)
        if held is not None:
            for session_id in list(held[2]):
                self._session_left(id, session_id)
            _put_back(*held)
        config = self._config_of.pop(id, None)
        if config is not None and config in self.configs:
            self.configs[config].discard(id)
            if not self.configs[config]:
                del self.configs[config]

    def _watch_runner(self, id: str, runner: Any) -> None:
        if not hasattr(runner, "__dict__"):
            log.warning("the runner cannot be looked over, nor closed", runner=id)
            return
        known = getattr(vars(runner).get("close"), "__self__", None)
        if isinstance(known, OpenRunner):
            if known.closed or known.owner == f"runner/{id}":
                return  # It was taken out and put back, or is of no more use.
            self.usage.opened.pop(known.owner.partition("/")[2], None)
            known.owner = f"runner/{id}"
            self.host.link(f"adk_runner/{known.key}", owned_by=known.owner)
        else:
            key = id
            while key in self.open_runners:
                key += "'"  # Another runner of this id has not been closed yet.
            known = OpenRunner(key, runner, f"runner/{id}", self.usage.run)
            self.open_runners[key] = known
        self.usage.opened[id] = known

    def _runner_closed(self, key: Any, opened: OpenRunner) -> None:
        id = opened.owner.partition("/")[2]
        if self.usage.opened.get(id) is opened:
            del self.usage.opened[id]

    def _session_left(self, runner_id: str, session_id: Any) -> None:
        session = self.sessions.get(session_id)
        if session is not None and session.runner_id == runner_id:
            del self.sessions[session_id]

    def _agent_came(self, key: Any, agent: Any) -> None:
        for index in self._keyed:
            index.begin(key)

    def _agent_left(self, key: Any, agent: Any) -> None:
        for index in self._keyed:
            index.end(key)

    def _agent_used(self, id: str, agent: Any) -> Any:
        metadata = getattr(self.agent_manager, "_agent_metadata", None) or {}
        return part_of(metadata.get(id), "last_activity")

    # --- what indexes name ----------------------------------------------------------------------------

    def _sessions_named(self, key: Any, ids: Any) -> Iterator[str]:
        """The items of a list of session ids; some frames list chats, some ADK sessions."""
        for id in ids if isinstance(ids, _LISTS) else ():
            yield f"session/{id}" if id in self.usage.chats else f"session/adk:{id}"

    def _creation_named(self, key: Any, task: Any) -> list[str]:
        """The creation that a task is; it is alive until the task is done."""
        done = getattr(task, "done", None)
        if callable(done) and not done() and self.creations.get(key) is not task:
            self.creations[key] = task
            task.add_done_callback(lambda _: self._created(key, task))
        return [f"creation/{key}"]

    def _created(self, key: Any, task: Any) -> None:
        if self.creations.get(key) is task:
            del self.creations[key]


def _put_back(context: Any, before: dict[Any, Any], nested: NestedDict) -> None:
    """The dict that was nested in an entry stands there again, with the content of now."""
    before.clear()
    before.update(nested)
    if context.get("sessions") is nested:
        context["sessions"] = before


def _config_agents(key: Any, ids: Any) -> Iterator[str]:
    if isinstance(ids, _LISTS) and ids:
        yield from (f"agent/{id}" for id in ids)
    else:
        yield f"config/{key}"


def _names_value(kind: str) -> Callable[[Any, Any], list[str]]:
    return lambda key, value: [f"{kind}/{value}"] if value is not None else []


def _names_key(kind: str) -> Callable[[Any, Any], list[str]]:
    return lambda key, value: [] if _locked(value) else [f"{kind}/{key}"]


def _locked(value: Any) -> bool:
    """It is a lock and somebody holds it, or waits for it: between two holders nobody has it."""
    locked = getattr(value, "locked", None)
    if callable(locked):
        return bool(locked()) or bool(getattr(value, "_waiters", None))
    return hasattr(value, "acquire")  # A lock that cannot be asked is taken for held.
