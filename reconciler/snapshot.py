"""The snapshot: the fold of one partition up to an entry, as bytes, and back. Pure.

Msgpack of plain lists in a fixed order. Resources are a list, not a map: their references are then in
memory once, as the name and as the key, which is what the fold makes of them too. What is decoded is
equal to what was encoded, down to the order in which things are forgotten; a property test holds that.

`FOLD` counts the versions of the fold. Whoever changes what the fold makes of an event, or a field of
its values, raises it: snapshots of another fold are then passed over, and the log is folded instead.
"""

from __future__ import annotations

from sys import intern

import msgspec

from reconciler.fold import Attempt, FleetState, ProcessState, Resource

FOLD = 1
"""Version of the fold, and of this form."""


class _Process(msgspec.Struct, array_like=True):
    id: str
    started_ms: int
    last_ms: int
    seq: int
    resources: list[Resource]
    attempts: dict[str, Attempt]
    gone: dict[str, int]


class _State(msgspec.Struct, array_like=True):
    fold: int
    processes: list[_Process]
    events: int
    lost: int
    stopped: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_State).decode


class OtherFold(ValueError):
    """The bytes are not a snapshot that this fold can go on from."""


def encode_state(state: FleetState) -> bytes:
    """The state of one partition as bytes."""
    processes = [
        _Process(
            p.id, p.started_ms, p.last_ms, p.seq, list(p.resources.values()), p.attempts, p.gone
        )
        for p in state.processes.values()
    ]
    return _encode(_State(FOLD, processes, state.events, state.lost, state.stopped))


def decode_state(data: bytes) -> FleetState:
    """The state that `encode_state` was given.

    Raises:
        OtherFold: the bytes are of another version, or no state at all.
    """
    try:
        found = _decode(data)
    except msgspec.MsgspecError as error:
        raise OtherFold(f"it cannot be decoded: {error}") from None
    if found.fold != FOLD:
        raise OtherFold(f"it was made by version {found.fold} of the fold, this one is {FOLD}")
    processes = {p.id: _process(p) for p in found.processes}
    return FleetState(processes, found.events, found.lost, found.stopped)


def _process(p: _Process) -> ProcessState:
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    resources = {}
    for resource in p.resources:
        # What many resources have in common is in memory once.
        if resource.uses:
            resource.uses = shared.setdefault(resource.uses, resource.uses)
        if resource.user is not None:
            resource.user = intern(resource.user)
        resources[resource.ref] = resource
    return ProcessState(p.id, p.started_ms, p.last_ms, p.seq, resources, p.attempts, p.gone)
