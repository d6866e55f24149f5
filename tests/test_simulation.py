"""What lending promises, in simulation, with what the product's own workers learn: a few well chosen cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.checks import simulation
from benchmarks.checks.simulation import MORE, Model, catalogue, main, run

pytestmark = pytest.mark.no_cover
REQUESTS = 3000


@pytest.mark.parametrize(
    ("group", "column", "most"),
    [
        pytest.param("8 x 4", "0.3", 0.4, id="8 slices"),
        pytest.param("28 x 1", "0.3", 0.2, id="28 slices: who has little gets its share"),
        pytest.param("2 x 1", "0.3", 0.8, id="2 slices"),
        pytest.param("8 x 4", "0.98", MORE, id="nearly full"),
        pytest.param("2 x 1", "1 client", 0.7, id="one at a time"),
        pytest.param("8 x 4", "4 per slice", MORE, id="full"),
        pytest.param("8 x 4, nine of ten on one half", "0.7", 0.5, id="uneven"),
        pytest.param("slices of 7, 5, 4, 4, 2, 2", "0.3", 0.5, id="unequal slices"),
        pytest.param("8 x 4, bursts", "0.5", MORE, id="bursts"),
        pytest.param("8 x 4, serial part 1.2", "0.3", MORE, id="slower on more cores"),
        pytest.param("12 x 1, four gain nothing", "0.5", MORE, id="beside a model that gains nothing"),
        pytest.param("8 x 1, 50 ms and 2 s", "0.5", MORE, id="short requests beside long ones"),
    ],
)
def test_never_worse_than_slices_alone(group: str, column: str, most: float) -> None:
    models = next(models for *name, models in catalogue() if name == [group, column])
    for alone, lending in run(models, REQUESTS):
        assert lending.mean <= most * alone.mean
        assert lending.p99 <= MORE * alone.p99


def test_its_numbers_are_those_of_the_product(checkout: Path) -> None:
    source = (checkout / "ts_plugin/lending/regions.c").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"^#define (\w+) (\d+)\b", source, re.MULTILINE)}
    assert numbers["PAUSE_PART"] == simulation.PAUSE_PART
    for name in ("GRACE", "SHORT_PAUSE", "ASK_FROM"):  # in regions.c in nanoseconds
        assert getattr(simulation, name) * 1e9 == pytest.approx(numbers[name]), name


def test_slices_alone_is_what_queueing_theory_says() -> None:
    """M/D/1 at load 0.5: the mean wait is half a service time."""
    ((alone, _),) = run([Model(0.1, 0.0, (1,), load=0.5, noise=1e-6)], 10_000)
    assert alone.mean == pytest.approx(0.15, rel=0.05)


def test_a_lone_client_is_served_by_all_slices() -> None:
    ((alone, lending),) = run([Model(0.1, 0.2, (1,) * 8, clients=1, noise=1e-6)], 1000)
    assert alone.mean == pytest.approx(0.1)
    assert lending.mean == pytest.approx(0.1 * (0.2 + 0.8 / 8))


def test_command_writes_a_table_and_fails_where_lending_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", str(tmp_path), "--requests", "300", "--only", "44 ms"]
    assert main(arguments) == 0
    lines = (tmp_path / "simulation.md").read_text().splitlines()
    assert lines[2] == "| slices x cores | 0.05 | 0.1 | 0.3 | 0.5 | 0.7 | 0.9 | 0.98 |"
    assert lines[4].startswith("| 2 x 1, 110 and 44 ms: model 1 | 0.")
    monkeypatch.setattr(simulation, "REGION", 0.1)
    assert main(arguments) == 1
    assert "**" in (tmp_path / "simulation.md").read_text()
