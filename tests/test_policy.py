"""Launcher arguments: what users of TorchServe and ipexrun write today keeps its meaning; mistakes get a remedy."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from ts_plugin.planning.policy import (
    OPTIONS,
    Allocator,
    LauncherArgsError,
    Memory,
    OmpRuntime,
    Pin,
    Policy,
    option_reference,
    parse_launcher_args,
)

MEANINGS = [
    pytest.param("", {}, id="nothing"),
    pytest.param("--node_id 0", {"node_ids": {0}}, id="node id, underscores"),
    pytest.param("--node-id=1", {"node_ids": {1}}, id="node id, dashes and ="),
    pytest.param("--node_id -1", {}, id="run_cpu's default node id"),
    pytest.param("--socket_id 1", {"node_ids": {1}}, id="socket id, of old IPEX"),
    pytest.param("--ncore_per_instance 4", {"cores_per_worker": (4,)}, id="size, of old IPEX"),
    pytest.param("--core-l 2", {"core_list": {2}}, id="cut short, but a list"),
    pytest.param("--nodes-list 0,2-3", {"node_ids": {0, 2, 3}}, id="ipexrun's nodes list"),
    pytest.param("--core_list 0,1,2,3", {"core_list": {0, 1, 2, 3}}, id="core list"),
    pytest.param('--core-list "0, 1, 2, 3"', {"core_list": {0, 1, 2, 3}}, id="core list as run_cpu's help quotes it"),
    pytest.param("--core-list 0, 1, 2, 3 --equal", {"core_list": {0, 1, 2, 3}, "equal": True}, id="... unquoted"),
    pytest.param("--cores-list 0-3,8", {"core_list": {0, 1, 2, 3, 8}}, id="ipexrun's cores list with ranges"),
    pytest.param("--ncores-per-instance 4", {"cores_per_worker": (4,)}, id="one size"),
    pytest.param("--ncores_per_instance 4 2", {"cores_per_worker": (4, 2)}, id="sizes, as run_cpu takes them"),
    pytest.param("--ncores-per-instance=4,2", {"cores_per_worker": (4, 2)}, id="sizes as a list"),
    pytest.param("--ncores-per-instance -1", {}, id="run_cpu's default size"),
    pytest.param("--use_logical_core", {"logical": True}, id="logical cores, TorchServe's recommendation"),
    pytest.param("--use-logical-cores", {"logical": True}, id="logical cores in ipexrun"),
    pytest.param("--skip-cross-node-cores", {"skip_cross_node_cores": True}, id="skip cross node cores"),
    pytest.param("--bind-numa-node", {"skip_cross_node_cores": True}, id="the same in ipexrun"),
    pytest.param("--latency_mode", {"latency": True}, id="latency mode"),
    pytest.param("--throughput-mode", {"skip_cross_node_cores": True}, id="throughput mode: at most one node"),
    pytest.param("--enable_tcmalloc", {"allocator": Allocator.TCMALLOC}, id="tcmalloc"),
    pytest.param("--enable-jemalloc", {"allocator": Allocator.JEMALLOC}, id="jemalloc"),
    pytest.param("--use-default-allocator", {"allocator": Allocator.DEFAULT}, id="default allocator"),
    pytest.param("--memory-allocator jemalloc", {"allocator": Allocator.JEMALLOC}, id="ipexrun's allocator"),
    pytest.param("--memory-allocator auto", {}, id="ipexrun's default allocator"),
    pytest.param("--enable-tcmalloc --memory-allocator auto", {"allocator": Allocator.TCMALLOC}, id="auto yields"),
    pytest.param("--disable_iomp", {"omp_runtime": OmpRuntime.DEFAULT}, id="no Intel OpenMP"),
    pytest.param("--omp-runtime intel", {"omp_runtime": OmpRuntime.INTEL}, id="Intel OpenMP"),
    pytest.param("--use-e-cores", {"use_e_cores": True}, id="E-cores"),
    pytest.param("--pin never", {"pin": Pin.NEVER}, id="pin"),
    pytest.param("--memory bind", {"memory": Memory.BIND}, id="memory, not cut --memory-allocator"),
    pytest.param("--reserve-cores 2", {"reserve_cores": 2}, id="reserve"),
    pytest.param("--equal", {"equal": True}, id="equal"),
    pytest.param("--ncores 4", {"cores_per_worker": (4,)}, id="cut short, as argparse allows"),
    pytest.param("--nod 1", {"node_ids": {1}}, id="cut short, two names of one option"),
    pytest.param("--node-id 0 --node-id 1", {"node_ids": {1}}, id="the last of two counts"),
    pytest.param("--pin=always\t--equal\n", {"pin": Pin.ALWAYS, "equal": True}, id="any white space"),
]

NOTED = [
    pytest.param("--ninstances 4", "--ninstances has no effect: every live worker", id="ninstances"),
    pytest.param("--rank -1", "--rank has no effect", id="rank"),
    pytest.param("--multi_instance", "--multi-instance has no effect", id="multi instance"),
    pytest.param("--disable_numactl", "--disable-numactl has no effect: binding needs no external tool", id="numactl"),
    pytest.param("--disable-taskset", "--disable-taskset has no effect", id="taskset"),
    pytest.param("-m", "-m has no effect", id="module"),
    pytest.param("--log_path /tmp", "--log-path has no effect", id="log path"),
    pytest.param("--strategy close", "--strategy has no effect", id="strategy"),
    pytest.param("--instance-idx 0,1", "--instance-idx has no effect: every live worker", id="instances"),
    pytest.param("--benchmark", "--benchmark has no effect: it tunes jemalloc", id="benchmark"),
    pytest.param("--auto_ipex", "--auto-ipex has no effect: the model stays as it is", id="auto IPEX"),
    pytest.param("--dtype bfloat16", "--dtype has no effect", id="type for auto IPEX"),
    pytest.param("--nnodes 2", "--nnodes has no effect: TorchServe starts the workers", id="machines"),
    pytest.param("--nproc_per_node=2", "--nproc-per-node has no effect", id="processes per machine"),
    pytest.param("--extra-mpi-params='-ppn 2'", "--extra-mpi-params has no effect", id="MPI's parameters"),
    pytest.param("--node-id 0 --core-list 0-3", "--node-id has no effect: --core-list says", id="nodes and cores"),
    pytest.param("--latency-mode --node-id 0", "--node-id has no effect: --latency-mode", id="latency mode overrules"),
    pytest.param("--ncores 2 --throughput-mode", "--ncores-per-instance has no effect", id="throughput overrules"),
]

MISTAKES = [
    pytest.param("--nodeid 3", "unknown option '--nodeid'; did you mean --node-id?", id="typo"),
    pytest.param("--use_logical_corse", "did you mean --use-logical-core?", id="typo with underscores"),
    pytest.param("--frobnicate", "unknown option '--frobnicate'; known options: --node-id", id="nothing like it"),
    pytest.param(
        "--cores 2", "'--cores' may mean a number or a list: --ncores-per-instance N is a", id="number or list"
    ),
    pytest.param("--core=2", "'--core' may mean a number or a list: --ncores-per-instance N is a", id="its singular"),
    pytest.param("--nodes 2", "'--nodes' may mean a number or a list: --node-id LIST names NUMA", id="of NUMA nodes"),
    pytest.param("--membind 0", "unknown option '--membind'; did you mean --memory bind?", id="numactl's memory"),
    pytest.param("--physcpubind=0-3", "did you mean --core-list?", id="numactl's CPUs"),
    pytest.param("--cpunodebind 0", "did you mean --node-id?", id="numactl's nodes"),
    pytest.param("0-3", "unexpected word '0-3'; options begin with --", id="a stray word"),
    pytest.param("--equal --pin always 3", "unexpected word '3'", id="one value too many"),
    pytest.param("--disable", "ambiguous: it may be --disable-iomp or --disable-numactl", id="cut too short"),
    pytest.param("--", "unknown option '--'", id="two dashes"),
    pytest.param("--ncores-per-instance x", "'x' is not a number of cores from 1", id="no number"),
    pytest.param("--ncores-per-instance 0", "'0' is not a number of cores from 1", id="no core"),
    pytest.param("--ncores-per-instance 4 -1", "'4 -1' is not a number of cores", id="a negative size"),
    pytest.param("--reserve-cores -1", "'-1' is not a whole number from 0", id="a negative reserve"),
    pytest.param("--reserve-cores", "--reserve-cores needs a value: --reserve-cores N", id="no value"),
    pytest.param("--reserve-cores --equal", "--reserve-cores needs a value", id="an option for a value"),
    pytest.param("--equal=1", "--equal takes no value, but got '1'", id="a value too many"),
    pytest.param("--pin sometimes", "'sometimes' is not one of auto, always, never", id="no such choice"),
    pytest.param("--memory-allocator mimalloc", "not one of auto, default, tcmalloc, jemalloc", id="no such allocator"),
    pytest.param("--core-list 3-0", r"such as 0-3,8: invalid CPU list '3-0' \(3 > 0\)", id="a list backwards"),
    pytest.param('--core-list "0,1', "close the quotation", id="an open quotation"),
    pytest.param('"--node-id 0 --equal"', "is one word because of the quotes around it", id="quotes around all of it"),
    pytest.param(f"--reserve-cores {10**23}", "is not a whole number from 0 to 65535", id="too large a number"),
    pytest.param(f"--reserve-cores {'9' * 5000}", "is not a whole number from 0 to 65535", id="too long a number"),
    pytest.param(f"--ncores-per-instance {10**23}", "is not a number of cores from 1 to 65535", id="too large a size"),
    pytest.param("--enable-tcmalloc --enable-jemalloc", "contradict each other", id="two allocators"),
    pytest.param("--omp-runtime intel --disable-iomp", "contradict each other", id="two OpenMP runtimes"),
    pytest.param("--latency-mode --throughput-mode", "contradict each other", id="two modes"),
]


@pytest.mark.parametrize(("text", "fields"), MEANINGS)
def test_meaning(text: str, fields: dict[str, Any]) -> None:
    assert parse_launcher_args(text) == Policy(**fields)


@pytest.mark.parametrize(("text", "note"), NOTED)
def test_accepted_without_effect(text: str, note: str) -> None:
    policy = parse_launcher_args(text)
    assert any(line.startswith(note) for line in policy.notes), policy.notes


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistake(text: str, message: str) -> None:
    with pytest.raises(LauncherArgsError, match=message.replace("?", r"\?")):
        parse_launcher_args(text)


def test_a_mode_overrules_sizes_nodes_and_logical_cores() -> None:
    policy = parse_launcher_args("--latency-mode --ncores-per-instance 2 --node-id 1 --use-logical-core")
    assert policy == Policy(latency=True, notes=policy.notes)
    assert len(policy.notes) == 3


@pytest.mark.process  # importing torch runs ldconfig
def test_every_option_of_run_cpu_is_accepted() -> None:
    run_cpu: Any = pytest.importorskip("torch.backends.xeon.run_cpu", reason="torch is not installed")
    parser = ArgumentParser()
    run_cpu.create_args(parser)
    sample = {"--core-list": "0,1", "--log-path": "x", "--log-file-prefix": "x"}
    for action in parser._actions:
        for name in action.option_strings:
            if name in ("-h", "--help"):
                continue
            takes_value = action.nargs != 0
            text = f"{name} {sample.get(name.replace('_', '-'), '1')}" if takes_value else name
            assert isinstance(parse_launcher_args(text), Policy), name


# Source: intel_extension_for_pytorch 2.x: cpu/launch/launch.py, launcher_base.py, launcher_multi_instances.py,
# launcher_distributed.py and cpu/auto_ipex.py; a value where the option takes one.
IPEXRUN = [
    "--module",
    "--no-python",
    "--log-dir=logs",
    "--log-file-prefix=run",
    "--ncores-per-instance=4",
    "--nodes-list=0,2-3",
    "--use-e-cores",
    "--memory-allocator=auto",
    "--omp-runtime=auto",
    "--ninstances=2",
    "--instance-idx=0,1",
    "--use-logical-cores",
    "--skip-cross-node-cores",
    "--multi-task-manager=taskset",
    "--latency-mode",
    "--throughput-mode",
    "--cores-list=0-3,8",
    "--benchmark",
    "--auto-ipex",
    "--dtype=float32",
    "--auto-ipex-verbose",
    "--disable-ipex-graph-mode",
    "--nnodes=2",
    "--nprocs-per-node=2",
    "--ccl-worker-count=4",
    "--logical-cores-for-ccl",
    "--master-addr=127.0.0.1",
    "--master-port=29500",
    "--hostfile=hostfile",
    "--extra-mpi-params=-v",
    "--nproc_per_node=2",
    "--more_mpi_params=-v",
    "--ncore_per_instance=4",
    "--node_id=0",
    "--core_list=0,1",
    "--logical_core_for_ccl",
    "--enable_tcmalloc",
    "--enable_jemalloc",
    "--use_default_allocator",
    "--use_logical_core",
    "--disable_numactl",
    "--disable_taskset",
    "--disable_iomp",
    "--log_path=logs",
    "--multi_instance",
    "--distributed",
]


@pytest.mark.parametrize("text", IPEXRUN)
def test_every_option_of_ipexrun_is_accepted(text: str) -> None:
    """One that is refused would leave every worker of the server unbound."""
    assert isinstance(parse_launcher_args(text), Policy)


def test_the_reference_names_every_option() -> None:
    rows = list(option_reference())
    assert len(rows) == len(OPTIONS)
    assert ("--reserve-cores N", "keep N cores free of workers", "0") in rows
    assert all(meaning for _, meaning, _ in rows)


@pytest.mark.process
def test_parsing_imports_nothing_heavy(checkout: Path) -> None:
    """It runs at every worker start."""
    program = (
        "import sys; from ts_plugin.planning.policy import parse_launcher_args; before = set(sys.modules);"
        "parse_launcher_args('--node-id 0 --ncores-per-instance 4'); print(set(sys.modules) - before,"
        "{'argparse', 'shlex', 'difflib', 'json', 'pathlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-S", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=checkout)
    assert result.stdout.split() == ["set()", "set()"]
