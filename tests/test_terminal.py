"""What the terminal shows beyond the picture: findings, and the letters that stand for colours."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from tests.leases import slice_of
from tests.machines import machine
from ts_plugin.doctor.finding import Finding, Severity, report
from ts_plugin.machine.cpulist import format_cpulist
from ts_plugin.planning.planner import Demand, Plan, plan
from ts_plugin.view.terminal import Map
from ts_plugin.view.view import of_plan


def text(shown: RenderableType, width: int = 100) -> str:
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(shown)
    return file.getvalue()


def test_a_small_machine() -> None:
    topology = machine(packages=2, cores=2, smt=2)
    picture = of_plan(topology, plan(topology, [Demand(topology.online)] * 2), topology.online, ())
    lines = [line.rstrip() for line in text(Map(picture)).splitlines()]
    assert lines[:7] == [
        "ts-cores plan  2 workers on 4 of 4 cores",
        "╭─ package 0 · NUMA node 0 · 64 GiB ─╮",
        "│  A 0 4   A 1 5                     │",
        "╰────────────────────────────────────╯",
        "╭─ package 1 · NUMA node 1 · 64 GiB ─╮",
        "│  B 2 6   B 3 7                     │",
        "╰────────────────────────────────────╯",
    ]


def test_a_large_machine_has_a_letter_per_core() -> None:
    topology = machine(packages=2, l3=8, cores=8)
    picture = of_plan(topology, plan(topology, [Demand(topology.online)] * 2), topology.online, ())
    lines = text(Map(picture)).splitlines()
    assert "AAAAAAAA  0-7" in lines[2]
    assert "BBBBBBBB  120-127" in lines[-8]


def test_cpus_of_a_worker_are_never_cut() -> None:
    topology = machine(packages=2, cores=18, smt=2)
    odd = tuple(cpu for cpu in range(36) if cpu % 3)
    slices = slice_of(range(0, 36, 2)), slice_of(odd)
    shown = text(Map(of_plan(topology, Plan(slices, frozenset(), frozenset(), ()), topology.online, ())), width=60)
    assert "…" not in shown
    rows = [line[15:38].strip() for line in shown.splitlines()]
    first = rows.index("0-34:2")

    assert "".join(rows[first + 1 :]) == format_cpulist(odd)


def test_marks_that_need_colour_are_explained_where_there_is_some() -> None:
    topology = machine(cores=2, smt=2)
    picture = of_plan(topology, plan(topology, [Demand(topology.online)]), topology.online, ())
    assert "dim number" not in text(Map(picture))
    file = io.StringIO()
    Console(width=100, file=file, color_system="truecolor", force_terminal=True).print(Map(picture))
    assert "dim number" in file.getvalue()


def test_a_note_on_a_worker_makes_no_column_wide() -> None:
    topology = machine(cores=2)
    picture = of_plan(topology, plan(topology, [Demand(topology.online)]), topology.online, ())
    picture = replace(picture, workers=(replace(picture.workers[0], notes=("a word " * 40,)),))
    lines = text(Map(picture), width=600).splitlines()
    assert max(len(line) for line in lines if "note on A" not in line) < 80


def test_report() -> None:
    findings = (
        Finding(Severity.ERROR, "java", "no java", "the frontend needs it", "apt-get install java"),
        Finding(Severity.NOTE, "machine", "2 cores", change="never shown"),
    )
    shown = text(report(findings))
    assert "✗ java    no java" in shown
    assert "→ apt-get install java" in shown
    assert "· machine 2 cores" in shown
    assert "never shown" not in shown
    assert shown.rstrip().endswith("1 error, 0 warnings")
