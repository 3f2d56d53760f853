"""Binds a service of aether-frame's shape to the reconciler, its own code unchanged.

    detach = attach(host, adk_framework_adapter)

It goes by shape and imports nothing of that framework. The dicts that the service keeps runners,
sessions, agents and their ids in become registries and indexes; a handful of methods of these very
objects are looked over, so that the end of a session, a runner or an agent ends what hangs on it.
What this version of the service does not have is named in a log line and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapters.aether_frame.binding import Binding
from adapters.aether_frame.chain import Chain
from adapters.host import Host

__all__ = ["attach"]


def attach(host: Host, adk_framework_adapter: Any) -> Callable[[], None]:
    """Puts a framework adapter, and the managers that it holds, under the care of a host.

    Best called where the service starts, in its event loop, before it serves requests: entries that
    lack the agent they are about are then taken for what an earlier leak has left.

    Args:
        host: of this process.
        adk_framework_adapter: the object that has `runner_manager`, `adk_session_manager`,
            `agent_manager` and the mappings of agents.

    Returns:
        A function that detaches: the very same dicts and methods stand there again as before. It
        may be called more than once.

    Raises:
        TypeError: the object is attached already, or has nothing of that shape; nothing was changed.
    """
    binding = Binding(host, adk_framework_adapter)
    chain = Chain(binding)
    try:
        binding.bind(chain.teardowns)
        chain.wrap_methods()
        if not binding.places:
            raise TypeError(
                f"attach takes the object that has runner_manager, adk_session_manager and agent_manager; "
                f"{adk_framework_adapter!r:.80} has nothing of that shape"
            )
    except BaseException:
        binding.release()
        raise
    released = False

    def detach() -> None:
        nonlocal released
        if not released:
            released = True
            binding.release()

    return detach
