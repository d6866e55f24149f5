"""How long requests wait for a server: the queue M/G/n, for elastic width and for `ts-cores tune`. Pure arithmetic."""

from __future__ import annotations

import math

__all__ = ["waits"]

SATURATED = 0.97  # utilisation from which a queue counts as endless


def waits(rate: float, seconds: float, variation: float, servers: float, ahead: float) -> tuple[float, float, float]:
    """Return the part of the customers that wait in M/G/n, the mean wait of all, and the wait of one in a hundred.

    Never longer than ``ahead`` customers at once can make each other wait.
    Source: Sakasegawa (1977), "An approximation formula Lq = a rho^b / (1 - rho)"; waits are taken as exponential.
    """
    bound = max(0.0, ahead - servers) * seconds / servers
    if not bound:
        return 0.0, 0.0, 0.0
    used = rate * seconds / servers
    if used >= SATURATED and bound == math.inf:
        return 1.0, bound, bound
    late = 1.0 if used >= SATURATED else used ** (math.sqrt(2 * (servers + 1)) - 1)
    each = (1 + variation) / 2 * seconds / (servers * (1 - min(used, SATURATED)))  # of those that wait
    mean = bound if used >= SATURATED else min(bound, late * each)
    return late, mean, each * math.log(max(1.0, 100 * late))
