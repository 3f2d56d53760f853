"""`agent-reconciler worker`: the reconciler as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import click

from reconciler import logs
from reconciler.cli.options import common, policy_options, read_policy
from reconciler.policy import Policy
from reconciler.web import Access, parse_address, read_token
from reconciler.worker import run_worker
from store.event import check_name

_HOST = re.compile(r"[\w.-]+(:\d+)?|\[[\da-fA-F:]+\](:\d+)?")


def _name(_: click.Context, parameter: click.Parameter, name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _host_names(
    _: click.Context, parameter: click.Parameter, names: tuple[str, ...]
) -> frozenset[str]:
    for name in names:
        if not _HOST.fullmatch(name):
            raise click.BadParameter(
                f"{name!r} is not a host name, for example workers.example.org"
            )
    return frozenset(name.lower() for name in names)


@click.command(short_help="Find drift, have it torn down, until stopped.")
@common
@policy_options
@click.option(
    "--http",
    default="127.0.0.1:9464",
    show_default=True,
    help="Where the page, the API, /healthz, /readyz and /metrics are; port 0 takes a free one, "
    "`off` does not listen. Other addresses than loopback need a token.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="AGENT_RECONCILER_TOKEN_FILE",
    show_envvar=True,
    help="File with the token that changes over HTTP need (or AGENT_RECONCILER_TOKEN).",
)
@click.option(
    "--tls-cert", type=click.Path(path_type=Path, dir_okay=False), help="PEM file: HTTPS."
)
@click.option(
    "--tls-key", type=click.Path(path_type=Path, dir_okay=False), help="PEM file: its key."
)
@click.option(
    "--http-name",
    "names",
    multiple=True,
    callback=_host_names,
    help="A host name it answers to as well; may be repeated.",
)
@click.option(
    "--full-pass",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds between passes over everything.",
)
@click.option(
    "--lease",
    type=click.FloatRange(min=0.5),
    default=10.0,
    show_default=True,
    help="Seconds within which other workers take over from one that is not heard of any more.",
)
@click.option(
    "--partitions",
    type=click.IntRange(1, 4096),
    help="How many the namespace has; only its first worker or host can choose. [default: 16]",
)
@click.option(
    "--name", default="worker", show_default=True, callback=_name, help="Of the worker, in the log."
)
def worker(
    url: str,
    namespace: str,
    as_json: bool,
    policy_file: Path | None,
    settings: tuple[str, ...],
    http: str,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    names: frozenset[str],
    full_pass: float,
    lease: float,
    name: str,
    partitions: int | None,
) -> None:
    """Follow the log, find drift, have it torn down; until SIGTERM or Ctrl-C."""
    logs.configure(as_json=as_json)
    policy = read_policy(policy_file, settings) or Policy()
    access = None
    if http != "off":
        host, port = parse_address(http)
        token = read_token(token_file, os.environ.get("AGENT_RECONCILER_TOKEN"))
        access = Access(host, port, token, tls_cert, tls_key, names)
        access.check()
    asyncio.run(
        run_worker(
            url,
            namespace=namespace,
            policy=policy,
            http=access,
            full_pass_seconds=full_pass,
            lease_seconds=lease,
            name=name,
            partitions=partitions,
        )
    )
