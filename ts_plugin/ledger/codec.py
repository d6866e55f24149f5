"""Leases and the ledger's state as JSON and back: sets of CPUs as CPU lists, defaults left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from ts_plugin.ledger.model import Lease, Refusal, Server, State
from ts_plugin.machine.cpulist import format_cpulist, parse_cpulist
from ts_plugin.planning.planner import Demand, Slice
from ts_plugin.planning.policy import Allocator, Lend, Memory, OmpRuntime, Pin, Policy

LEASE_VARIABLE = "TS_CORES_LEASE"  # in the environment of every worker that the launcher bound


def pack_lease(lease: Lease) -> str:
    """Return ``lease`` as the text that LEASE_VARIABLE carries."""
    return json.dumps(_pack(lease), separators=(",", ":"))


def _pack(value: Any) -> Any:
    if isinstance(value, frozenset):
        return format_cpulist(value)
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {
            field.name: _pack(item)
            for field in fields(value)
            if (item := getattr(value, field.name)) is not field.default and item != field.default
        }
    return value


def pack_state(state: State) -> dict[str, Any]:
    packed: dict[str, Any] = _pack(state)
    return packed


def unpack_state(data: dict[str, Any]) -> State:
    state: State = _unpack(State, {name: value for name, value in data.items() if name != "version"})
    numbers = [state.generation, *(number for lease in state.leases for number in (lease.pid, lease.start_time))]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError("a generation, PID or start time is not an integer")
    return state


def unpack_lease(text: str) -> Lease:
    """Return the lease that ``pack_lease`` packed.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: ``text`` is something else.
    """
    lease: Lease = _unpack(Lease, json.loads(text))
    return lease


def _unpack(kind: Any, data: dict[str, Any]) -> Any:
    return kind(**{name: READERS.get(name, _plain)(value) for name, value in data.items()})


def _unpack_all(kind: Any, items: list[dict[str, Any]]) -> Any:
    return tuple(_unpack(kind, item) for item in items)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# How to read a field, by its name, which means the same in every class above; _plain reads the fields not named here.
READERS: dict[str, Callable[[Any], Any]] = {
    "servers": partial(_unpack_all, Server),
    "leases": partial(_unpack_all, Lease),
    "refusals": partial(_unpack_all, Refusal),
    "demand": partial(_unpack, Demand),
    "slice": partial(_unpack, Slice),
    "policy": partial(_unpack, Policy),
    "pin": Pin,
    "lend": Lend,
    "memory": Memory,
    "allocator": Allocator,
    "omp_runtime": OmpRuntime,
    "allowed": parse_cpulist,
    "held": parse_cpulist,
    "reach": parse_cpulist,
    "limit": parse_cpulist,
    "reserved": parse_cpulist,
    "node_ids": parse_cpulist,
    "core_list": parse_cpulist,
}
