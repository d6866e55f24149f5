"""A worker that could not be bound tries again; no trouble with its slice keeps a model from loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ts_plugin.ledger.codec import LEASE_VARIABLE
from ts_plugin.ledger.unbound import UNBOUND_VARIABLE
from ts_plugin.worker.launcher import INSIDE

pytestmark = pytest.mark.process

ONE_CORE_LATER = """
import json, os, sys, threading, types
from pathlib import Path
import torch
from tests.eventually import eventually
from ts.service import Service
from ts_plugin.ledger.file import Ledger
from ts_plugin.worker import follower, late

class Metrics:
    request_ids = None
    def add_time(self, *arguments):
        pass

torch.set_num_threads(7)
late.PAUSE = 0.05
late.begin(worker="9000", archive=sys.argv[1], hooked=False, reason="no space")
seen, taken = [], Path(os.environ["TS_CORES_STATE_DIR"])

def handler(data, context):
    if not seen:  # a request under way when the slice comes
        taken.unlink()
        assert eventually(lambda: late._current._follower is not None)
    seen.append(torch.get_num_threads())
    return ["1"]

service = Service("small", "/", None, handler, None, 1, metrics_cache=Metrics())
service.set_cl_socket(None)
BATCH = [{"requestId": b"a", "parameters": []}]
assert eventually(lambda: late._current._reason != "no space")
for _ in range(3):
    service.predict(BATCH)
(lease,) = Ledger().read().leases
print(json.dumps({
    "threads": seen,
    "lease": [lease.pid == os.getpid(), lease.model],
    "masks": [sorted(os.sched_getaffinity(int(tid))) for tid in os.listdir("/proc/self/task")],
    "cpus": list(lease.slice.cpus),
    "requests": late._current._follower.requests._open,
}))
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An extracted archive of a model that wants one core."""
    (tmp_path / "MAR-INF").mkdir()
    manifest = {"model": {"modelName": "a name in the manifest", "configFile": "config.yaml"}}
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (tmp_path / "config.yaml").write_text("cpu: {cores: 1}\n")
    return tmp_path


def run(*command: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, "PYTHONPATH": os.getcwd(), "TS_CORES_STATE_DIR": str(state), **environment}
    done = subprocess.run(
        [sys.executable, *command], env=told, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_worker_is_bound_when_the_state_directory_can_be_used_again(archive: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.touch()
    done = run("-c", ONE_CORE_LATER, str(archive), state=state)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["threads"][1:] == [1, 1], "from the next request on"
    assert facts["lease"] == [True, "small"], "TorchServe's name of the model, which it said before"
    assert facts["masks"] == [facts["cpus"]] * len(facts["masks"])
    assert facts["requests"] == 0, "the request that began before has no end for the follower"
    assert done.stderr.count("serves UNBOUND") == 1, "not once for every attempt"
    assert "worker 9000 of" in done.stdout


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        pytest.param(LEASE_VARIABLE, "no lease", id="bound, but nothing to follow"),
        pytest.param(UNBOUND_VARIABLE, "no space", id="not bound"),
    ],
)
def test_the_worker_runs_whatever_its_environment_says(tmp_path: Path, variable: str, value: str) -> None:
    script = tmp_path / "model_service_worker.py"
    script.write_text("import sys; print('serving', *sys.argv[1:])")
    (tmp_path / "torch.py").write_text("class Tensor: pass\n")  # all that TorchServe's own modules use of it
    environment = {variable: value, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = run(INSIDE, str(script), "--sock-name", "/tmp/.ts.sock.9000", state=tmp_path / "state", **environment)
    assert "serving --sock-name /tmp/.ts.sock.9000" in done.stdout
    assert ("will not follow its slice" in done.stderr) is (variable == LEASE_VARIABLE)


WITHOUT_AFFINITY = """
import os
del os.sched_getaffinity  # as on macOS
from ts_plugin.worker.start import start
print(start(worker="9000", archive="/"))
"""


def test_a_system_without_affinity_masks_serves_unbound(tmp_path: Path) -> None:
    done = run("-c", WITHOUT_AFFINITY, state=tmp_path / "state")
    assert "lease=None" in done.stdout
    assert "worker 9000 serves UNBOUND: module 'os' has no attribute 'sched_getaffinity'" in done.stderr


VANISHED = """
import sys, types
base = sys.modules["ts.torch_handler.base_handler"] = types.ModuleType("base_handler")
base.BaseHandler = object  # all that our handlers take from there; the real one takes seconds to import torch
from ts_plugin.handlers import CoreSliceMixin
from ts_plugin.ledger.directory import LedgerError
from ts_plugin.worker import follower

class Stock:
    def initialize(self, context):
        print("loaded")

class Handler(CoreSliceMixin, Stock):
    pass

def hold():
    raise LedgerError("/dev/shm/ts-cores-0: No such file or directory")

follower._current = types.SimpleNamespace(requests=types.SimpleNamespace(hold=hold))
Handler().initialize(None)
"""


def test_a_model_loads_although_the_state_directory_has_vanished(tmp_path: Path) -> None:
    done = run("-c", VANISHED, state=tmp_path / "state")
    assert "loaded" in done.stdout
    assert "/dev/shm/ts-cores-0: No such file or directory" in done.stderr
