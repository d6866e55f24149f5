"""Machines in one line, for tests of what is drawn and said about them."""

from __future__ import annotations

import itertools

from ts_plugin.machine.topology import Core, NumaNode, Topology


def machine(packages: int = 1, nodes: int = 1, l3: int = 1, cores: int = 4, smt: int = 1, slow: int = 0) -> Topology:
    """Return ``packages`` of ``nodes`` of ``l3`` domains of ``cores``, siblings apart as on large servers.

    Every number counts inside its parent; ``slow`` of the last domain's cores are of a slower type.
    """
    total = packages * nodes * l3 * cores
    made = []
    domains = itertools.product(range(packages), range(nodes), range(l3))
    for domain, (package, node, _) in enumerate(domains):
        for core in range(cores):
            number = domain * cores + core
            cpus = tuple(number + sibling * total for sibling in range(smt))
            made.append(Core(cpus, package, package * nodes + node, domain, int(number >= total - slow)))
    numbers = sorted({core.node for core in made})
    memory = tuple(
        NumaNode(number, frozenset(cpu for core in made if core.node == number for cpu in core.cpus), 64 << 20)
        for number in numbers
    )
    return Topology(tuple(made), memory)
