"""The command line: `agent-reconciler`.

Every command that looks into Redis takes --url and --namespace, and every one --json. Exit status: 0
nothing left to do, 1 something is left, 2 it could not run. What goes wrong is one line on standard error
that says what, where, and what to do; a traceback never reaches the user.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from typing import Any

import click
from redis.exceptions import NoPermissionError, RedisError

from reconciler import logs
from reconciler.cli.archive import archive
from reconciler.cli.demo import demo
from reconciler.cli.doctor import doctor
from reconciler.cli.explain import explain
from reconciler.cli.health import health
from reconciler.cli.log import log
from reconciler.cli.reconcile import reconcile
from reconciler.cli.replay import replay
from reconciler.cli.status import status
from reconciler.cli.verify import verify
from reconciler.cli.worker import worker
from store.errors import ReconcilerError
from store.refusals import Unavailable

COULD_NOT_RUN = 2


class _Commands(click.Group):
    """The commands; one whose output nobody reads any more ends quietly."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # That is no fault, though click would give status 1. What is buffered goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agent-reconciler")
def cli() -> None:
    """Finds and tears down what services that run LLM agents leak."""
    # What a command finds it prints; only the worker tells its log. Standard output stays clean.
    logs.configure(level=logging.ERROR)
    # Folding makes millions of values and no cycles; looking for these takes a third of the time.
    gc.set_threshold(50_000, 50, 50)


for command in (
    demo,
    worker,
    reconcile,
    status,
    log,
    replay,
    explain,
    doctor,
    health,
    archive,
    verify,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
        arguments: instead of those of the process.
    """
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Runs the command line; the result is the exit status."""
    try:
        result = cli.main(args=arguments, prog_name="agent-reconciler", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "agent-reconciler"
        return _fail(f"{error.format_message()} (see `{command} --help`)")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except ReconcilerError as error:
        return _fail(str(error))
    except NoPermissionError as error:
        return _fail(
            f"Redis does not let this user do that ({_one_line(error)}): use one who may, see "
            "deploy/redis/users.acl"
        )
    except RedisError as error:
        return _fail(f"Redis refused or broke off: {_one_line(error)}; see its log, then try again")
    except Unavailable as error:
        return _fail(f"Redis went away: {_one_line(error)}; start it, then try again")


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _fail(message: str) -> int:
    click.echo(f"agent-reconciler: {' '.join(message.split())}", err=True)
    return COULD_NOT_RUN
