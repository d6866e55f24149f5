"""What a worker's runtimes find in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leases import slice_of
from ts_plugin.planning.policy import Allocator, OmpRuntime, Policy
from ts_plugin.worker.environment import COLLAPSING, collapsing, prepare_environment

THREE = slice_of(range(3))


def test_the_environment_has_the_slices_threads() -> None:
    environment = {"OMP_NUM_THREADS": "64"}
    assert prepare_environment(environment, THREE, Policy(allocator=Allocator.DEFAULT), library_roots=()) == []
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] == "1"
    assert "LD_PRELOAD" not in environment


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {}])
def test_how_long_threads_spin_is_left_to_the_user_and_the_runtime(own: dict[str, str]) -> None:
    environment = dict(own)
    prepare_environment(environment, THREE, Policy(allocator=Allocator.DEFAULT), library_roots=())
    spinning = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    assert {name: environment[name] for name in spinning if name in environment} == own


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_PROC_BIND", "true"), ("OMP_PLACES", "cores"), ("KMP_AFFINITY", "compact,1,0"), ("GOMP_CPU_AFFINITY", "0-1")],
)
def test_variables_that_collapse_the_mask_are_removed_with_a_note(name: str, value: str) -> None:
    environment = {name: value}
    notes = prepare_environment(environment, THREE, Policy(allocator=Allocator.DEFAULT), library_roots=())
    assert name not in environment
    assert len(notes) == 1
    assert notes[0].startswith(f"{name} removed")


# What torch's own runtime makes of them is tried below; KMP_AFFINITY is Intel's, which no wheel of torch brings.
COLLAPSE = [
    ({}, []),
    ({"OMP_PROC_BIND": "true"}, ["OMP_PROC_BIND"]),
    ({"OMP_PROC_BIND": "Close"}, ["OMP_PROC_BIND"]),
    ({"OMP_PROC_BIND": "spread,close"}, ["OMP_PROC_BIND"]),
    ({"OMP_PROC_BIND": "master"}, ["OMP_PROC_BIND"]),
    ({"OMP_PROC_BIND": "false"}, []),
    ({"OMP_PROC_BIND": "FALSE"}, []),
    ({"OMP_PROC_BIND": "0"}, []),
    ({"OMP_PROC_BIND": ""}, []),
    ({"OMP_PLACES": "cores"}, ["OMP_PLACES"]),
    ({"OMP_PLACES": ""}, []),
    ({"OMP_PLACES": "cores", "OMP_PROC_BIND": "false"}, []),
    ({"GOMP_CPU_AFFINITY": "0-1"}, ["GOMP_CPU_AFFINITY"]),
    ({"GOMP_CPU_AFFINITY": ""}, ["GOMP_CPU_AFFINITY"]),
    ({"GOMP_CPU_AFFINITY": "0-1", "OMP_PROC_BIND": "false"}, []),
]
INTELS = [
    ({"KMP_AFFINITY": "disabled"}, []),
    ({"KMP_AFFINITY": "none"}, []),
    ({"KMP_AFFINITY": "granularity=fine,verbose"}, []),
    ({"KMP_AFFINITY": "granularity=fine,compact,1,0"}, ["KMP_AFFINITY"]),
    ({"KMP_AFFINITY": "scatter", "OMP_PROC_BIND": "false"}, ["KMP_AFFINITY"]),
]


@pytest.mark.parametrize(("environment", "found"), COLLAPSE + INTELS)
def test_variables_that_bind_nothing_are_left_alone(environment: dict[str, str], found: list[str]) -> None:
    assert collapsing(environment) == found
    left = dict(environment)
    prepare_environment(left, THREE, Policy(allocator=Allocator.DEFAULT), library_roots=())
    assert {name for name in COLLAPSING if name in left} == set(environment) - set(found)


@pytest.mark.process
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU cannot be made fewer")
@pytest.mark.parametrize(("environment", "found"), COLLAPSE)
def test_torchs_own_runtime_agrees(environment: dict[str, str], found: list[str]) -> None:
    (path,) = (Path(sys.prefix) / "lib").glob("python*/site-packages/torch/lib/libgomp*")
    program = f"import ctypes, os; ctypes.CDLL({str(path)!r}); print(len(os.sched_getaffinity(0)))"
    clean = {name: value for name, value in os.environ.items() if name not in COLLAPSING}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) == 1) is bool(found)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    return tmp_path


def test_an_allocator_is_preloaded_where_it_is_found(prefix: Path) -> None:
    (prefix / "lib" / "libjemalloc.so.2").touch()
    environment = {"LD_PRELOAD": "/other.so"}
    policy = Policy(allocator=Allocator.JEMALLOC)
    assert prepare_environment(environment, THREE, policy, library_roots=[str(prefix)]) == []
    assert environment["LD_PRELOAD"] == f"{prefix}/lib/libjemalloc.so.2:/other.so"
    assert "oversize_threshold" in environment["MALLOC_CONF"]
    prepare_environment(environment, THREE, policy, library_roots=[str(prefix)])
    assert environment["LD_PRELOAD"].count("jemalloc") == 1, "not twice"


def test_without_a_wish_tcmalloc_is_taken_and_jemalloc_is_not(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["libjemalloc.so.2"]
    monkeypatch.setattr(os, "listdir", lambda path: there)
    environment: dict[str, str] = {}
    assert prepare_environment(environment, THREE, Policy(), library_roots=[str(prefix)]) == []
    assert "LD_PRELOAD" not in environment
    there.append("libtcmalloc.so.4")
    assert prepare_environment(environment, THREE, Policy(), library_roots=[str(prefix)]) == []
    assert environment["LD_PRELOAD"].endswith("/lib/libtcmalloc.so.4")


@pytest.mark.parametrize(
    "own",
    [
        "/opt/lib/libjemalloc.so.2",
        "libmimalloc.so",
        "/usr/lib/libtcmalloc_minimal.so.4",
        "/usr/lib/libtbbmalloc_proxy.so.2",
        "/usr/local/lib/libsnmallocshim.so",
    ],
)
@pytest.mark.parametrize("separator", [":", " "])
def test_an_allocator_of_the_users_own_stays_alone(prefix: Path, own: str, separator: str) -> None:
    (prefix / "lib" / "libtcmalloc.so.4").touch()
    environment = {"LD_PRELOAD": f"/other.so{separator}{own}"}
    assert prepare_environment(environment, THREE, Policy(), library_roots=[str(prefix)]) == []
    assert environment["LD_PRELOAD"] == f"/other.so{separator}{own}"


def test_an_allocator_that_was_asked_for_and_is_not_the_users_own_is_a_note(prefix: Path) -> None:
    (prefix / "lib" / "libtcmalloc.so.4").touch()
    environment = {"LD_PRELOAD": "/opt/lib/libjemalloc.so.2"}
    policy = Policy(allocator=Allocator.TCMALLOC)
    (note,) = prepare_environment(environment, THREE, policy, library_roots=[str(prefix)])
    assert note.startswith("libtcmalloc.so not preloaded: /opt/lib/libjemalloc.so.2 in LD_PRELOAD stays; remove it")
    assert environment["LD_PRELOAD"] == "/opt/lib/libjemalloc.so.2"


def test_a_missing_allocator_is_a_note(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: [])
    environment: dict[str, str] = {}
    notes = prepare_environment(environment, THREE, Policy(allocator=Allocator.TCMALLOC), library_roots=())
    assert notes == ["libtcmalloc.so not found: glibc's allocator is used; install it or drop the option"]
    assert "LD_PRELOAD" not in environment


def test_never_two_openmp_runtimes(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = prefix / "torch" / "lib"
    torch.mkdir(parents=True)
    (torch.parent / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(prefix))
    (prefix / "lib" / "libiomp5.so").touch()
    policy = Policy(allocator=Allocator.DEFAULT, omp_runtime=OmpRuntime.INTEL)
    environment: dict[str, str] = {}
    assert prepare_environment(environment, THREE, policy, library_roots=[str(prefix)]) == []
    assert environment.pop("LD_PRELOAD") == f"{prefix}/lib/libiomp5.so"
    (torch / "libgomp.so.1").touch()
    notes = prepare_environment(environment, THREE, policy, library_roots=[str(prefix)])
    assert "this torch brings libgomp.so.1" in notes[0]
    assert "LD_PRELOAD" not in environment
