"""The errors of the product: a small tree, each with what was done, to what, and what to do about it.

The command line prints `str(error)` as its one line, so a message is written for the person who
reads it there: what is wrong, where, and the next step. Code tells errors apart by class only.
"""

from __future__ import annotations


class ReconcilerError(Exception):
    """Root of all errors that this project raises on purpose."""


class BadAddress(ReconcilerError):
    """A URL that `connect` cannot use: unknown scheme, or a part missing."""


class RedisUnavailable(ReconcilerError):
    """No Redis answers at the address, or it cannot do what the log needs."""


class RedisBusy(RedisUnavailable):
    """Redis is there and cannot take a write for now: a failover, a full memory, a full disk."""


class NamespaceError(ReconcilerError):
    """The namespace does not fit: a bad name, a newer schema, another number of partitions."""


class SequenceGap(ReconcilerError):
    """A batch starts beyond the next sequence number of its process; nothing of it was written.

    Attributes:
        expected: the sequence number that the log expects next from this process.
    """

    def __init__(self, process: str, first: int, expected: int) -> None:
        super().__init__(
            f"append refused: the batch of process {process} starts at seq {first}, but the log "
            f"expects seq {expected} next; send from seq {expected} on"
        )
        self.expected = expected


class DurabilityError(ReconcilerError):
    """A durability that this server cannot give, or that does not exist."""


class NotConfirmed(ReconcilerError):
    """Redis took a batch but did not confirm in time that it is as durable as was asked. Send it again."""


class Fenced(ReconcilerError):
    """The writer may no longer write: its process was declared lost, or its lease has a new holder."""


class MalformedEntry(ReconcilerError):
    """A stream entry that is not an event. Readers quarantine it and go on."""


class UnknownProcess(ReconcilerError):
    """No such process in the fleet."""


class PolicyError(ReconcilerError):
    """A policy value that cannot be meant."""


class BadMoment(ReconcilerError):
    """A time, an entry id or a resource that cannot be looked up."""


class ArchiveError(ReconcilerError):
    """The archive cannot be written or read, or what was read is not what was written."""


class HistoryDropped(ReconcilerError):
    """A moment that lies in a part of the log which was dropped, because the archive was off."""


class NoAnswer(ReconcilerError):
    """The worker that was asked to reconcile did not answer in time."""


class NotAlive(ReconcilerError):
    """A resource that was to be used is not alive in this process, or is being torn down."""


class NotJson(ReconcilerError, ValueError):
    """A value that was to be stored has no JSON form that reads back as the same value."""


class TooLarge(ReconcilerError, ValueError):
    """Something that was to be stored is larger than the limit that was set."""


class LimitReached(ReconcilerError):
    """Something new would exceed a limit, and nothing can make room: all that is there is in use."""
