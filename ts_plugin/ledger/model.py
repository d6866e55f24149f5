"""What the ledger says: workers with their leases, frontends, and who serves unbound. Values without I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.machine.process import Identity
from ts_plugin.planning.planner import Demand, Slice
from ts_plugin.planning.policy import Policy


@dataclass(frozen=True, slots=True)
class _OfProcess:
    """An entry that ends with its process."""

    pid: int
    start_time: int

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Lease(_OfProcess):
    """A worker owns a slice. ``moves`` counts how often it had to leave all its NUMA nodes.

    ``limit`` are the CPUs that taskset, for example, restricts it to; None if it may use all that its cpuset has.
    """

    model: str
    version: str
    worker_id: str
    server_pid: int | None
    demand: Demand
    slice: Slice
    moves: int = 0
    notes: tuple[str, ...] = ()
    limit: frozenset[int] | None = None

    def __str__(self) -> str:
        return f"worker {self.worker_id} of {self.model} {self.version}"

    def describe(self) -> str:
        """Return one line for a log: who, which CPUs, how many threads, where."""
        kind = "CPUs" if self.slice.pinned else "not pinned, any of CPUs"
        return (
            f"{self}: {kind} {format_cpulist(self.slice.cpus)}, intra-op threads {self.slice.threads}, "
            f"NUMA nodes {format_cpulist(self.slice.numa_nodes) or 'unknown'}"
        )


@dataclass(frozen=True, slots=True)
class Server(_OfProcess):
    """A TorchServe frontend and what its config.properties asks for.

    ``allowed`` are the CPUs that it and its workers may use: the frontend itself may be moved aside.
    ``limit`` is the same as a lease's.
    ``error`` says why its workers must serve unbound, a typo in ``cpu_launcher_args`` for example.
    """

    policy: Policy
    allowed: frozenset[int]
    error: str | None = None
    limit: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Refusal(_OfProcess):
    """Why a worker serves unbound. The launcher says it in the worker's environment too; a handler cannot."""

    reason: str


@dataclass(frozen=True, slots=True)
class State:
    """The content of the ledger; ``generation`` grows with every write, ``notes`` are the planner's."""

    generation: int = 0
    servers: tuple[Server, ...] = ()
    leases: tuple[Lease, ...] = ()
    reserved: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def living(self) -> State:
        """Return this state without the processes that have ended; what the plan for the last of them said ends too."""
        leases = tuple(lease for lease in self.leases if lease.identity.alive())
        return replace(
            self,
            servers=tuple(server for server in self.servers if server.identity.alive()),
            leases=leases,
            reserved=self.reserved if leases else frozenset(),
            notes=self.notes if leases else (),
            refusals=tuple(refusal for refusal in self.refusals if refusal.identity.alive()),
        )

    def lease_of(self, pid: int) -> Lease | None:
        return next((lease for lease in self.leases if lease.pid == pid), None)

    def neighbours(self, lease: Lease) -> tuple[Lease, ...]:
        """Return the workers whose slices lend to that of ``lease``, nearest first."""
        piece = lease.slice
        others = [other for other in self.leases if other.slice.reach == piece.reach and other.pid != lease.pid]

        def distance(other: Lease) -> tuple[bool, int]:
            return other.slice.l3_domains != piece.l3_domains, abs(other.slice.cpus[0] - piece.cpus[0])

        return tuple(sorted(others, key=distance)) if piece.reach else ()
