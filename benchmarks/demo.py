"""One photograph through TorchServe on two workers that own their cores: the whole product in a minute.

``./dev demo [--once]``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import socket
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import matplotlib
import psutil

from benchmarks.harness import CHECKOUT, archives
from benchmarks.harness.archives import Handler
from benchmarks.harness.server import TorchServe, read_properties
from ts_plugin.ledger.directory import state_directory
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.trial.client import TorchServeError
from ts_plugin.trial.properties import PORTS, free_ports

CONFIG = Path("config/config.properties")  # from the checkout
MODEL = "resnet18"
HUB_SECONDS = 5.0
TOLERANCE = 1e-3  # of a probability: another number of threads adds in another order


class DemoError(RuntimeError):
    """Something that the demonstration promises did not hold."""


def main() -> int:
    """Run the demonstration; return the exit status."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--once", action="store_true", help="stop the server afterwards instead of leaving it up")
    once = parser.parse_args().once
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped too
    try:
        demonstrate(once=once)
    except (DemoError, TorchServeError) as error:
        print(f"./dev demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped")
    return 0


def demonstrate(*, once: bool) -> None:
    """Serve the photograph, compare the answer, show who owns which cores, and stop or wait.

    Raises:
        DemoError: an answer or a binding is not what it should be.
        TorchServeError: the server did not come up or did not answer.
    """
    archive = build()
    environment = elsewhere(read_properties(CHECKOUT / CONFIG))
    moves = [f"{name}={value}" for name, value in environment.items()]
    print("$", *moves, f"torchserve --ts-config {CONFIG}", flush=True)
    server = TorchServe(
        archive,
        workers=int(read_properties(CHECKOUT / CONFIG)["default_workers_per_model"]),
        snapshot=CHECKOUT / CONFIG,
        working_directory=CHECKOUT,
        environment=environment,
        state_directory=Path(state_directory()),  # the user's own, where `ts-cores show` looks
    )
    with server:
        print(f"  {server.initial_workers} workers are READY after {server.ready_seconds:.1f} s\n")
        compare(archive, server)
        show(server)
        if not once:
            print(f"\nIt serves until Ctrl-C (or kill {os.getpid()}). In another terminal:")
            photograph = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
            print(f"  curl {server.prediction_url(MODEL)} -T {os.path.relpath(photograph)}")
            print(f"  curl {server.management_url}/cores")
            print("  .venv/bin/ts-cores show", flush=True)
            psutil.Process(server.pid).wait()
            raise DemoError("the server ended by itself; its last lines are:\n" + server.log()[-2000:])
    print("\nThe server is stopped.")


def build() -> Path:
    """Return the archive in the model store that config.properties names, built by torch-model-archiver."""
    weights = archives.fetch_weights(MODEL, timeout=HUB_SECONDS)
    made = archives.resnet(MODEL, handler=Handler.OURS, weights=weights)
    store = CHECKOUT / read_properties(CHECKOUT / CONFIG)["model_store"]
    store.mkdir(exist_ok=True)
    archive = store / made.name
    shutil.copyfile(made, archive)
    random = "random weights from a fixed seed (no model hub in reach), so its labels mean nothing"
    kind = "pretrained weights" if weights else random
    print(f"{archive.relative_to(CHECKOUT)}: ResNet-18 with handlers/image_classifier.py and {kind}")
    return archive


def elsewhere(properties: dict[str, str]) -> dict[str, str]:
    """Return the TS_* variables that move the APIs whose ports are taken; none, as a rule."""
    moved = {}
    for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True):
        value = properties[name]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", urllib.parse.urlsplit(value).port or int(value)))
            except OSError:
                moved[f"TS_{name.upper()}"] = f"http://127.0.0.1:{port}" if name.endswith("_address") else str(port)
    return moved


def compare(archive: Path, server: TorchServe) -> None:
    """Classify the photograph over HTTP and directly, print the answer.

    Raises:
        DemoError: the two answers differ.
    """
    photograph = archives.photograph()
    served: dict[str, float] = json.loads(server.predict(MODEL, photograph))
    print("A photograph of Grace Hopper shows, says the server:")
    for label, probability in served.items():
        print(f"  {probability:8.4%}  {label}")
    direct = classify(archive, photograph)
    if served.keys() != direct.keys() or any(abs(served[label] - direct[label]) > TOLERANCE for label in served):
        raise DemoError(f"the same model run directly says otherwise: {direct}")
    print("The same model run directly in Python says the same.\n")


def classify(archive: Path, photograph: bytes) -> dict[str, float]:
    """Return the five best labels and their probabilities, computed in this process."""
    import torch
    from PIL import Image
    from torchvision import models, transforms

    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    with Image.open(io.BytesIO(photograph)) as image, torch.inference_mode():
        scores = archives.load(archive)(prepare(image.convert("RGB")).unsqueeze(0)).softmax(dim=1)[0]
    best = scores.topk(5)
    names = models.get_model_weights(MODEL).DEFAULT.meta["categories"]
    return {names[index]: p for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)}


def show(server: TorchServe) -> None:
    """Print the core map that the management API gives, checked against the kernel.

    Raises:
        DemoError: a worker is not bound, or not to what the map says.
    """
    cores = server.cores()
    print(f"GET {server.management_url}/cores")
    for piece in sorted(cores["slices"], key=lambda piece: int(piece["worker_id"])):
        cpus, nodes = format_cpulist(piece["cpus"]), format_cpulist(piece["numa_nodes"])
        print(
            f"  worker {piece['worker_id']} of {piece['model']}, pid {piece['pid']}: "
            f"CPUs {cpus}, intra-op threads {piece['threads']}, NUMA nodes {nodes}"
        )
    check(cores, server)
    print("The kernel's affinity masks say the same, of every thread.")


def check(cores: dict[str, Any], server: TorchServe) -> None:
    """Hold the core map against the server's workers and the masks of all their threads.

    Raises:
        DemoError: with the first difference.
    """
    if cores["unbound"] or not cores["enabled"]:
        raise DemoError(f"workers are not bound: {json.dumps(cores)}")
    slices = {piece["pid"]: set(piece["cpus"]) for piece in cores["slices"]}
    if slices.keys() != server.workers().keys():
        raise DemoError(f"the map has the pids {sorted(slices)}, the server's workers are {sorted(server.workers())}")
    for pid, cpus in slices.items():
        for thread in os.listdir(f"/proc/{pid}/task"):
            mask = os.sched_getaffinity(int(thread))
            if mask != cpus:
                raise DemoError(f"thread {thread} of worker {pid} may run on {mask}, its slice is {cpus}")
    union = set().union(*slices.values())
    pinned = all(piece["pinned"] for piece in cores["slices"])
    if pinned and len(union) >= len(slices) and len(union) < sum(map(len, slices.values())):
        raise DemoError(f"the slices share CPUs though there are enough: {slices}")


if __name__ == "__main__":
    sys.exit(main())
