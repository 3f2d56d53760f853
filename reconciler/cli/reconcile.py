"""`agent-reconciler reconcile`: a pass now, whether a worker runs or not.

A partition that a worker holds is reconciled by that worker, on request; one that nobody holds is
taken for the time of the pass. So there is never more than one who acts.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click

from reconciler.cli.options import common, opened, policy_options, read_policy
from reconciler.cli.output import console, emit, table
from reconciler.fleet import recorded_policy
from reconciler.phrases import counted
from reconciler.policy import Policy
from reconciler.reconciler import Reconciler
from reconciler.request import ANSWER_SECONDS, NO_ANSWER, ask_workers, choose, live_hosts
from reconciler.result import exit_status, merge
from store.errors import NoAnswer

_AGAIN_SECONDS = 0.1

_OTHER_POLICY = (
    "a worker acts for some of these processes, and decides by its own policy: --policy and --set hold "
    "only where none does"
)


@click.command(short_help="Reconcile now.")
@common
@policy_options
@click.option("--process", help="Only this process: its id, or the name of a service.")
@click.option("--dry-run", is_flag=True, help="Change nothing, list what would be done.")
def reconcile(
    url: str,
    namespace: str,
    as_json: bool,
    policy_file: Path | None,
    settings: tuple[str, ...],
    process: str | None,
    dry_run: bool,
) -> int:
    """Force a reconciliation. Status 0: nothing left; 1: something is; 2: it could not run."""
    policy = read_policy(policy_file, settings)
    result = asyncio.run(_reconcile(url, namespace, policy, process, dry_run))
    if as_json:
        emit(result)
    else:
        _show(result, dry_run=dry_run)
    return exit_status(result, dry_run=dry_run)


async def _reconcile(
    url: str, name: str, policy: Policy | None, process: str | None, dry_run: bool
) -> dict[str, Any]:
    async with opened(url, name) as (store, namespace):
        alive = await live_hosts(namespace)
        chosen = choose(alive, process, namespace) if process is not None else None
        given, policy = policy, policy or await recorded_policy(namespace)
        left: dict[int, list[str]] = {}
        for one in chosen if chosen is not None else alive:
            left.setdefault(namespace.partition_of(one), []).append(one)
        parts: list[dict[str, Any]] = []
        deadline = time.monotonic() + ANSWER_SECONDS
        reconciler = Reconciler(store, namespace=name, policy=policy, name="admin")
        await reconciler.open()
        while left:
            async with reconciler.borrowed(list(left)) as held:
                mine = [process for partition in held for process in left[partition]]
                if mine:
                    parts.append((await reconciler.reconcile(mine, dry_run=dry_run)).as_dict())
            for partition in held:
                del left[partition]
            if given is not None and left:
                given = None
                click.echo(_OTHER_POLICY, err=True)
            # A partition that changes hands while its worker is asked is asked for again.
            for partition, answers in (
                await ask_workers(namespace, left, all_of_it=chosen is None, dry_run=dry_run)
            ).items():
                parts += answers
                del left[partition]
            if left and time.monotonic() > deadline:
                raise NoAnswer(NO_ANSWER)
            if left:
                await asyncio.sleep(_AGAIN_SECONDS)
        return merge(parts)


def _show(result: dict[str, Any], *, dry_run: bool) -> None:
    out = console()
    processes = counted(len(result["processes"]), "process", "processes")
    names = ["orphans", "dangling", "ghosts", "untracked"] if dry_run else [
        "torn_down", "corrected", "refused", "failed", "waiting",
    ]  # fmt: skip
    if not any(result[name] for name in names):
        out.print(f"{processes}, no drift: nothing to do")
        return
    title = "would be done" if dry_run else "done"
    rows = [
        (
            name.replace("_", " "),
            row["ref"],
            f"{row['registry']}[{row['key']}]" if "registry" in row else "",
            row["process"],
            row.get("waits") or row["reason"],
        )
        for name in names
        for row in result[name]
    ]
    out.print(
        table(
            f"{processes}: {title}",
            ["", "resource", "entry", "process", "why"],
            rows,
            spare=["process", "entry"],
        )
    )
    if result["silent"]:
        out.print(
            f"no fresh inventory came from {', '.join(result['silent'])}; its last one was used"
        )
