"""The promises of elastic width, in simulation, with the product's own decisions: a few well chosen cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checks.simulation import Model, Result, Scenario, broken, catalogue, main, simulate

REQUESTS = 4000


def scenario(group: str, load: str, requests: int = REQUESTS) -> Scenario:
    return next(one for name, at, one in catalogue(requests) if (name, at) == (group, load))


@pytest.mark.parametrize(
    ("group", "load", "most"),
    [
        pytest.param("8 x 4, f = 0.03", "0.1", 0.5, id="8 slices, nearly idle"),
        pytest.param("8 x 4, f = 0.03", "0.3", 0.5, id="8 slices"),
        pytest.param("28 x 1, f = 0.01", "0.3", 0.5, id="28 slices"),
        pytest.param("uneven 9 to 1, 8 x 4", "0.3", 0.6, id="uneven"),
        pytest.param("2 x 1, f = 0.05", "0.3", 0.7, id="2 slices"),
        pytest.param("ResNet-50 beside ResNet-18, 2 x 1", "0.3", 0.7, id="two models"),
        pytest.param("unequal slices 7 5 4 4 2 2", "0.3", 0.7, id="unequal slices"),
        pytest.param("8 x 4, f = 0.03", "0.7", 1.02, id="much load"),
        pytest.param("8 x 4, f = 0.03", "0.98", 1.02, id="nearly full"),
        pytest.param("4 x 14, f = 0.05", "0.3", 1.02, id="scales badly"),
        pytest.param("4 x 14, f = 0.05", "0.5", 1.02, id="scales badly, half full"),
        pytest.param("8 x 4, f = 1.0", "0.1", 1.02, id="gains nothing"),
        pytest.param("8 x 4, f = 1.0", "0.7", 1.02, id="gains nothing, busy"),
        pytest.param("bursts, 8 x 4", "0.5", 1.02, id="bursts"),
        pytest.param("half as fast midway", "0.7", 1.02, id="speed changes"),
        pytest.param("error 0.2, 8 x 4", "0.5", 1.02, id="measured badly"),
    ],
)
def test_promises(group: str, load: str, most: float) -> None:
    alone, elastic = simulate(scenario(group, load))
    assert elastic.all.mean <= most * alone.all.mean
    assert not broken(alone, elastic, float(load))


@pytest.mark.parametrize("load", ["0.3", "0.7"])
def test_short_requests_beside_long_ones(load: str) -> None:
    alone, elastic = simulate(scenario("50 ms beside 2 s, 4 + 4 x 1", load))
    assert elastic.models[0].p99 <= 1.3 * alone.models[0].p99


@pytest.mark.parametrize(
    ("clients", "throughput"),
    [pytest.param(1, 1.9, id="one at a time"), pytest.param(2, 0.98, id="two"), pytest.param(8, 0.98, id="full")],
)
def test_clients_that_wait_for_their_answers(clients: int, throughput: float) -> None:
    model = Model(0.11, 0.02, (1, 1), clients=clients)
    alone, elastic = simulate(Scenario("", (model,), requests=REQUESTS))
    assert elastic.all.throughput >= throughput * alone.all.throughput


def test_a_saturated_model_beside_an_idle_one_gets_nearly_the_whole_domain() -> None:
    hot, idle = Model(0.11, 0.0, (1,), clients=2), Model(0.11, 0.0, (1,))
    alone, elastic = simulate(Scenario("", (hot, idle), requests=REQUESTS))
    assert elastic.models[0].throughput >= 1.9 * alone.models[0].throughput


def test_slices_alone_is_what_queueing_theory_says() -> None:
    """M/D/1 at load 0.5: the mean wait is half a service time."""
    model = Model(0.1, 0.0, (1,), rate=5.0, noise=1e-6)
    alone, _ = simulate(Scenario("", (model,), requests=20_000))
    assert alone.all.mean == pytest.approx(0.15, rel=0.05)


def test_a_borrower_that_outstays_the_patience_of_an_owner_loses_its_slice() -> None:
    """Every twentieth request or so takes 100 times as long as the mean: no owner waits for one of these."""
    model = Model(0.05, 0.0, (1,) * 4, rate=10.0, noise=3.0)
    _, elastic = simulate(Scenario("", (model,), requests=REQUESTS))
    assert elastic.taken_back > 0


def test_same_seed_same_result() -> None:
    one = scenario("8 x 4, f = 0.03", "0.5", 500)
    assert simulate(one) == simulate(one)


def test_broken_promises_are_named() -> None:
    alone, elastic = simulate(scenario("8 x 4, f = 0.03", "0.1", 500))
    assert isinstance(alone, Result)
    assert broken(elastic, alone, 0.5) == [
        f"all mean x {alone.all.mean / elastic.all.mean:.2f}",
        f"all p99 x {alone.all.p99 / elastic.all.p99:.2f}",
    ]


def test_command_writes_table_and_picture(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--requests", "200", "--only", "ResNet-18"]) == 0
    lines = (tmp_path / "simulation.md").read_text().splitlines()
    assert len(lines) == 2 + 5 * 3
    assert lines[2].startswith("| ResNet-50 beside ResNet-18, 2 x 1 | 0.1 |")
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")
