"""Options that every command has, and how a command opens its namespace."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from reconciler.policy import Policy
from store.connection import Store, connect
from store.embedded import was_used
from store.errors import RedisUnavailable
from store.keys import Keys
from store.namespace import DEFAULT_NAMESPACE, Namespace, find_namespace

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_URL = "redis://127.0.0.1:6379"


def common(function: F) -> F:
    """--url, --namespace and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON for machines."),
        click.option(
            "--namespace",
            default=DEFAULT_NAMESPACE,
            show_default=True,
            envvar="AGENT_RECONCILER_NAMESPACE",
            show_envvar=True,
            help="Of the log.",
        ),
        click.option(
            "--url",
            default=DEFAULT_URL,
            show_default=True,
            envvar="AGENT_RECONCILER_URL",
            show_envvar=True,
            help="Of Redis: redis://, rediss://, unix://, redis+cluster://, redis+sentinel:// or "
            "embedded://PATH.",
        ),
    ):
        function = option(function)
    return function


def policy_options(function: F) -> F:
    """--policy and --set."""
    for option in (
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="One policy value, for example session_idle_timeout=900; may be repeated.",
        ),
        click.option(
            "--policy",
            "policy_file",
            type=click.Path(path_type=Path, dir_okay=False),
            envvar="AGENT_RECONCILER_POLICY",
            show_envvar=True,
            help="TOML file with the policy.",
        ),
    ):
        function = option(function)
    return function


def read_policy(policy_file: Path | None, settings: tuple[str, ...]) -> Policy | None:
    """The policy that was given on the command line; None when none was.

    Raises:
        PolicyError: it cannot be meant.
    """
    if policy_file is None and not settings:
        return None
    return Policy.load(policy_file, settings)


@asynccontextmanager
async def opened(url: str, namespace: str) -> AsyncIterator[tuple[Store, Namespace]]:
    """A store and a namespace of it, closed at the end; neither is made where it does not exist.

    Raises:
        BadAddress, RedisUnavailable, NamespaceError: it cannot be opened.
    """
    Keys(namespace)  # A bad name is told before anything is connected.
    folder = url.removeprefix("embedded://").partition("?")[0]
    if url.startswith("embedded://") and folder and not was_used(Path(folder)):
        raise RedisUnavailable(
            f"nothing has been recorded at embedded://{folder} yet: start a service with a Host, or "
            "`agent-reconciler worker`, with this --url, or mend the path"
        )
    async with connect(url) as store:
        yield store, await find_namespace(store, namespace)
