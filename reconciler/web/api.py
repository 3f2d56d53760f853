"""The JSON API: what the page asks, and scripts may ask as well.

Each handler takes checked values and gives a value; `operations` says which path has which, and the
routes and the OpenAPI document are both made from that list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from pydantic import BaseModel, ValidationError

from reconciler.describe import describe
from reconciler.fleet import Fleet
from reconciler.moment import check_past, parse_moment
from reconciler.nearest import nearest
from reconciler.reconciler import Reconciler
from reconciler.request import choose, live_hosts, reconcile_through_workers
from reconciler.web.access import Access
from reconciler.web.doing import drift_now
from reconciler.web.errors import ApiError, bad_request
from reconciler.web.history import History
from reconciler.web.shapes import (
    Chain,
    ChainQuery,
    DriftNow,
    DriftQuery,
    FleetNow,
    FleetThen,
    MomentQuery,
    NoQuery,
    Query,
    ReconcileBody,
    Reconciled,
    Timeline,
    TimelineQuery,
)
from reconciler.web.view import FleetView
from store.logs import get_logger

log = get_logger("reconciler.web")

RECONCILES_AT_ONCE = 4
ANSWERS_KEPT = 100
Q = TypeVar("Q", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked.

    Attributes:
        path: of the request; it is a GET, or a POST where there is a body.
        summary: one line for the document.
        answers: the shape of the answer.
        handle: gives the answer to a checked query or body.
        query, body: what comes with the request.
        faults: statuses of failures, each with its meaning.
    """

    path: str
    summary: str
    answers: type[msgspec.Struct]
    handle: Callable[[Any], Awaitable[msgspec.Struct]]
    query: type[Query] = NoQuery
    body: type[BaseModel] | None = None
    faults: tuple[tuple[int, str], ...] = ()

    async def __call__(self, request: web.Request) -> web.Response:
        if self.body is not None:
            given: BaseModel = await read_body(request, self.body)
        else:
            given = read_query(request, self.query)
        return web.Response(
            body=msgspec.json.encode(await self.handle(given)), content_type="application/json"
        )


def read_query(request: web.Request, model: type[Q]) -> Q:
    """The query of a request, checked.

    Raises:
        ApiError: 400, with the name of what is wrong.
    """
    twice = {name for name in request.query if len(request.query.getall(name)) > 1}
    if twice:
        raise ApiError(400, "bad_request", f"{min(twice)}: is given twice")
    try:
        return model.model_validate(dict(request.query))
    except ValidationError as error:
        raise bad_request(error) from None


async def read_body(request: web.Request, model: type[Q]) -> Q:
    """The JSON body of a request, checked.

    Raises:
        ApiError: 415 when it is not JSON by its header, 400 when it is not what is expected.
    """
    if request.content_type != "application/json":
        raise ApiError(415, "not_json", "send JSON, with `Content-Type: application/json`")
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        raise bad_request(error) from None


class Api:
    """The API of one worker."""

    def __init__(self, reconciler: Reconciler, view: FleetView, access: Access) -> None:
        self._reconciler = reconciler
        self._view = view
        self._access = access
        self._namespace = reconciler.namespace
        self._history = History(reconciler.namespace)
        self._reconciling = 0
        self._drift: tuple[Fleet | None, dict[DriftQuery, DriftNow]] = (None, {})
        self._described: tuple[Fleet | None, FleetNow | None] = (None, None)

    def operations(self) -> tuple[Operation, ...]:
        """All of it."""
        soon = (503, "it cannot be told yet, or not by so many at once; see Retry-After")
        return (
            Operation(
                "/api/fleet", "The whole fleet now", FleetNow, self.fleet, faults=(soon,)
            ),
            Operation(
                "/api/moment", "The whole fleet at a past moment", FleetThen, self.moment,
                MomentQuery, faults=(
                    (400, "no such moment, or it is in the future"),
                    (404, "the log no longer goes back so far"),
                    soon,
                ),
            ),
            Operation(
                "/api/timeline", "Lifetimes of resources, and what changed since a page", Timeline,
                self.timeline, TimelineQuery, faults=((400, "a bad filter"), soon),
            ),
            Operation(
                "/api/drift", "Drift, and what is being done about it", DriftNow, self.drift,
                DriftQuery, faults=((400, "a bad filter"), soon),
            ),
            Operation(
                "/api/events", "The chain of events of one resource", Chain, self.chain,
                ChainQuery,
                faults=((400, "not a reference"), (404, "no such resource; `nearest` has some"), soon),
            ),
            Operation(
                "/api/reconcile", "Reconcile now; a dry run unless it says otherwise", Reconciled,
                self.reconcile, body=ReconcileBody,
                faults=(
                    (400, "a malformed token header or body"),
                    (401, "no token, or a wrong one"),
                    (403, "changes are off, or another site's page asks"),
                    (404, "no such process"),
                    (415, "the body is not JSON"),
                    (503, "no worker answers, or too many reconciliations run"),
                ),
            ),
        )  # fmt: skip

    async def fleet(self, query: NoQuery) -> FleetNow:
        fleet = await self._view.look()
        if fleet is not self._described[0]:
            self._described = fleet, msgspec.convert(describe(fleet), FleetNow)
        now = self._described[1]
        assert now is not None
        now.namespace, now.worker = self._namespace.name, self._reconciler.process
        now.version, now.trouble = self._view.version, self._view.trouble
        now.changes_allowed = self._access.token is not None
        now.unheld_partitions = self._namespace.partitions - len(self._view.leases)
        return now

    async def moment(self, query: MomentQuery) -> FleetThen:
        until = parse_moment(query.at, "at")
        now = await self._namespace.store.now_ms()
        check_past(until, now, "at")
        return await self._history.at(until, now, query.process, query.limit, query.offset)

    async def timeline(self, query: TimelineQuery) -> Timeline:
        fleet = await self._view.look()
        kept = self._view.lifetimes
        page = kept.changed_after(query.after, query.limit)
        last = page[-1].version if page else max(query.after, 0)
        return Timeline(
            epoch=self._view.epoch,
            now_ms=fleet.now_ms,
            lifetimes=[
                one
                for one in page
                if query.process in (None, one.process)
                and query.kind in (None, one.kind)
                and query.alive in (None, one.ended_ms is None)
            ],
            next=last,
            more=last < kept.version and len(page) == query.limit,
            kept=len(kept),
            left_off=kept.left_off,
            complete_since_ms=kept.complete_since_ms,
        )

    async def drift(self, query: DriftQuery) -> DriftNow:
        fleet = await self._view.look()
        if fleet is not self._drift[0]:
            self._drift = fleet, {}
        # Every open page asks the same after each round: it is found once.
        found = self._drift[1]
        if query not in found:
            if len(found) >= ANSWERS_KEPT:
                found.clear()
            found[query] = drift_now(
                fleet, self._view.leases, self._namespace,
                process=query.process, limit=query.limit,
            )  # fmt: skip
        return found[query]

    async def chain(self, query: ChainQuery) -> Chain:
        await self._view.look()
        kept = self._view.lifetimes
        known = [one for one in kept.of(query.resource) if query.process in (None, one.process)]
        complete = kept.complete_since_ms == 0
        since = min((one.created_ms for one in known), default=0) if complete else 0
        chain = await self._history.chain(
            query.resource, query.process, query.after, query.limit, since
        )
        if not known and not chain.events and chain.next is None and query.after == "0-0":
            refs = kept.refs()
            near = await asyncio.to_thread(nearest, query.resource, refs)
            where = f" in process {query.process}" if query.process else ""
            raise ApiError(
                404, "unknown_resource",
                f"the log has never heard of {query.resource}{where}"
                + (f"; did you mean {', '.join(near)}?" if near else ""),
                nearest=near,
            )  # fmt: skip
        return chain

    async def reconcile(self, body: ReconcileBody) -> Reconciled:
        if self._reconciling >= RECONCILES_AT_ONCE:
            raise ApiError(
                503, "busy", "other reconciliations are under way; try again when they are done",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self._reconciling += 1
        try:
            alive = await live_hosts(self._namespace)
            chosen = None
            if body.process is not None:
                chosen = choose(alive, body.process, self._namespace)
            log.info("reconciliation asked for", process=body.process, dry_run=body.dry_run)
            result = await reconcile_through_workers(
                self._namespace, chosen or alive, all_of_them=chosen is None, dry_run=body.dry_run
            )
        finally:
            self._reconciling -= 1
        return msgspec.convert({**result, "dry_run": body.dry_run}, Reconciled)
