"""A process that claims a slice as a worker does, without TorchServe around it: for tests of leases.

Every line that it reads is answered with a JSON line of facts. "begin" and "end" are the boundaries of a request, and
"compute" starts some parallel regions, for which the option "torch" loads torch. Its archive says then, as one that
`ts-cores tune` has profiled, that requests take ten seconds on any number of cores. So its tiny ones borrow all that is
idle: they are faster than that. "full" and "free" let every write of this process fail as on a full disk, or succeed
again; "forbid" lets the kernel refuse every mask that this process sets from then on, as the option "forbid" does from
the start. These three, and an empty line, also load the model again: that applies the slice's threads.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from types import SimpleNamespace
from typing import Any

from tests.seccomp import forbid_affinity
from ts_plugin.ledger import coordinator
from ts_plugin.ledger.file import Ledger
from ts_plugin.planning.core_groups import PlanError
from ts_plugin.worker import follower, openmp
from ts_plugin.worker.archive import Wishes
from ts_plugin.worker.start import claim

LIMITS = {"full": 0, "free": resource.RLIM_INFINITY}  # bytes that a file may have


def tell(facts: dict[str, object]) -> None:
    """Print one line at once, so that no line of the log, which another thread writes, comes between."""
    os.write(1, f"{json.dumps(facts)}\n".encode())


def facts(own: follower.Follower) -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "mask": sorted(os.sched_getaffinity(0)),
        "cpus": list(own.lease.slice.cpus),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "computes_with": torch.get_num_threads() if (torch := sys.modules.get("torch")) else 0,
        "wide": own.requests.status.wide,
        "keeps": own.requests.status.keeps,
    }


def main() -> None:
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    ledger = Ledger()
    wishes = Wishes(options.get("model", "model"), "1.0", options.get("cores"), options.get("share", 1.0))
    if options.get("only"):
        os.sched_setaffinity(0, options["only"])
    if options.get("forbid"):
        forbid_affinity()
    if options.get("torch"):
        openmp.load()
        import torch

        ones = torch.ones(1 << 18)
    try:
        lease = claim(ledger, wishes=wishes, worker=options.get("worker", "9000"))
    except (OSError, PlanError, coordinator.CannotBind) as error:
        tell({"pid": os.getpid(), "error": str(error)})
        return
    for _ in range(options.get("extra_threads", 0)):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if not options.get("pidfd", True):
        del os.pidfd_open  # as on kernels before 5.3
    follower.INTERVAL = options.get("interval", 0.1)
    follower.LOOK_INTERVAL = options.get("look_interval", follower.LOOK_INTERVAL)
    own = follower.Follower(ledger, lease)  # not attach(): that needs TorchServe, and would import torch 64 times
    if options.get("follows", True):
        own.start()
    load(own, options)
    tell(facts(own))
    for line in sys.stdin:
        order = line.strip()
        if order == "begin":
            own.requests.on_request_start()
        elif order == "end":
            own.requests.on_request_end()
        elif order == "compute":
            for _ in range(20):
                ones.add_(1)
        else:
            if order in LIMITS:
                resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[order], resource.RLIM_INFINITY))
            elif order == "forbid":
                forbid_affinity()
            load(own, options)
        tell(facts(own))


def load(own: follower.Follower, options: dict[str, Any]) -> None:
    """Do what a worker does at its request boundaries when its model is loaded; with "loads" it still is."""
    profile = dict.fromkeys(range(1, os.cpu_count() or 1), 10.0) if options.get("torch") else None
    context = SimpleNamespace(system_properties={}, model_yaml_config={"cpu": {"profile": profile}})
    own.requests.on_load(context)
    if not options.get("loads"):
        own.requests.on_loaded()


main()
