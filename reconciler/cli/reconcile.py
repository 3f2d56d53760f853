"""`agent-reconciler reconcile`: a pass now, whether a worker runs or not.

A partition that a worker holds is reconciled by that worker, on request; one that nobody holds is
taken for the time of the pass. So there is never more than one who acts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from reconciler.cli.options import common, opened, policy_options, read_policy
from reconciler.cli.output import console, emit, table
from reconciler.fleet import recorded_policy
from reconciler.policy import Policy
from reconciler.reconciler import Reconciler
from reconciler.request import NO_ANSWER, ask_workers, choose, live_hosts
from reconciler.result import exit_status, merge
from store.errors import ReconcilerError

_ASK_AGAIN = 3


@click.command()
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
        policy = policy or await recorded_policy(namespace)
        parts = []
        reconciler = Reconciler(store, namespace=name, policy=policy, name="admin")
        await reconciler.open()
        try:
            for _ in range(_ASK_AGAIN):
                await reconciler.keep_leases()
                held = reconciler.partitions
                mine = [p for p in chosen or alive if namespace.partition_of(p) in held]
                parts = (
                    [(await reconciler.reconcile(mine, dry_run=dry_run)).as_dict()] if mine else []
                )
                others = [p for p in chosen or alive if namespace.partition_of(p) not in held]
                answers = await ask_workers(namespace, others, chosen, dry_run)
                if None not in answers:
                    parts += [answer for answer in answers if answer is not None]
                    return merge(parts)
            raise ReconcilerError(NO_ANSWER)
        finally:
            await reconciler.release()


def _show(result: dict[str, Any], *, dry_run: bool) -> None:
    out = console()
    count = len(result["processes"])
    names = ["orphans", "dangling", "ghosts", "untracked"] if dry_run else [
        "torn_down", "corrected", "refused", "failed", "waiting",
    ]  # fmt: skip
    if not any(result[name] for name in names):
        out.print(f"{count} processes, no drift: nothing to do")
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
        table(f"{count} processes: {title}", ["", "resource", "entry", "process", "why"], rows)
    )
    if result["silent"]:
        out.print(
            f"no fresh inventory came from {', '.join(result['silent'])}; its last one was used"
        )
