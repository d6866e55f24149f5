"""A worker's start: what it says, and what is left when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import CHECKOUT

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv.pop(1))
from tests.seccomp import forbid_affinity
from ts_plugin.ledger.unbound import unbound_workers
from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.worker.start import start

fault = sys.argv[1]
before = sorted(os.sched_getaffinity(0))
if fault == "seccomp":
    forbid_affinity()

class Environment(dict):
    def __setitem__(self, name, value):
        if fault == "environment":
            raise OSError("no room for preparations")
        super().__setitem__(name, value)

environment = Environment(OMP_PROC_BIND="true")
lease, reason = start(worker="9000", archive=sys.argv[2], environment=environment)
state = Ledger().read()
print(json.dumps({
    "pid": os.getpid(),
    "lease": None if lease is None else list(lease.slice.cpus),
    "reason": reason,
    "mask_as_before": sorted(os.sched_getaffinity(0)) == before,
    "leases": [entry.pid for entry in state.leases],
    "unbound": {worker.pid: worker.reason for worker in unbound_workers(state)}.get(os.getpid()),
}))
"""


def run(tmp_path: Path, fault: str) -> tuple[dict[str, Any], str]:
    """Start a "worker" past the launcher, as a handler of ours would; return its facts and its log."""
    script = tmp_path / "ts" / "model_service_worker.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (tmp_path / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "small", "configFile": "config.yaml"}}
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (tmp_path / "config.yaml").write_text("cpu: {cores: 1}\n")  # less than it has: its mask must change
    done = subprocess.run(
        [sys.executable, str(script), str(CHECKOUT), fault, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "TS_CORES_STATE_DIR": str(tmp_path / "state")},
    )
    *log, facts = done.stdout.splitlines()
    return json.loads(facts), "\n".join(log) + done.stderr


@pytest.mark.process
def test_a_bound_worker_says_so_with_its_notes(tmp_path: Path) -> None:
    facts, log = run(tmp_path, "none")
    assert facts["lease"]
    assert facts["leases"] == [facts["pid"]]
    assert facts["unbound"] is None
    assert "intra-op threads" in log
    assert "(claimed by the handler)" in log
    assert "worker 9000: OMP_PROC_BIND removed" in log


@pytest.mark.process
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a mask that can be narrowed")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param("seccomp", "Operation not permitted", id="the kernel refuses the mask"),
        pytest.param("environment", "no room for preparations", id="after the claim"),
    ],
)
def test_a_start_that_fails_leaves_no_lease_and_the_mask_and_tells_the_reason(
    tmp_path: Path, fault: str, reason: str
) -> None:
    facts, log = run(tmp_path, fault)
    assert facts["lease"] is None
    assert facts["leases"] == []
    assert facts["mask_as_before"]
    assert reason in facts["reason"]
    assert facts["unbound"] == facts["reason"], "not that its handler claims nothing"
    assert f"worker 9000 serves UNBOUND: {facts['reason']}" in log


@pytest.mark.process
def test_a_ledger_that_cannot_be_used_is_a_reason_too(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a directory")
    script = "from ts_plugin.worker.start import start; print(start(worker='9', archive='/'))"
    environment = {**os.environ, "TS_CORES_STATE_DIR": str(tmp_path / "state")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "lease=None" in done.stdout
    assert f"serves UNBOUND: {tmp_path}/state" in done.stderr
