"""The shapes of the JSON API: what comes in (pydantic, checked) and what goes out (msgspec, fast).

The OpenAPI document is made from these classes, so it cannot say anything else than the code does.
Times are Redis time in ms since 1970.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator

from reconciler.web.errors import Failure
from reconciler.web.lifetimes import Lifetime
from store.event import REF_LIMIT, Scalar, check_ref

__all__ = ["Failure", "Lifetime"]

Name = Annotated[str, Field(min_length=1, max_length=512)]


class Health(msgspec.Struct):
    """The process runs its event loop."""

    status: str


class Readiness(msgspec.Struct):
    """Whether it can be relied on, and why not."""

    ready: bool
    reasons: list[str]


class ProcessNow(msgspec.Struct):
    """One live host process."""

    process: str
    started_ms: int
    last_event_ms: int
    events: int
    resources: dict[str, int]
    in_use: int
    registries: dict[str, int]
    rss: int | None
    fds: int | None
    outbox: int | None
    spilled: int | None
    dropped: int | None
    outbox_problem: str | None


class DriftCounts(msgspec.Struct):
    """How many differences there are, by sort."""

    orphans: int
    dangling: int
    ghosts: int
    untracked: int


class Stuck(msgspec.Struct):
    """A teardown that has failed so often that somebody should look."""

    ref: str
    process: str
    failures: int
    reason: str
    next_try_ms: int
    entry: str | None = None


class FleetNow(msgspec.Struct):
    """The whole fleet now: what `agent-reconciler status --json` prints of it, and whom it was read by."""

    now_ms: int
    processes: list[ProcessNow]
    resources: dict[str, int]
    drift: DriftCounts
    waiting: int
    stuck: list[Stuck]
    workers: dict[str, dict[str, Any]]
    quarantined: dict[str, str]
    events: int
    processes_lost: int
    processes_stopped: int
    namespace: str = ""
    worker: str = ""
    version: int = 0
    trouble: str = ""
    changes_allowed: bool = False
    unheld_partitions: int = 0


class Timeline(msgspec.Struct):
    """Lifetimes that changed after `after`, the earliest change first.

    Go on with `after=<next>`: while `more` is true for the rest of the whole, later for what is new.
    When `epoch` is another one than before, begin again with `after=0`. A filter leaves lifetimes out
    of a page; it does not fill the page up. `left_off` of them are no longer kept; of what ended after
    `complete_since_ms` none is missing.
    """

    epoch: str
    now_ms: int
    lifetimes: list[Lifetime]
    next: int
    more: bool
    kept: int
    left_off: int
    complete_since_ms: int


class DriftRow(msgspec.Struct):
    """One difference, and what is being done about it.

    `state` is `due` (an order is about to be sent), `under_way` (sent, no outcome yet), `retrying`
    (failed or refused, tried again at `next_ms`), `stuck` (the same, too often), `held` (left alone
    on purpose) or `nobody` (no worker holds its partition).
    """

    sort: Literal["orphan", "dangling", "ghost", "untracked"]
    process: str
    ref: str
    reason: str
    state: Literal["due", "under_way", "retrying", "stuck", "held", "nobody"]
    doing: str
    since_ms: int = 0
    registry: str | None = None
    key: str | None = None
    order_id: str | None = None
    next_ms: int = 0
    failures: int = 0


class DriftNow(msgspec.Struct):
    """Differences between what is desired and what is."""

    now_ms: int
    total: int
    rows: list[DriftRow]


class Alive(msgspec.Struct):
    """A resource that was alive at the moment asked for."""

    ref: str
    process: str
    created_ms: int
    used_ms: int
    uses: list[str]
    owned_by: str | None
    in_use: int
    seq: int


class ProcessThen(msgspec.Struct):
    """One process at the moment asked for."""

    process: str
    started_ms: int
    resources: dict[str, int]


class FleetThen(msgspec.Struct):
    """The fleet at a past moment: what `agent-reconciler replay --at` shows."""

    at_ms: int
    events: int
    processes: list[ProcessThen]
    resources: dict[str, int]
    total: int
    offset: int
    alive: list[Alive]


class Event(msgspec.Struct):
    """One event of the log, with its place in it."""

    id: str
    at_ms: int
    partition: int
    type: str
    ref: str
    process: str
    seq: int
    holder: str | None = None
    uses: tuple[str, ...] | None = None
    owned_by: str | None = None
    reason: str | None = None
    order_id: str | None = None
    attrs: dict[str, Scalar] | None = None
    trace_id: str | None = None


class Chain(msgspec.Struct):
    """The events of one resource, in order. `next` is where to go on; null is the present end."""

    resource: str
    events: list[Event]
    next: str | None


class Row(msgspec.Struct):
    """One thing found, done or left."""

    ref: str
    process: str
    reason: str
    action: str | None = None
    registry: str | None = None
    key: str | None = None
    waits: str | None = None
    failures: int = 0
    stuck: bool = False


class Reconciled(msgspec.Struct):
    """What a reconciliation found and did: what `agent-reconciler reconcile --json` prints."""

    processes: list[str]
    orphans: list[Row]
    dangling: list[Row]
    ghosts: list[Row]
    untracked: list[Row]
    torn_down: list[Row]
    corrected: list[Row]
    refused: list[Row]
    failed: list[Row]
    waiting: list[Row]
    silent: list[str]
    dry_run: bool


class Query(BaseModel):
    """What may stand in the query of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoQuery(Query):
    """Nothing."""


class TimelineQuery(Query):
    after: Annotated[int, Field(ge=0, description="`next` of the page before; 0 begins.")] = 0
    limit: Annotated[int, Field(ge=1, le=5000)] = 1000
    process: Annotated[Name | None, Field(description="Only in this process.")] = None
    kind: Annotated[Name | None, Field(description="Only of this kind.")] = None
    alive: Annotated[bool | None, Field(description="Only what lives, or only what ended.")] = None


class DriftQuery(Query):
    process: Name | None = None
    limit: Annotated[int, Field(ge=1, le=5000)] = 500


class MomentQuery(Query):
    at: Annotated[
        str,
        Field(
            min_length=1,
            max_length=64,
            description="ISO 8601, a time of today, seconds since 1970, or the id of a log entry.",
        ),
    ]
    process: Name | None = None
    limit: Annotated[int, Field(ge=0, le=5000)] = 1000
    offset: Annotated[int, Field(ge=0)] = 0


class ChainQuery(Query):
    resource: Annotated[str, Field(max_length=REF_LIMIT, description="kind/id")]
    process: Annotated[Name | None, Field(description="Only the one in this process.")] = None
    after: Annotated[str, Field(pattern=r"^\d{1,19}-\d{1,19}$")] = "0-0"
    limit: Annotated[int, Field(ge=1, le=1000)] = 200

    @field_validator("resource")
    @classmethod
    def _ref(cls, value: str) -> str:
        return check_ref(value)


class ReconcileBody(BaseModel):
    """What to reconcile; without `dry_run: false` nothing is changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    process: Annotated[
        Name | None, Field(description="Id of a process, or name of a service; null is all.")
    ] = None
    dry_run: StrictBool = True
