"""An agent as an MCP server whose sessions go, although ADK's `to_mcp_server` never deletes one.

ADK makes a session for each MCP connection (for each request, where client and server speak the
protocol without connections) and forgets it; on a session service that lasts they pile up. Here the
service has a host, so each session is a resource that goes when nothing was said for
`session_idle_timeout`; and since nobody can come back to the session of a closed connection, the app is
ephemeral: the conversation goes with it. A connection that was silent for longer than that goes on,
with a new conversation.

    python examples/mcp_agent.py --url redis://127.0.0.1:6379      # needs `pip install mcp`

It speaks MCP on standard input and output. The reconciler runs in the process, so no worker is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from google.adk.apps import App
from google.adk.runners import Runner
from google.adk.tools.mcp_tool import to_mcp_server

from adapters import Host
from adapters.adk import LifecyclePlugin, RedisSessionService
from reconciler import Policy, Reconciler
from store import ReconcilerError, connect

sys.path.insert(0, str(Path(__file__).parent / "adk_agents"))
from echo.agent import EchoModel, LlmAgent


@asynccontextmanager
async def serving(url: str, namespace: str, idle: float) -> AsyncIterator[tuple[Any, Host]]:
    """The MCP server and the host that looks after its sessions.

    Args:
        url: of Redis, see `store.connect`.
        namespace: of log and sessions.
        idle: seconds after which a silent session goes.
    """
    agent = LlmAgent(name="echo", model=EchoModel(), description="Says what was said to it.")
    async with (
        connect(url) as store,
        Host.connect(store, name="mcp-agent", namespace=namespace) as host,
        RedisSessionService(url, namespace, host=host, ephemeral=True) as sessions,
        Reconciler(
            store, namespace=namespace, policy=Policy(session_idle_timeout=idle), hosts=[host]
        ),
    ):
        app = App(name="echo", root_agent=agent, plugins=[LifecyclePlugin(host)])
        # The session may go while its connection stays; then the next call begins a new one.
        runner = Runner(app=app, session_service=sessions, auto_create_session=True)
        try:
            yield to_mcp_server(agent, runner=runner), host
        finally:
            await runner.close()


async def main() -> int:
    parser = argparse.ArgumentParser(description="An agent as an MCP server.")
    parser.add_argument("--url", default="redis://127.0.0.1:6379")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--idle", type=float, default=900.0, help="seconds")
    options = parser.parse_args()
    try:
        async with serving(options.url, options.namespace, options.idle) as (server, _):
            await server.run_stdio_async()
    except ReconcilerError as error:
        print(f"mcp_agent: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
