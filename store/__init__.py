"""What happened: the event model, the log in Redis streams, and the messages between host and worker.

The ground floor: it imports neither `reconciler` nor `adapters`.
"""

from store.connection import Store, connect
from store.durability import Durability
from store.errors import (
    BadAddress,
    DurabilityError,
    Fenced,
    MalformedEntry,
    NamespaceError,
    NotAlive,
    NotConfirmed,
    NotJson,
    PolicyError,
    ReconcilerError,
    RedisUnavailable,
    SequenceGap,
    TooLarge,
    UnknownProcess,
)
from store.event import EventType, LifecycleEvent, LogEntry
from store.log import Appended, EventLog
from store.messages import Inventory, Order

__all__ = [
    "Appended",
    "BadAddress",
    "Durability",
    "DurabilityError",
    "EventLog",
    "EventType",
    "Fenced",
    "Inventory",
    "LifecycleEvent",
    "LogEntry",
    "MalformedEntry",
    "NamespaceError",
    "NotAlive",
    "NotConfirmed",
    "NotJson",
    "Order",
    "PolicyError",
    "ReconcilerError",
    "RedisUnavailable",
    "SequenceGap",
    "Store",
    "TooLarge",
    "UnknownProcess",
    "connect",
]
