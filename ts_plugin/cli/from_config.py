"""What `ts-cores plan --config FILE` plans: the workers that a server with this config.properties would start."""

from __future__ import annotations

import os
from pathlib import Path

from ts_plugin.cli.arguments import PlannedModel
from ts_plugin.config.file import read_config
from ts_plugin.config.properties import refused
from ts_plugin.config.served import default_workers, describe, java_cpus, read_store, startup
from ts_plugin.doctor.inspection import count_gpus, java_options
from ts_plugin.errors import InputError
from ts_plugin.machine.topology import Allowance
from ts_plugin.machine.words import count
from ts_plugin.planning.planner import MOST_WORKERS


def config_models(path: Path, allowance: Allowance, *, here: bool) -> tuple[list[PlannedModel], list[str], str]:
    """Return the models, notes on where their numbers of workers come from, and the file's cpu_launcher_args.

    ``here``: it is this machine, whose GPUs and variables for Java count too.

    Raises:
        InputError: the server would not start, or no worker would.
        OSError: the file or its model store cannot be read.
    """
    config = read_config(path, os.environ)
    options = java_options(os.environ if here else {}, config)
    cpus, gpus = java_cpus(len(allowance.cpus), allowance.quota, options), count_gpus(os.environ) if here else 0
    start = startup(config, read_store(config), cpus=cpus, gpus=gpus)
    reasons = [*config.errors, *(fault.what for fault in (*refused(config.properties), *start.refusals))]
    if reasons:
        raise InputError(f"{path}: no server starts with it: {reasons[0]}; `ts-cores doctor --config {path}` says more")
    started = (served for served in start.served if served.workers > 0)
    models = [PlannedModel(served.model, served.workers, served.cores, served.share) for served in started]
    notes = list(describe(start.served))
    if not config.get("load_models") and "model_snapshot" not in config.properties:
        workers, source = default_workers(config.properties, cpus, gpus)
        models = [PlannedModel("", workers)] if workers > 0 else []
        notes = [f"the file loads no model: {count(workers, 'worker')} of one ({source})"]
    total = sum(model.workers for model in models)
    if not 0 < total <= MOST_WORKERS:
        what = f"it starts {total}, and a plan takes at most {MOST_WORKERS} workers" if total else "no worker starts"
        raise InputError(f"{path}: {what}; correct default_workers_per_model, load_models or models")
    return models, notes, config.get("cpu_launcher_args")
