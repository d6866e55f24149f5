"""The pictures in docs/ that the code draws. `python -m tests.pictures` makes them anew; test_docs compares them."""

from __future__ import annotations

from pathlib import Path

from tests.machines import machine
from ts_plugin.cli.arguments import PlannedModel
from ts_plugin.cli.main import uneven
from ts_plugin.compare.comparison import Comparison
from ts_plugin.compare.picture import picture
from ts_plugin.planning.planner import Demand, plan
from ts_plugin.planning.policy import Policy
from ts_plugin.view.svg import svg
from ts_plugin.view.view import of_plan

DOCS = Path(__file__).parent.parent / "docs"


def pictures() -> dict[Path, str]:
    """Return every file and what it should hold."""
    topology = machine(packages=2, cores=28, smt=2)
    planned = plan(topology, [Demand(topology.online)] * 3)
    notes = (*planned.notes, *uneven([PlannedModel("", 3)] * 3, Policy(), planned))
    drawn = {DOCS / "core-map.svg": svg(of_plan(topology, planned, topology.online, notes))}
    for file in (DOCS / "comparisons").glob("*.json"):
        drawn[file.with_suffix(".svg")] = picture(Comparison.from_json(file.read_text(encoding="utf-8")))
    return drawn


if __name__ == "__main__":
    for file, text in pictures().items():
        file.write_text(text, encoding="utf-8")
