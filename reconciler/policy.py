"""The policy: what the operator wants to live, for how long, and how hard to try.

Values come from a TOML file, from `--set name=value`, or from Python. A time of 0 is refused: who
wants no limit writes `off`, so that a missing number never switches a limit off, nor tears down
everything.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ImportString,
    PlainSerializer,
    ValidationError,
)

from reconciler.fold import ProcessState, Resource
from store.errors import PolicyError
from store.messages import SESSION_RETENTION, SHORTEST_RETENTION

Rule = Callable[[Resource, ProcessState, int], str | None]
"""A rule of the user's own: (resource, its process, now in ms) -> the reason to end it, or None.
A pure function; what is in use is never asked about."""


def _seconds(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.strip().lower() == "off"):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is neither seconds nor `off`") from None
    if not 0 < seconds < float("inf"):
        raise ValueError("must be more than 0 seconds; for no limit write `off`")
    return seconds


Seconds = Annotated[
    float | None,
    BeforeValidator(_seconds),
    PlainSerializer(lambda value: "off" if value is None else value, when_used="json"),
]
"""More than 0 seconds, or None (written `off`) for no limit."""


def _retention(seconds: float | None) -> float | None:
    if seconds is not None and seconds < SHORTEST_RETENTION:
        raise ValueError(
            f"must be {SHORTEST_RETENTION:g} seconds at least, so that hosts can say what is in use; "
            "`off` keeps conversations for ever"
        )
    return seconds


Count = Annotated[int, Field(ge=1)] | None


class Policy(BaseModel):
    """What should live, and for how long.

    Attributes:
        session_idle_timeout: seconds after its last use that a session may stay.
        runner_idle_timeout: seconds that a runner may stay after the last desired session left it.
        agent_idle_timeout: the same for an agent and its runners.
        session_retention: seconds that a conversation is kept in Redis after its last use; then it
            is archived, and deleted. 60 at least.
        idle_timeouts: the same for other kinds, by kind. Kinds that are not named live until their
            owner goes, or for ever.
        owner_timeout: seconds that a thing waits for the owner it was announced to have.
        max_sessions_per_user, max_runners: in one process; beyond it the least recently used that
            is not in use goes.
        max_process_memory: bytes; while a process is above it, least recently used sessions go.
        untracked: what to do with an entry of a registry that the log never heard of: `adopt` it
            into the log, `report` it, or `teardown`. What a leak probe found is never adopted, and
            torn down only with `teardown`.
        teardown_timeout: seconds that one teardown may take.
        backoff, backoff_max: seconds before the first retry of a failed teardown, doubled each
            time, and the longest.
        stuck_after: failures until a teardown is reported as stuck.
        rules: rules of your own, or where to import them, `package.module.function`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    session_idle_timeout: Seconds = 3600.0
    runner_idle_timeout: Seconds = 600.0
    agent_idle_timeout: Seconds = 600.0
    session_retention: Annotated[Seconds, AfterValidator(_retention)] = SESSION_RETENTION
    idle_timeouts: dict[str, Seconds] = Field(default_factory=dict)
    owner_timeout: Seconds = 600.0
    max_sessions_per_user: Count = None
    max_runners: Count = None
    max_process_memory: Count = None
    untracked: Literal["adopt", "report", "teardown"] = "adopt"
    teardown_timeout: Annotated[float, Field(gt=0)] = 30.0
    backoff: Annotated[float, Field(gt=0)] = 1.0
    backoff_max: Annotated[float, Field(gt=0)] = 300.0
    stuck_after: Annotated[int, Field(ge=1)] = 5
    rules: tuple[ImportString[Any], ...] = ()

    def idle_ms(self, kind: str) -> float | None:
        """How long a resource of this kind may be idle, in ms; None for ever."""
        if kind == "session":
            seconds = self.session_idle_timeout
        elif kind == "runner":
            seconds = self.runner_idle_timeout
        elif kind == "agent":
            seconds = self.agent_idle_timeout
        else:
            seconds = self.idle_timeouts.get(kind)
        return None if seconds is None else seconds * 1000

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """A policy from plain values.

        Args:
            values: by name.
            where: they come from, for the message.

        Raises:
            PolicyError: a name or a value cannot be meant; the message names it.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                message = f"there is no such setting; there are {', '.join(cls.model_fields)}"
            raise PolicyError(f"policy {where}: {name}: {message}") from None

    @classmethod
    def load(cls, path: Path | None, settings: Sequence[str] = ()) -> Self:
        """A policy from a TOML file and single settings, which win.

        Args:
            path: of the file; None is none.
            settings: `name=value`; `idle_timeouts.kind=value` for other kinds.

        Raises:
            PolicyError: the file cannot be read, or a value cannot be meant.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise PolicyError(f"policy {path}: cannot be read: {error.strerror}") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise PolicyError(f"policy {path}: is not TOML: {error}") from None
        for setting in settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise PolicyError(f"policy setting {setting!r}: write name=value")
            outer, dot, inner = name.strip().partition(".")
            if dot:
                table = values.setdefault(outer, {})
                if not isinstance(table, dict):
                    raise PolicyError(f"policy setting {setting!r}: {outer} has a value already")
                table[inner] = value.strip()
            else:
                values[outer] = value.strip()
        return cls.read(values, str(path) if path else "settings")
