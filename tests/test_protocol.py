"""The words of regions.c as a small model: every order of the steps of an owner and two borrowers, and every death.

A step is what is atomic: one load, store or compare-and-swap of a word, or a question to the kernel. The model follows
`take_own`, `borrow`, `enter`, `leave` and `worker_end` of regions.c line by line.
The owner's patience with a borrower that lives and stays in a region is not in it: force is what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest

pytestmark = pytest.mark.no_cover
BUSY = 8
OWNER, FIRST, SECOND = 1, 2, 3  # slot + 1
BORROWERS = (FIRST, SECOND)


@dataclass(frozen=True, slots=True)
class World:
    """One slice: its words, where everybody is in the program, and who is dead.

    ``at`` is the next step of the owner and of the borrowers. ``requests`` that each may still begin bound the model.
    """

    user: int = 0
    wanted: bool = False
    asked: int = 0
    at: tuple[str, str, str] = ("idle", "idle", "idle")
    requests: tuple[int, int, int] = (2, 2, 2)
    regions: tuple[int, int, int] = (0, 2, 2)
    dead: frozenset[int] = frozenset()

    def move(self, who: int, at: str, **changes: object) -> World:
        places = tuple(at if n == who - 1 else place for n, place in enumerate(self.at))
        return replace(self, at=places, **changes)  # type: ignore[arg-type]

    def less(self, counts: tuple[int, int, int], who: int) -> tuple[int, int, int]:
        return tuple(count - (n == who - 1) for n, count in enumerate(counts))  # type: ignore[return-value]

    def computing(self) -> list[int]:
        """Return who computes on the slice; a dead process computes nothing."""
        return [
            who for who in (OWNER, *BORROWERS) if who not in self.dead and self.at[who - 1] in ("computes", "in region")
        ]


def steps(world: World) -> Iterator[World]:
    """Yield what may happen next."""
    for who in (OWNER, *BORROWERS):
        if who not in world.dead:
            yield from owner(world) if who == OWNER else borrower(world, who)
            yield replace(world, dead=world.dead | {who})


def owner(world: World) -> Iterator[World]:
    """take_own and worker_end."""
    at = world.at[0]
    if at == "idle":
        if world.requests[0]:
            yield world.move(OWNER, "takes", wanted=True, requests=world.less(world.requests, OWNER))
    elif at == "takes":  # user & BUSY is looked at, and the word swapped only if it is still the same: one step
        if not world.user & BUSY or world.user & ~BUSY in world.dead:  # as the kernel says
            yield world.move(OWNER, "computes", user=OWNER | BUSY)
    elif at == "computes":
        yield world.move(OWNER, "ends", user=0 if world.user == OWNER | BUSY else world.user)
    elif at == "ends":
        yield world.move(OWNER, "idle", wanted=False)


def borrower(world: World, me: int) -> Iterator[World]:
    """borrow, enter, leave, and what a request gives back at its end; and ask."""
    at = world.at[me - 1]
    if at == "idle":
        if world.requests[me - 1]:
            begun = replace(world, requests=world.less(world.requests, me))
            yield begun.move(me, "idle" if world.wanted else "borrows")
            yield begun.move(me, "asks")
    elif at == "borrows":
        yield world.move(me, "holds", user=me) if world.user == 0 else world.move(me, "idle")
    elif at == "asks":  # for a slice that another one has borrowed
        asks = world.user & ~BUSY not in (0, me, OWNER) and not world.wanted and not world.asked
        yield world.move(me, "waits", asked=me) if asks else world.move(me, "idle")
    elif at == "waits":
        if world.user == 0:
            yield world.move(me, "borrows", asked=0 if world.asked == me else world.asked)
        yield world.move(me, "idle", asked=0 if world.asked == me else world.asked)
    elif at == "holds":  # the next region starts, or the request ends
        left = world.regions[me - 1]
        if left:
            looked = replace(world, regions=world.less(world.regions, me))
            yield looked.move(me, "gives" if world.wanted or world.asked else "marks")
        yield world.move(me, "idle", user=0 if world.user == me else world.user)
    elif at == "marks":
        yield world.move(me, "in region", user=me | BUSY) if world.user == me else world.move(me, "idle")
    elif at == "in region":
        yield world.move(me, "holds", user=me if world.user == me | BUSY else world.user)
    elif at == "gives":
        yield world.move(me, "forgives", user=0 if world.user == me else world.user)
    elif at == "forgives":
        yield world.move(me, "idle", asked=0)


@cache
def reachable() -> set[World]:
    seen, open_ = {World()}, [World()]
    while open_:
        for world in steps(open_.pop()):
            if world not in seen:
                seen.add(world)
                open_.append(world)
    return seen


def test_never_two_compute_on_a_slice() -> None:
    assert len(reachable()) > 10_000
    assert [world for world in reachable() if len(world.computing()) > 1] == []


def test_whoever_computes_has_the_word() -> None:
    assert [world for world in reachable() for who in world.computing() if world.user != who | BUSY] == []


def test_an_owner_waits_for_one_step_of_one_borrower_at_most() -> None:
    """Wherever it waits, it goes on by itself, or as soon as the one that is inside a region has left it."""
    for world in reachable():
        if world.at[0] != "takes" or OWNER in world.dead or list(owner(world)):
            continue
        holder = world.user & ~BUSY
        assert world.at[holder - 1] == "in region"
        (after,) = borrower(world, holder)
        assert list(owner(after)), "no other borrower comes between"


def test_a_slice_that_nobody_uses_can_be_borrowed_again() -> None:
    """No death leaves a slice that its owner, or its owner's successor in the slot, could not use."""
    for world in reachable():
        if OWNER not in world.dead and world.at == ("idle", "idle", "idle") and not world.dead:
            assert (world.user, world.wanted) == (0, False)


def test_a_request_to_share_does_not_keep_a_slice_from_being_lent() -> None:
    """An `asked` that was left behind costs the next borrower one loan, and is gone then."""
    left = [world for world in reachable() if world.asked and world.asked in world.dead and world.user == 0]
    assert left, "the model has such a world"
    for world in left:
        for who in BORROWERS:
            if who not in world.dead and world.at[who - 1] == "gives":
                (given,) = borrower(world, who)
                (after,) = borrower(given, who)
                assert not after.asked
