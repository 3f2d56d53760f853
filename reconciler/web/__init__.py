"""The worker's HTTP side: health, metrics, a JSON API, a stream of updates, and a page made of them.

It only looks, except for one thing: a reconciliation can be asked for, with a token. What it shows is
the whole fleet, read from Redis, whichever partitions this worker acts for.
"""

from reconciler.web.access import Access, parse_address, read_token
from reconciler.web.app import serve

__all__ = ["Access", "parse_address", "read_token", "serve"]
