"""`agent-reconciler explain`: why a resource is alive, or is not, in sentences."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Iterable
from functools import partial

import click

from reconciler.cli.options import common, opened
from reconciler.cli.output import console, emit, reading
from reconciler.describe_life import describe_explanation
from reconciler.drift import find_drift
from reconciler.explanation import Around, Explanation
from reconciler.explanation import explain as explain_life
from reconciler.fleet import Progress, recorded_policy
from reconciler.fold import FleetState
from reconciler.history import nearest_snapshot
from reconciler.life import Life, Lives, Worker
from reconciler.nearest import nearest
from reconciler.plan import make_plan
from reconciler.policy import Policy
from reconciler.scan import scan
from store.errors import BadMoment
from store.event import EventRow, check_ref
from store.inventories import InventoryReader
from store.log import EventLog
from store.namespace import Namespace
from store.position import Key, id_key


@click.command(short_help="Say why a resource is alive, or is not.")
@common
@click.argument("resource")
def explain(url: str, namespace: str, as_json: bool, resource: str) -> None:
    """Say why RESOURCE (kind/id) is alive, or is not, and what happens to it next.

    Of a resource that several processes have or had, each is explained.
    """
    check_resource(resource, "RESOURCE")
    explanations = asyncio.run(_explain(url, namespace, resource))
    if as_json:
        emit(
            {
                "ref": resource,
                "explanations": [describe_explanation(one) for one in explanations],
            }
        )
        return
    out = console()
    for number, one in enumerate(explanations):
        if number:
            out.print()
        out.print(text_of(one), soft_wrap=True)


def text_of(explanation: Explanation) -> str:
    """An explanation as it is printed: the head, then a sentence a line."""
    return "\n".join([explanation.head, *(f"  {said}" for said in explanation.sentences)])


async def _explain(url: str, name: str, resource: str) -> list[Explanation]:
    async with opened(url, name) as (_, namespace):
        with reading(await EventLog(namespace.store, namespace).length()) as tell:
            return await explain_resource(namespace, resource, progress=tell)


async def explain_resource(
    namespace: Namespace, resource: str, *, progress: Progress = lambda count: None
) -> list[Explanation]:
    """Explains a resource in each process that has or had it: those first where it is alive.

    Raises:
        BadMoment: the log never heard of it; the message offers the nearest.
    """
    lives, state = await read_lives(namespace, resource, progress=progress)
    policy = await recorded_policy(namespace)
    latest: dict[str, Life] = {life.process: life for life in lives.sorted()}
    if not latest:
        await _check_untracked(namespace, resource, state)
        raise unknown(resource, lives.refs, namespace)
    found = [await _one(namespace, life, state, policy) for life in latest.values()]
    return sorted(found, key=lambda one: (not one.life.alive, -one.life.began.at_ms))


async def read_lives(
    namespace: Namespace,
    resource: str,
    *,
    until: str = "+",
    progress: Progress = lambda count: None,
) -> tuple[Lives, FleetState]:
    """The lives of a resource up to an entry id, and the fold of the same events."""
    lives, state = Lives(resource), FleetState()
    event_log = EventLog(namespace.store, namespace)
    bound = None if until == "+" else id_key(until)
    for partition in namespace.all_partitions():
        # Where the beginning of the log was dropped, the fold begins with a snapshot.
        part, position = await nearest_snapshot(namespace, partition, bound)
        watch = partial(_fold_after, part, id_key(position))
        await scan(
            event_log, [lives.see, watch], until=until, partition=partition, progress=progress
        )
        state.take(part)
    for process, alive in state.find(resource):
        lives.assume(process.id, alive)
    return lives, state


def _fold_after(state: FleetState, position: Key, name: str, event: EventRow) -> None:
    key = id_key(name)
    if key > position:
        state.apply(event, key[0])


async def _one(namespace: Namespace, life: Life, state: FleetState, policy: Policy) -> Explanation:
    process = life.process
    inventory = await InventoryReader(namespace).read(process)
    inventories = {process: inventory} if inventory is not None else {}
    now = await namespace.store.now_ms()
    drift = find_drift(state, inventories, policy, now, processes=[process])
    lease = await namespace.store.redis.get(namespace.partition_keys(process).lease)
    partition = namespace.partition_of(process)
    return explain_life(
        life,
        Around(
            now_ms=now,
            policy=policy,
            process=state.processes.get(process),
            drift=drift,
            plan=make_plan(state, drift, inventories, policy, now),
            partition=partition,
            holder=None if lease is None else _holder(lease.decode(), partition),
        ),
    )


async def _check_untracked(namespace: Namespace, resource: str, state: FleetState) -> None:
    """What the log never heard of may still be held: then it is drift, and that is the explanation."""
    reader = InventoryReader(namespace)
    for process in state.processes:
        inventory = await reader.read(process)
        if inventory is not None and resource in inventory.held:
            raise BadMoment(
                f"{resource}: a registry of {process} holds it, but the log never heard of it: it is "
                "drift (untracked), and the policy's `untracked` says what is done about it"
            )


def _holder(lease: str, partition: int) -> Worker:
    holder, _, epoch = lease.rpartition(" ")
    return Worker(holder.rpartition(":")[0], partition, int(epoch))


def check_resource(resource: str, what: str) -> None:
    """Raises BadMoment when `resource` is not `kind/id`."""
    try:
        check_ref(resource)
    except ValueError as error:
        raise BadMoment(f"{what} {error}") from None


def unknown(resource: str, refs: Iterable[str], namespace: Namespace) -> BadMoment:
    """The error for a resource that the log never heard of; it offers the nearest."""
    near = nearest(resource, refs)
    offer = f"the nearest are {', '.join(near)}" if near else "nothing in it is like that"
    return BadMoment(
        textwrap.shorten(
            f"{resource}: the log of namespace {namespace.name} never heard of it; {offer}", 600
        )
    )
