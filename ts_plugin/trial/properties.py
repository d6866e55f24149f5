"""A config.properties for a server of our own, and free ports to put into it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
PORTS = ("inference_address", "management_address", "metrics_address", "grpc_inference_port", "grpc_management_port")

Property = str | int | float | bool | Path


def write_properties(file: Path, properties: Mapping[str, Property | None]) -> None:
    """Write a config.properties; booleans in Java's spelling, None left out."""
    lines = []
    for name, value in properties.items():
        if value is not None:
            lines.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}\n")
    file.write_text("".join(lines))


def free_ports(number: int) -> list[int]:
    """Return that many different free loopback ports (free now: only the server's bind can tell for sure)."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
