"""Slices follow who is alive: real processes that claim, leave, and are killed at the worst moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.cpuset import Cpuset
from tests.claimants import ALLOWED, CORES, TOPOLOGY, Claimant
from tests.eventually import eventually
from tests.leases import lease_of
from ts_plugin.kernel import affinity
from ts_plugin.ledger import coordinator, directory
from ts_plugin.ledger.binding import bind_all
from ts_plugin.ledger.file import Ledger
from ts_plugin.ledger.model import Server, State
from ts_plugin.machine import discovery, process
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Lend, Pin, Policy

FIRST, LAST = (TOPOLOGY.cores_of(ALLOWED)[place].number for place in (0, -1))
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CORES < 2, reason="needs two cores to tell one slice from another"),
]


def divided(*claimants: Claimant) -> bool:
    """Tell whether every claimant has one mask for all its threads, all disjoint, and nothing idles."""
    masks = [claimant.masks() for claimant in claimants]
    if any(len(mask) != 1 for mask in masks):
        return False
    flat = [cpu for mask in masks for cpu in next(iter(mask))]
    cores = discovery.read_topology().cores_of(flat)
    return len(flat) == len(set(flat)) and len(cores) == CORES


@pytest.mark.parametrize("lend", Lend)
def test_one_worker_owns_the_machine_a_second_halves_it_and_gets_it_back(
    start: Callable[..., Claimant], state: Path, lend: Lend
) -> None:
    me = process.identify(os.getpid())
    assert me is not None
    coordinator.register_server(Ledger(str(state)), Server(me.pid, me.start_time, Policy(lend=lend), ALLOWED))
    first = start(extra_threads=3)
    assert first.facts()["threads"] == CORES
    second = start()
    facts = second.facts()
    assert facts["threads"] == CORES // 2
    assert divided(first, second), "the first one is off the second one's cores before that even starts"
    assert eventually(lambda: first.follow()["threads"] == CORES - CORES // 2)
    second.kill()
    assert eventually(lambda: [lease.pid for lease in Ledger(str(state)).read().leases] == [first.pid])
    assert eventually(lambda: divided(first)), "freed cores are used again"
    assert eventually(lambda: first.follow()["threads"] == CORES)


def test_a_death_is_seen_without_pidfds_too(start: Callable[..., Claimant]) -> None:
    survivor, victim = start(pidfd=False), start(worker="9001")
    survivor.facts()
    victim.facts()
    assert eventually(lambda: divided(survivor, victim))
    victim.kill()
    assert eventually(lambda: divided(survivor))


def test_what_fails_on_a_full_disk_is_done_when_there_is_room_again(
    start: Callable[..., Claimant], state: Path
) -> None:
    survivor, victim = start(), start(worker="9001")
    survivor.facts()
    victim.facts()
    survivor.follow("full")
    victim.kill()
    ledger = Ledger(str(state))
    assert eventually(lambda: survivor.follow() and any("File too large" in line for line in survivor.log))
    assert {lease.pid for lease in ledger.read_all().leases} == {survivor.pid, victim.pid}, "the old content stands"
    survivor.follow("free")
    assert eventually(lambda: {lease.pid for lease in ledger.read_all().leases} == {survivor.pid})
    assert eventually(lambda: divided(survivor))


def test_who_leaves_and_lives_on_gives_its_cores_back(start: Callable[..., Claimant], state: Path) -> None:
    stays, leaves = start(), start(worker="9001", follows=False)
    stays.facts()
    leaves.facts()
    coordinator.leave(Ledger(str(state)), leaves.pid)
    assert eventually(lambda: divided(stays))
    assert leaves.process.poll() is None


def test_more_workers_than_cores_share_them_fairly_with_one_thread_each(start: Callable[..., Claimant]) -> None:
    claimants = [start(worker=str(9000 + number)) for number in range(2 * CORES + 1)]
    for claimant in claimants:
        claimant.facts()

    def fair() -> bool:
        load: Counter[int] = Counter()
        for claimant in claimants:
            masks = claimant.masks()
            if len(masks) != 1 or len(next(iter(masks))) != 1:
                return False
            load.update(core.number for core in TOPOLOGY.cores_of(next(iter(masks))))
        return sorted(load.values()) == [2] * (CORES - 1) + [3]

    assert eventually(fair)
    assert eventually(lambda: {claimant.follow()["threads"] for claimant in claimants} == {1})


def test_sixty_four_claim_at_once(start: Callable[..., Claimant], state: Path) -> None:
    claimants = [start(worker=str(9000 + number), interval=0.5) for number in range(64)]
    facts = [claimant.facts() for claimant in claimants]
    assert not any("error" in fact for fact in facts)
    leases = Ledger(str(state)).read().leases
    assert {lease.pid for lease in leases} == {claimant.pid for claimant in claimants}
    load = Counter(cpu for lease in leases for cpu in lease.slice.cpus)
    assert max(load.values()) - min(load.values()) <= 1
    for claimant in claimants[1:]:
        claimant.process.send_signal(signal.SIGKILL)
    for claimant in claimants[1:]:
        claimant.process.wait()
    assert eventually(lambda: divided(claimants[0])), "the last one owns the machine again"


@pytest.mark.parametrize("damage", ["delete", "garbage", "directory"])
def test_the_ledger_heals_itself(start: Callable[..., Claimant], state: Path, damage: str) -> None:
    first, second = start(), start(worker="9001")
    first.facts()
    second.facts()
    ledger = Ledger(str(state))
    if damage == "delete":
        os.unlink(ledger.path)
    elif damage == "garbage":
        Path(ledger.path).write_text("{ garbage")
    else:
        shutil.rmtree(state.rename(state.with_name("gone")))  # renamed first: the followers write meanwhile
    assert eventually(lambda: {lease.pid for lease in ledger.read().leases} == {first.pid, second.pid})
    assert eventually(lambda: divided(first, second))


def test_a_mask_that_somebody_widened_is_repaired_with_the_next_change(start: Callable[..., Claimant]) -> None:
    first, second = start(), start(worker="9001")
    first.facts()
    second.facts()
    for tid in process.threads(first.pid):
        os.sched_setaffinity(tid, os.sched_getaffinity(0))
    third = start(worker="9002")
    third.facts()
    third.kill()
    assert eventually(lambda: divided(first, second))


def test_fixed_cores_are_served_first(start: Callable[..., Claimant]) -> None:
    greedy = start()
    greedy.facts()
    modest = start(cores=1, worker="9001")
    assert modest.facts()["threads"] == 1
    assert eventually(lambda: divided(greedy, modest))
    assert eventually(lambda: greedy.follow()["threads"] == CORES - 1)


def test_what_cannot_be_granted_is_noted_and_serves(start: Callable[..., Claimant], state: Path) -> None:
    asks_too_much = start(cores=10_000)
    assert asks_too_much.facts()["threads"] == CORES
    notes = " ".join(Ledger(str(state)).read().notes)
    assert "10000" in notes.replace(",", "")
    assert str(CORES) in notes
    asks_too_much.kill()
    assert Ledger(str(state)).read().notes == ()


@pytest.fixture
def frontend(state: Path) -> Callable[..., None]:
    """Makes this process the claimants' frontend."""
    mask = os.sched_getaffinity(0)

    def become(policy: Policy, error: str | None = None) -> None:
        me = process.identify(os.getpid())
        assert me is not None
        coordinator.register_server(Ledger(str(state)), Server(me.pid, me.start_time, policy, frozenset(mask), error))

    return become


def test_a_frontend_with_an_error_makes_its_workers_say_so(
    start: Callable[..., Claimant], frontend: Callable[..., None]
) -> None:
    frontend(Policy(), "cpu_launcher_args: typo")
    assert start().facts()["error"] == "cpu_launcher_args: typo"


def test_a_frontends_policy_holds_and_it_moves_aside_itself(
    start: Callable[..., Claimant], state: Path, frontend: Callable[..., None]
) -> None:
    frontend(Policy(reserve_cores=1))
    first = start().facts()["cpus"]
    reserved = Ledger(str(state)).read().reserved
    assert reserved
    assert reserved.isdisjoint(first)
    assert eventually(lambda: os.sched_getaffinity(0) == reserved)
    second = start(worker="9001")
    assert reserved.isdisjoint(second.facts()["cpus"]), "its narrowed mask is not taken for what its workers may use"


def test_a_worker_too_many_for_the_size_of_each_is_refused_and_the_others_keep_theirs(
    start: Callable[..., Claimant], frontend: Callable[..., None]
) -> None:
    frontend(Policy(cores_per_worker=(CORES,)))
    first = start()
    assert first.facts()["threads"] == CORES
    error = start(worker="9001").facts()["error"]
    assert f"need {2 * CORES} cores (2 workers x {CORES}) but {CORES} are allowed" in error
    assert divided(first)


@pytest.mark.parametrize(
    ("allowed", "held", "reserved", "aside"),
    [
        pytest.param(range(4), range(3), (), range(4), id="one core left of four"),
        pytest.param(range(8), range(4), (), range(4, 8), id="idle SMT siblings of four cores"),
        pytest.param(range(64), range(58), (), range(64), id="six of 64"),
        pytest.param(range(64), range(56), (), range(56, 64), id="an eighth of 64"),
        pytest.param(range(64), range(60), (63,), (63,), id="its user reserved one"),
        pytest.param(range(2), range(2), (), range(2), id="nothing left"),
    ],
)
def test_a_frontend_moves_aside_where_enough_is_left_for_it(
    monkeypatch: pytest.MonkeyPatch,
    allowed: Iterable[int],
    held: Iterable[int],
    reserved: Iterable[int],
    aside: Iterable[int],
) -> None:
    bound = []
    monkeypatch.setattr(affinity, "bind_tree", lambda pid, cpus, before, borrows: affinity.Outcome(0))
    monkeypatch.setattr(affinity, "bind_process", lambda pid, cpus, before: bound.append((pid, frozenset(cpus))))
    me, cpus = os.getpid(), tuple(held)
    demand = Demand(frozenset(allowed))
    lease = lease_of(cpus, me, server_pid=me, demand=demand)
    after = State(servers=(Server(me, 0, Policy(), demand.allowed),), leases=(lease,), reserved=frozenset(reserved))
    bind_all(State(), after)
    assert bound == [(me, frozenset(aside))]


def test_one_death_is_one_plan_however_many_survive(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def counted(*arguments: Any) -> Any:
        plans.append(1)
        return plan(*arguments)

    with asleep(state, Policy(), FIRST) as survivor, asleep(state, Policy(), LAST) as victim:
        try:
            monkeypatch.setattr(coordinator, "plan", counted)
            victim.kill()
            victim.wait()
            (lease,) = (one for one in Ledger(str(state)).read().leases if one.pid == survivor.pid)
            states = [coordinator.enter(Ledger(str(state)), lease)[0] for _ in range(8)]  # as eight followers would
        finally:
            survivor.kill()
    assert [[lease.pid for lease in one.leases] for one in states] == [[survivor.pid]] * 8
    assert len(states[0].leases[0].slice.cpus) == CORES
    assert len(plans) == 1


def test_never_pinned_still_gets_its_threads(start: Callable[..., Claimant], frontend: Callable[..., None]) -> None:
    frontend(Policy(pin=Pin.NEVER))
    start().facts()
    facts = start(worker="9001").facts()
    assert facts["threads"] == CORES // 2
    assert facts["mask"] == sorted(os.sched_getaffinity(0))


def test_a_worker_that_the_kernel_does_not_bind_gets_no_slice(start: Callable[..., Claimant], state: Path) -> None:
    bound = start()
    bound.facts()
    refused = start(worker="9001", forbid=True)
    error = refused.facts()["error"]
    assert "Operation not permitted" in error
    assert "seccomp" in error
    assert {lease.pid for lease in Ledger(str(state)).read().leases} == {bound.pid}
    assert divided(bound), "its cores go back"


def test_a_worker_that_cannot_follow_any_more_says_so_once_and_counts_its_threads(
    start: Callable[..., Claimant], state: Path
) -> None:
    stuck = start()
    stuck.facts()
    stuck.follow("forbid")
    late = start(worker="9001")
    late.facts()
    late.kill()  # what its death frees, nobody else can give: the worker's own follower has to
    ledger = Ledger(str(state))
    assert eventually(lambda: any("NOT BOUND" in note for lease in ledger.read().leases for note in lease.notes))
    assert eventually(lambda: stuck.follow()["threads"] == CORES), "as the ledger says"
    before = stuck.wakes()
    assert eventually(lambda: stuck.wakes() >= before + 4), "it looks again"
    stuck.follow()
    assert sum("NOT BOUND" in line for line in stuck.log) == 1
    again = start(worker="9002")
    again.facts()  # it may bind others
    assert eventually(lambda: len(ledger.read().leases) == 2 and divided(stuck, again))
    assert eventually(lambda: not any(lease.notes for lease in ledger.read().leases)), (
        "the note lasts as long as it is so"
    )


def asleep(state: Path, policy: Policy, cpu: int) -> subprocess.Popen[bytes]:
    """A process that follows nothing, in the ledger with a slice of one CPU, as if it were its own frontend."""
    sleeper = subprocess.Popen(["sleep", "600"])
    os.sched_setaffinity(sleeper.pid, {cpu})
    lease = lease_of((cpu,), sleeper.pid, worker_id="8000", server_pid=sleeper.pid, demand=Demand(ALLOWED, policy))
    ledger = Ledger(str(state))
    with ledger.locked() as before:
        ledger.write(replace(before, leases=(*before.leases, lease)))
    return sleeper


@pytest.mark.parametrize("named", [None, ALLOWED], ids=["no list", "a list that names the same CPUs"])
def test_a_demand_that_became_impossible_is_its_own_servers_problem(
    start: Callable[..., Claimant], state: Path, frontend: Callable[..., None], named: frozenset[int] | None
) -> None:
    frontend(Policy(core_list=named))
    gone = max(TOPOLOGY.online) + 1  # a CPU that went offline under the first server's list
    with asleep(state, Policy(core_list=frozenset({FIRST, gone})), FIRST) as sleeper:
        try:
            worker = start()
            assert worker.facts()["threads"] == CORES - 1, "all but the core that the other one keeps"
            ledger = Ledger(str(state))
            assert eventually(lambda: FIRST not in next(iter(worker.masks())))
            assert os.sched_getaffinity(sleeper.pid) == {FIRST}
            (note,) = [note for note in ledger.read().notes if "--core-list" in note]
            assert f"the workers of process {sleeper.pid} keep their slices: CPUs {gone} of --core-list" in note
            second = start(worker="9001")
            assert "error" not in second.facts()
        finally:
            sleeper.kill()
    assert eventually(lambda: divided(worker, second)), "until its end"
    assert ledger.read().notes == ()


@pytest.fixture
def cpuset() -> Iterator[Cpuset]:
    made = Cpuset.create(frozenset({FIRST}))
    if made is None:
        pytest.skip("needs the right to make a cgroup with a cpuset")
    yield made
    made.remove()


def test_slices_follow_a_cpuset_that_is_widened_and_moved(cpuset: Cpuset, start: Callable[..., Claimant]) -> None:
    worker = start(cpuset=cpuset, look_interval=0.2)
    assert worker.facts()["cpus"] == [FIRST]
    cpuset.allow(ALLOWED)
    assert eventually(lambda: worker.follow()["threads"] == CORES)
    assert divided(worker)
    cpuset.allow(frozenset({LAST}))
    assert eventually(lambda: worker.follow()["cpus"] == [LAST])
    assert eventually(lambda: worker.masks() == {frozenset({LAST})})
    cpuset.allow(ALLOWED)
    assert eventually(lambda: worker.follow()["threads"] == CORES)
    assert eventually(lambda: divided(worker))


def test_a_limit_set_with_taskset_outlasts_changes_of_the_cpuset(
    cpuset: Cpuset, start: Callable[..., Claimant]
) -> None:
    cpuset.allow(ALLOWED)
    worker = start(cpuset=cpuset, only=[FIRST], look_interval=0.2)
    assert worker.facts()["cpus"] == [FIRST]
    cpuset.allow(frozenset({LAST}))
    assert eventually(lambda: worker.follow()["cpus"] == [LAST]), "the kernel gives it all of such a cpuset"
    cpuset.allow(ALLOWED)
    assert eventually(lambda: worker.follow()["cpus"] == [FIRST])


def test_a_frontend_that_is_entered_again_keeps_what_it_was_allowed_at_first(state: Path) -> None:
    """It may have been moved aside since: its mask is no limit for its workers then."""
    ledger = Ledger(str(state))
    me = process.identify(os.getpid())
    assert me is not None
    coordinator.register_server(ledger, Server(me.pid, me.start_time, Policy(), ALLOWED))
    aside = Server(me.pid, me.start_time, Policy(pin=Pin.NEVER), frozenset({LAST}), limit=frozenset({LAST}))
    coordinator.register_server(ledger, aside)
    assert ledger.read().servers == (Server(me.pid, me.start_time, Policy(pin=Pin.NEVER), ALLOWED),)


def test_the_machine_is_read_before_the_lock_that_all_workers_share(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def read_while_the_lock_is_free() -> Topology:
        with Ledger(str(state)).locked():
            reads.append(1)
        return TOPOLOGY

    monkeypatch.setattr(directory, "LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(discovery, "read_topology", read_while_the_lock_is_free)
    me = process.identify(os.getpid())
    assert me is not None
    coordinator.enter(Ledger(str(state)), lease_of((FIRST,), demand=Demand(ALLOWED)))
    coordinator.leave(Ledger(str(state)), os.getpid(), "a reason")
    assert len(reads) == 2
