"""The best choices on the real server, beside TorchServe's default and what the user runs now.

They get full load, always more than the workers can take, and an open loop at the same rate for all: see trial.turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ts_plugin.trial.client import TorchServeError
from ts_plugin.trial.load import percentile
from ts_plugin.trial.store import Store
from ts_plugin.trial.turns import FULL, Contender, Load, Round, Tell, Turns, complete, packed, rounds_of
from ts_plugin.tune.asked import Wanted
from ts_plugin.tune.values import LOAD, Choice, Confirmed, Target

SECONDS = 3.5  # of full load that count in one round, at least
OPEN = 5.5  # seconds of open loop that count
START = 15.0  # seconds that a server takes to start
ROUNDS = 3
MOST_CLIENTS = 96  # TorchServe refuses the 101st request in its queue
SAME = 0.02  # throughputs that differ by less are the same


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server: ``choices`` per model, or None for archives as they are; ``memory`` in bytes, its frontend included."""

    contender: Contender
    choices: tuple[Choice, ...] | None
    memory: int


def confirm(
    models: Sequence[Wanted],
    candidates: Sequence[Candidate],
    *,
    store: Store,
    cpus: frozenset[int],
    seconds: float,
    memory: int,
    tell: Tell = lambda what, left: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[tuple[Confirmed, ...]]:
    """Measure every candidate and return a row per model of each that could be, in their order.

    ``seconds`` is the budget, ``memory`` what all servers together may take; a candidate that needs more by itself is
    left out, and ``note`` says so.

    Raises:
        TorchServeError: no choice could be served.
    """
    end = time.monotonic() + seconds
    rates = tuple(model.target.rate for model in models)
    clients = _clients(models, candidates)
    loads = (
        Load(FULL, _seconds(candidates), ROUNDS, clients=clients),
        Load(f"open loop, {rates}", OPEN, ROUNDS, share=LOAD, rates=rates),
    )
    for candidate in candidates:
        if candidate.memory > memory:
            needs = candidate.memory >> 20
            note(f"{candidate.contender.title}: not measured, it needs {needs} MiB and {memory >> 20} may be used")
    fitting = (candidate for candidate in candidates if candidate.memory <= memory)
    groups = packed(fitting, lambda candidate: candidate.memory, memory)
    trouble: dict[str, str] = {}
    for number, group in enumerate(groups):
        deadline = time.monotonic() + (end - time.monotonic()) / (len(groups) - number)
        contenders = [candidate.contender for candidate in group]
        with Turns(models, store=store, clients=clients, cpus=cpus, tell=tell, note=note) as turns:
            for at, contender in enumerate(contenders):
                if not complete(store, contender, loads):
                    tell(f"starting the server: {contender.title}", deadline - time.monotonic() - START * at)
                    turns.start(contender)
            turns.measure(contenders, loads, deadline=deadline, essential=len(loads))
            trouble |= turns.trouble
    found = []
    for candidate in candidates:
        full, users = (list(rounds_of(store, [candidate.contender], [load.name])) for load in loads)
        if full and users:
            found.append(tuple(_row(candidate, full, users, at) for at in range(len(models))))
    if not any(rows[0].choice for rows in found):
        raise TorchServeError("; ".join(map(": ".join, trouble.items())) or "no server could be measured")
    return found


def pick(found: Sequence[Sequence[Confirmed]], targets: Sequence[Target]) -> int:
    """Return the place of the best choice, as measured: those that are within all targets first.

    Of these with a rate the first (the chooser's order), otherwise the one with the most throughput; throughputs that
    differ by less than 2 % are the same. If none is within, the nearest: by the 99th percentile, or the rate served.
    """
    best, best_key = -1, (False, 0.0)
    for place, rows in enumerate(found):
        if rows[0].choice is None:
            continue
        nearness = min(_nearness(target, row) for target, row in zip(targets, rows, strict=True))
        inside = nearness >= 1
        if not inside:
            value = nearness
        elif all(target.rate is not None for target in targets):
            value = 1.0
        else:
            value = math.prod(row.throughput for row in rows)
        if best < 0 or inside > best_key[0] or (inside == best_key[0] and value > best_key[1] * (1 + SAME)):
            best, best_key = place, (inside, value)
    return best


def _nearness(target: Target, row: Confirmed) -> float:
    """Return 1 where the target is met, less where not: how much of it is reached."""
    reached = [1.0]
    if target.rate is not None:
        reached.append(LOAD * row.throughput / target.rate)
    if target.p99 is not None:
        reached.append(target.p99 / row.p99)
    return min(reached)


def _clients(models: Sequence[Wanted], candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return the clients of each model under full load: twice what any choice can have in its workers."""
    most = [4] * len(models)
    for candidate in candidates:
        for at, choice in enumerate(candidate.choices or ()):
            most[at] = max(most[at], 2 * choice.workers * choice.batch)
    return tuple(min(clients, max(MOST_CLIENTS // len(models), 4)) for clients in most)


def _seconds(candidates: Sequence[Candidate]) -> float:
    """Return the seconds of full load that count: several batches of every choice."""
    choices = (choice for candidate in candidates for choice in candidate.choices or ())
    slowest = max((choice.workers * choice.batch / choice.throughput for choice in choices), default=0.0)
    return max(SECONDS, 5 * slowest)


def _row(candidate: Candidate, full: Sequence[Round], users: Sequence[Round], at: int) -> Confirmed:
    throughputs = [each.samples[at].throughput for each in full]
    latencies = [value for each in users for value in each.samples[at].latencies] or [math.inf]
    return Confirmed(
        name=str(candidate.choices[at]) if candidate.choices else candidate.contender.title,
        choice=candidate.choices[at] if candidate.choices else None,
        throughput=statistics.median(throughputs),
        spread=(max(throughputs) - min(throughputs)) / 2,
        p50=percentile(latencies, 50),
        p99=percentile(latencies, 99),
        failed=sum(each.samples[at].failed for each in (*full, *users)),
        rate=users[0].samples[at].rate or 0.0,
        throughputs=tuple(throughputs),
    )
