"""What is: the host agent that a service embeds, its registries, and bindings to what leaks.

It stands on `store`, and never imports `reconciler`: a host can be installed without the worker.
"""

from adapters.host import Host
from adapters.recorder import trace_id
from adapters.registry import Index, Registry

__all__ = ["Host", "Index", "Registry", "trace_id"]
