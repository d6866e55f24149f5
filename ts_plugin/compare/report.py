"""A comparison for people: one sentence, a table, and what else is to know about the machine."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from ts_plugin.compare.comparison import Comparison
from ts_plugin.compare.ways import ONE, UNEVEN, Way
from ts_plugin.machine.words import count
from ts_plugin.trial.spread import Spread, figure
from ts_plugin.trial.turns import FULL

NOISE = 0.03  # a ratio whose spread comes so near to 1 says nothing
LOUD = 0.15  # of the CPUs that others used in the loudest round


def verdict(found: Comparison, model: int = 0) -> str:
    """Say in one sentence what ts-cores wins or loses with this model."""
    ours = found.spread(Way.OURS, FULL, "throughput", model)
    if ours is None:
        why = found.servers[Way.OURS].error if Way.OURS in found.servers else None
        return f"ts-cores was not measured{f': {why}' if why else ''}."
    parts = []
    most = found.ratio(Way.OURS, Way.DEFAULT, FULL, "throughput", model)
    if most is None:
        why = found.servers[Way.DEFAULT].error if Way.DEFAULT in found.servers else None
        parts.append(
            f"{figure(ours.median)} requests/s at full load, TorchServe's default none{f': {why}' if why else ''}"
        )
    else:
        parts.append(f"{most.text()} x the throughput of TorchServe's default at full load")
    alone = found.ratio(Way.OURS, Way.DEFAULT, ONE, "p50", model)
    if alone is not None:
        parts[-1] += f", {alone.text()} x its latency for one request at a time"
    beside = [
        (way, ratio)
        for way in (Way.THREADS, Way.LAUNCHER)
        if (ratio := found.ratio(Way.OURS, way, FULL, "throughput", model)) is not None
    ]
    if ours.number == 1:
        parts += [f"{ratio.text()} x the throughput of {way}" for way, ratio in beside]
        parts.append("measured once, so that the noise is not known")
    else:
        same = [way for way, ratio in beside if _noise(ratio)]
        if same:
            parts.append(f"at full load within noise of {' and of '.join(same)}")
        parts += [f"{ratio.text()} x the throughput of {way}" for way, ratio in beside if not _noise(ratio)]
    return f"ts-cores: {'; '.join(parts)}."


def _noise(ratio: Spread) -> bool:
    return ratio.low <= 1 + NOISE and ratio.high >= 1 - NOISE


def notes(found: Comparison, model: int = 0) -> Iterator[str]:
    """Yield what restricts the sentence: who could not keep up or run, lost requests, how busy the machine was."""
    for way in found.ways:
        if error := found.servers[way].error:
            yield f"{way} could not run: {error}"
        for load in found.loads:
            if load.share and found.saturated(way, load.name, model):
                yield f"{way} cannot keep up with {figure(found.rate(load.name, model) or 0)} requests/s, {load.name}."
                break
        if failed := found.failed(way, model=model):
            yield f"{way}: {failed} requests failed."
    cpus = found.machine.get("measured_cpus") or 1
    if (busy := found.elsewhere) and max(busy.high, found.busy_before) > LOUD * cpus:
        yield (
            f"Others used {figure(busy.median)} of the {cpus} CPUs meanwhile, {figure(busy.high)} at most: on a quiet "
            "machine the figures are others."
        )
    if found.interrupted:
        yield "Interrupted: this is what had been measured until then."


def table(found: Comparison, model: int = 0) -> Table:
    """Draw all ways and loads: medians, lowest and highest."""
    title = f"{found.models[model]}, {count(found.settings['workers'][model], 'worker')}"
    result = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, header_style="dim")
    loads = [load for load in found.loads if found.measured(load.name) and _meant(found, load.name, model)]
    for head in ("", *(_head(found, load.name, model) for load in loads), "start s", "MiB"):
        result.add_column(head, justify="right" if head else "left")
    for way in found.ways:
        server = found.servers[way]
        cells = [_cell(found, way, load.name, model) for load in loads]
        ready = "" if server.ready_seconds is None else figure(server.ready_seconds)
        memory = "" if server.memory_mib is None else str(server.memory_mib)
        result.add_row(way, *cells, ready, memory, style="bold" if way is Way.OURS else "")
    return result


def _meant(found: Comparison, load: str, model: int) -> bool:
    """Tell whether the model got requests under this load."""
    return any(turn.samples[model].rate or turn.samples[model].throughput for turn in found.rounds if turn.load == load)


def _head(found: Comparison, load: str, model: int) -> str:
    if load in (FULL, UNEVEN):
        return f"{load}:\nrequests/s"
    if load == ONE:
        return f"{load}:\np50 / p99 ms"
    return f"{figure(found.rate(load, model) or 0)}/s, {load}:\nmean / p99 ms"


def _cell(found: Comparison, way: Way, load: str, model: int) -> str:
    if found.servers[way].error:
        return "could not run"
    if load in (FULL, UNEVEN):
        value = found.spread(way, load, "throughput", model)
        return value.text() if value else ""
    middle, late = (found.spread(way, load, name, model) for name in ("p50" if load == ONE else "mean", "p99"))
    if found.saturated(way, load, model):
        return "cannot keep up"
    return f"{middle.text(1000)} / {figure(1000 * late.median)}" if middle and late else ""


def machine(found: Comparison) -> str:
    """Return the machine in one line."""
    about = found.machine
    parts = [
        about["cpu_model"],
        f"{about['packages']} package(s), {about['numa_nodes']} NUMA node(s), {about['l3_domains']} L3 domain(s), "
        f"{about['cores']} cores, {about['cpus']} CPUs",
        f"measured on CPUs {about['cpuset']}",
        *([f"CFS quota {about['quota']:g} CPUs"] if about["quota"] else []),
        f"Linux {about['kernel']}{' in a virtual machine' if about['virtual_machine'] else ''}",
        *(f"{name} {version}" for name, version in about["versions"].items() if version),
    ]
    return "; ".join(parts)
