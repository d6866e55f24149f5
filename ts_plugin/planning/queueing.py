"""How long requests wait for a server: the queue M/G/n, for `ts-cores tune`. Pure arithmetic."""

from __future__ import annotations

import math

__all__ = ["waits"]

SATURATED = 0.97  # utilisation from which a queue counts as endless


def waits(rate: float, seconds: float, variation: float, servers: float, ahead: float) -> tuple[float, float, float]:
    """Return the part of the customers that wait in M/G/n, the mean wait of all, and the wait of one in a hundred.

    Never longer than ``ahead`` customers at once can make each other wait.
    Source: Sakasegawa (1977), "An approximation formula Lq = a rho^b / (1 - rho)".
    """
    bound = max(0.0, ahead - servers) * seconds / servers
    if not bound:
        return 0.0, 0.0, 0.0
    used = rate * seconds / servers
    if used >= SATURATED and bound == math.inf:
        return 1.0, bound, bound
    late = 1.0 if used >= SATURATED else used ** (math.sqrt(2 * (servers + 1)) - 1)
    used = min(used, SATURATED)
    step = seconds / servers
    mean = bound if late == 1.0 else min(bound, late * (1 + variation) / 2 * step / (1 - used))
    rare = _tail(used, variation) * step * math.log(100 * late) if late > 0.01 else 0.0
    return late, mean, min(bound, rare)


def _tail(used: float, variation: float) -> float:
    """Return after how long a wait is e times as rare, in service times per server.

    Exact for M/M/n (variation 1): 1 / (1 - used), and for M/D/n (0): 1 / x with exp(x) = 1 + x / used. Between them it
    is interpolated.
    Source: the root of Lundberg's equation, Asmussen (2003), "Applied Probability and Queues", XIII.5.
    """
    root = -2 * math.log(used)  # never less than the root, from where Newton's steps do not overshoot
    for _ in range(4):
        power = math.exp(root)
        root -= (power - 1 - root / used) / (power - 1 / used)
    part = min(1.0, variation)
    return (1 - part) / root + part / (1 - used)
