"""The packages of ts_plugin import in one direction, so that none can be understood only together with another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "ts_plugin"
# From the ground up: a package imports those before it. CONTRIBUTING.md draws the same order.
ORDER = (
    *("machine", "planning", "kernel", "ledger", "lending", "worker", "handlers"),
    *("config", "view", "frontend", "doctor", "trial", "tune", "compare", "cli"),
)


def imports(source: str) -> set[tuple[str, str]]:
    """Return (package, module) of everything in ts_plugin that a file imports, wherever in the file that stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    parts = (name.split(".") for name in names if name.startswith("ts_plugin."))
    return {(part[1], ".".join(part)) for part in parts if part[1] in ORDER}


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import ts_plugin.cli.main\nfrom ts_plugin import view\ndef f():\n    from ts_plugin.tune.measure import bare\n"
    )
    assert {package for package, _ in imports(source)} == {"cli", "view", "tune"}


def test_every_package_has_its_place() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_before_it(package: str) -> None:
    allowed = ORDER[: ORDER.index(package) + 1]
    upwards = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for imported, module in sorted(imports(path.read_text(encoding="utf-8")))
        if imported not in allowed
    ]
    assert upwards == []


def test_masks_are_set_in_one_file() -> None:
    """Those of others, and of this process for good; a measurement narrows itself before it starts what it measures."""
    setters = {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "os.sched_setaffinity(" in path.read_text("utf-8")
    }
    measure = {"trial/bare.py", "tune/command.py", "compare/command.py"}
    assert setters - measure == {"kernel/affinity.py"}


def test_the_architecture_page_names_files_and_functions_that_are_there() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{'|'.join(ORDER)})/\w+\.\w+)`(?:, `(\w+)`)?", page)
    assert len(named) > 30
    for file, name in named:
        assert name in (ROOT / file).read_text(encoding="utf-8"), (file, name)
