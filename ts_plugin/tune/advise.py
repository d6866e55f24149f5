"""What helps outside of slices, each measured beside the plain handler: allocators, the frozen model, bfloat16."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ts_plugin.planning.policy import Allocator, Policy
from ts_plugin.trial.archive import Archive
from ts_plugin.trial.bare import BFLOAT16, OPTIMIZE, Bare, BareError
from ts_plugin.trial.load import Body
from ts_plugin.trial.room import Room
from ts_plugin.trial.store import Store
from ts_plugin.trial.turns import Tell
from ts_plugin.tune.measure import allocator, bare, unpacked
from ts_plugin.tune.values import Advice, Choice

WORTH = 0.03  # gained beyond the spread: less is not said
ROUNDS = 6
PIECE = 0.5  # seconds in one round, at least
WARM_UP = 4  # batches that do not count
START = 20.0  # seconds that a variant takes besides its rounds


@dataclass(frozen=True, slots=True)
class _Variant:
    what: str
    how: str
    policy: Policy = Policy()
    change: str | None = None


def advise(
    archive: Archive,
    body: Body,
    room: Room,
    choice: Choice,
    *,
    store: Store,
    seconds: float,
    bfloat16: bool,
    fits: int,
    tell: Tell = lambda what, left: None,
) -> tuple[Advice, ...]:
    """Return what gained more than 3 % beyond the spread with ``choice``, in requests/s of all its workers together.

    ``seconds`` is the budget: what it has no time for is left out, as is everything if twice the workers do not fit
    into memory (``fits`` processes do). What cannot be done to this model is left out too.
    """
    if fits < 2 * choice.workers:
        return ()
    end = time.monotonic() + seconds
    found = []
    with unpacked(archive) as model:
        for variant in _variants(bfloat16=bfloat16):
            name = f"advice {variant.what} {choice.workers} {choice.threads} {choice.batch}"
            tell(f"trying {variant.what}", max(end - time.monotonic(), 0))
            if not store.rounds(name) and time.monotonic() + START < end:
                _compare(model, body, room, choice, variant, store, name, end)
            rounds = [(plain, changed) for plain, changed in store.rounds(name)]
            if (much := gain(rounds)) is not None:
                before = choice.workers * choice.batch / statistics.median(plain for plain, _ in rounds)
                found.append(Advice(variant.what, before, before * much, variant.how))
    return tuple(found)


def gain(rounds: list[tuple[float, float]]) -> float | None:
    """Return how many times faster the changed one was, or None if that is not beyond doubt.

    ``rounds`` are seconds of a batch: plain, changed. The spread is half of what lies between the quartiles.
    """
    ratios = [plain / changed for plain, changed in rounds]
    if len(ratios) < 3:
        return None
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle if middle - 1 - (high - low) / 2 > WORTH else None


def _variants(*, bfloat16: bool) -> Iterator[_Variant]:
    plain = allocator(Policy())
    for kind in (Allocator.TCMALLOC, Allocator.JEMALLOC, Allocator.DEFAULT):
        policy = Policy(allocator=kind)
        if allocator(policy) != plain and (allocator(policy) or kind is Allocator.DEFAULT):
            name = "glibc's allocator" if kind is Allocator.DEFAULT else str(kind.value)
            yield _Variant(name, f"cpu_launcher_args=--memory-allocator {kind.value}", policy=policy)
    how = "in the handler: self.model = torch.jit.optimize_for_inference(self.model)"
    yield _Variant(OPTIMIZE, how, change=OPTIMIZE)
    if bfloat16:
        how = 'in the handler: with torch.autocast("cpu", torch.bfloat16); answers differ in the third digit'
        yield _Variant(BFLOAT16, how, change=BFLOAT16)


def _compare(
    model: Path, body: Body, room: Room, choice: Choice, variant: _Variant, store: Store, name: str, end: float
) -> None:
    """Let the plain and the changed processes take turns on the same cores."""

    def work(processes: Bare, seconds: float, fewest: int) -> float:
        return statistics.fmean(processes.work(seconds, batch=choice.batch, fewest=fewest))

    def start(policy: Policy, change: str | None) -> Bare:
        return bare(model, body, room, threads=choice.threads, instances=choice.workers, policy=policy, change=change)

    try:
        # The changed ones first: they end here if it cannot be done to this model. OPTIMIZE wants TorchScript.
        with start(variant.policy, variant.change) as changed, start(Policy(), None) as plain:
            for processes in (plain, changed):
                work(processes, 0, WARM_UP)
            for number in range(ROUNDS):
                if time.monotonic() > end:
                    break
                pair = [work(processes, PIECE, 2) for processes in (plain, changed)[:: -1 if number % 2 else 1]]
                store.add(name, pair[:: -1 if number % 2 else 1])
    except BareError:
        return  # not with this model
