"""A process that claims a slice as a worker does, without TorchServe around it: for tests of leases.

Every line that it reads applies the slice's threads as a request would; each is answered with a JSON line of facts.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from ts_plugin.leases import claim
from ts_plugin.leases.claim import Archive
from ts_plugin.leases.ledger import Ledger
from ts_plugin.planning.planner import PlanError
from ts_plugin.worker import follower


def facts(own: follower.Follower) -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "mask": sorted(os.sched_getaffinity(0)),
        "cpus": list(own.lease.slice.cpus),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
    }


def main() -> None:
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    ledger = Ledger()
    archive = Archive(options.get("model", "model"), "1.0", options.get("cores"), options.get("share", 1.0))
    try:
        lease = claim.claim(ledger, archive=archive, worker=options.get("worker", "9000"))
    except (OSError, PlanError, claim.CannotBind) as error:
        print(json.dumps({"pid": os.getpid(), "error": str(error)}), flush=True)
        return
    for _ in range(options.get("extra_threads", 0)):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    own = follower.Follower(ledger, lease)  # not attach(): that needs TorchServe, and would import torch 64 times
    own.start()
    own.follow()
    print(json.dumps(facts(own)), flush=True)
    for _ in sys.stdin:
        own.follow()
        print(json.dumps(facts(own)), flush=True)


main()
