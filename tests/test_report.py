"""What tune says and what it writes."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import javaproperties
import pytest
import yaml
from rich.console import Console

from ts_plugin.errors import CommandError
from ts_plugin.tune.choose import choose
from ts_plugin.tune.report import advice, picture, sentence, table, to_json
from ts_plugin.tune.settings import Lines, lines, write
from ts_plugin.tune.values import DEFAULT, NOW, Advice, Cell, Choice, Confirmed, Profile, Result, Target

CELLS = tuple(
    Cell(threads, batch, instances, 0.1 * (0.2 + 0.8 / threads) * (0.2 + 0.8 * batch), 0.01, 30)
    for threads, counts in ((1, (1, 2)), (2, (1,)))
    for batch in (1, 2, 4)
    for instances in counts
)
PROFILE = Profile("m.mar", 2, 2, 400_000_000, 250_000_000, 8_000_000_000, True, CELLS)
MOST = Target()
BEST = Choice(2, 1, 4, 50, 23.5, 16.5, 0.62, 650_000_000)


def answer(target: Target = MOST, **changes: object) -> Result:
    choices = tuple(choose(PROFILE, target))
    rows = (
        Confirmed(str(choices[0]), choices[0], 22.0, 0.5, 0.2, 0.6, 0),
        Confirmed(DEFAULT, None, 11.0, 0.25, 0.3, 1.25, 0),
        Confirmed(NOW, None, 16.0, 0.2, 0.3, math.inf, 7),
    )
    made = Result("m", "1.0", PROFILE, target, choices, choices[0], rows[0], rows)
    return replace(made, **changes)  # type: ignore[arg-type]


def shown(answer: Result) -> str:
    file = io.StringIO()
    Console(width=140, file=file, color_system=None).print(table(answer))
    return file.getvalue()


def test_the_name_of_a_choice() -> None:
    assert str(BEST) == "2 workers x 1 core, batch 4"
    assert str(replace(BEST, workers=1, threads=2, batch=1)) == "1 worker x 2 cores, batch 1"


def test_the_table() -> None:
    tip = Advice("optimize_for_inference", 10.0, 11.8, "call it in initialize()")
    rows = [line.split() for line in shown(answer(advice=(tip,))).splitlines()]
    assert ["2", "workers", "x", "1", "core,", "batch", "4", "22", "0.5", "200", "600", "0", "650"] in rows
    assert ["what", "runs", "now", "16", "0.2", "300", "endless", "7"] in rows
    (told,) = advice(answer(advice=(tip,)))
    assert told.startswith("optimize_for_inference gains 18% (10 -> 11.8 requests/s, ")
    assert told.endswith(": call it in initialize()")


def test_the_names_stand_in_one_line_where_the_terminal_is_narrow() -> None:
    file = io.StringIO()
    Console(width=60, file=file, color_system=None).print(table(answer()))
    assert "2 workers x 1 core, batch 4" in file.getvalue()


@pytest.mark.parametrize(
    ("target", "throughput", "p99", "better"),
    [
        pytest.param(Target(), 23.0, 0.6, True, id="more throughput"),
        pytest.param(Target(), 22.1, 0.1, False, id="as much"),
        pytest.param(Target(p99=0.7), 30.0, 0.8, False, id="more, but too late"),
        pytest.param(Target(rate=5), 20.0, 0.1, True, id="earlier"),
        pytest.param(Target(rate=15), 16.0, 0.1, False, id="earlier, but the rate is too high"),
    ],
)
def test_what_runs_now_may_be_better(target: Target, throughput: float, p99: float, better: bool) -> None:
    given = answer(target)
    others = tuple(row for row in given.confirmed if row.choice is not None)
    now = Confirmed(NOW, None, throughput, 0.1, p99 / 2, p99, 0)
    assert (replace(given, confirmed=(*others, now)).better is now) == better


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(
            answer(),
            ["2 workers x 1 core, batch 4 serves most: 22 requests/s", "2 times TorchServe's default (11)"],
            id="most",
        ),
        pytest.param(answer(Target(p99=0.7)), ["within 700 ms", "within 600 ms"], id="within a limit"),
        pytest.param(
            answer(Target(p99=0.5)), ["Nothing holds 500 ms", "comes nearest", "600 ms"], id="measured slower"
        ),
        pytest.param(answer(Target(rate=5)), ["is fastest: ", "TorchServe's default takes 1250 ms"], id="a rate"),
        pytest.param(
            answer(Target(rate=500)),
            ["500 requests/s are more than this machine serves", "of which 15.4 (70%)"],
            id="too high a rate",
        ),
        pytest.param(answer(confirmed=()), ["would have", "1 worker x 2 cores"], id="no default: the other division"),
    ],
)
def test_the_sentence(given: Result, words: list[str]) -> None:
    said = sentence(given)
    assert said.count(". ") == 0
    assert said.endswith(".")
    for word in words:
        assert word in said


def test_what_the_choice_wins_is_formed_within_a_repetition() -> None:
    own, default, _ = answer().confirmed
    rows = replace(own, throughputs=(22.0, 30.0, 99.0)), replace(default, throughputs=(11.0, 10.0))
    assert "that is 2.5 (2–3) times TorchServe's default" in sentence(answer(measured=rows[0], confirmed=rows))


def test_the_latency_that_the_most_throughput_costs_is_said() -> None:
    own, default, now = answer().confirmed
    other = replace(own, name="1 worker x 2 cores, batch 1", throughput=20.0, p99=0.4)
    assert "costs latency" not in sentence(answer())
    told = sentence(answer(confirmed=(own, replace(other, choice=None), default, now)))
    assert "; it costs latency: 1 worker x 2 cores, batch 1 takes 400 ms, and serves 20 requests/s." in told
    assert "costs latency" not in sentence(answer(confirmed=(own, replace(other, p99=0.59))))
    assert "costs latency" not in sentence(answer(confirmed=(own, replace(other, failed=1))))
    assert "costs latency" not in sentence(answer(Target(p99=0.7), confirmed=(own, other)))


def test_the_target_is_met_by_what_was_measured() -> None:
    target = Target(p99=0.61)
    assert answer(target).met
    slow = replace(answer(target).confirmed[0], p99=0.62)
    assert not answer(target, measured=slow).met
    assert not answer(Target(rate=15.5)).met  # 0.7 of 22
    assert answer(Target(rate=15.3)).met


@pytest.mark.process
@pytest.mark.parametrize("name", ["tuned.png", "tuned.svg"])
def test_the_picture(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    assert picture(tmp_path / name, answer()) == f"picture: {tmp_path / name}"
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_what_saturates_is_left_out_of_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hopeless = answer(Target(rate=500))
    assert math.isinf(hopeless.choice.p99)
    picture(tmp_path / "tuned.png", hopeless)
    assert (tmp_path / "tuned.png").exists()


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in picture(tmp_path / "tuned.png", answer())
    assert not list(tmp_path.iterdir())


def test_the_lines() -> None:
    made = lines([answer()])
    assert made.properties["cpu_launcher_enable"] == "true"
    assert made.properties["cpu_launcher_args"] == "--ncores-per-instance 1"
    settings = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 50}
    assert json.loads(made.properties["models"]) == {"m": {"1.0": {"marName": "m.mar"} | settings}}
    assert yaml.safe_load(made.archives["m.mar"]) == settings | {"cpu": {"cores": 1}}


def test_a_batch_of_one_has_no_delay() -> None:
    single = answer()
    single = replace(single, choice=next(one for one in single.choices if one.batch == 1))
    assert "maxBatchDelay" not in lines([single]).properties["models"]
    assert "maxBatchDelay" not in lines([single]).archives["m.mar"]


def test_the_lines_keep_what_is_there() -> None:
    present = {
        "cpu_launcher_args": "--reserve-cores 1 --ncores_per_instance 4,2 --memory bind",
        "models": json.dumps(
            {"other": {"1.0": {"batchSize": 3}}, "m": {"1.0": {"batchSize": 1, "responseTimeout": 9}}}
        ),
    }
    made = lines([answer()], present).properties
    assert made["cpu_launcher_args"] == "--reserve-cores 1 --memory bind --ncores-per-instance 1"
    models = json.loads(made["models"])
    assert models["other"] == {"1.0": {"batchSize": 3}}
    assert models["m"]["1.0"]["responseTimeout"] == 9
    assert models["m"]["1.0"]["batchSize"] == 4
    assert lines([answer()], made).properties == made


def test_cores_of_several_models_are_their_archives() -> None:
    other = replace(answer(), name="n", profile=replace(PROFILE, archive="n.mar"))
    made = lines([answer(), other])
    assert "cpu_launcher_args" not in made.properties
    assert set(json.loads(made.properties["models"])) == {"m", "n"}
    assert {yaml.safe_load(text)["cpu"]["cores"] for text in made.archives.values()} == {1}


@pytest.mark.parametrize(
    ("models", "others"),
    [
        pytest.param("", {}, id="empty"),
        pytest.param("{'m': null}", {}, id="null"),
        pytest.param(
            "{ /* ours */ 'n': {1.0: {batchSize: 3, 'x': '4', y: [1.5, true]}}}",
            {"n": {"1.0": {"batchSize": 3, "x": "4", "y": [1.5, True]}}},
            id="quotes are single or left out",
        ),
    ],
)
def test_models_are_read_as_torchserve_reads_them(models: str, others: dict[str, Any]) -> None:
    made = json.loads(lines([answer()], {"models": models}).properties["models"])
    assert made.pop("m")["1.0"]["batchSize"] == 4
    assert made == others


@pytest.mark.parametrize("models", ["{", "[1]", '{"m": 3}', '{"m": {"1.0": 3}}'])
def test_models_that_are_no_object_are_an_error(models: str) -> None:
    with pytest.raises(ValueError, match="models: not the JSON that TorchServe reads"):
        lines([answer()], {"models": models})


OLD = """# ours, since 2021: \xe9\r
cpu_launcher_enable = false\r
\r
models={\\\r
  "other": {}}\r
! the end\r
job_queue_size:100"""


def test_only_the_lines_that_are_set_change(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_bytes(OLD.encode("latin-1"))
    file.chmod(0o640)
    values = {"cpu_launcher_enable": "true", "models": json.dumps({"\N{SNOWMAN}": {}}), "new": "1"}
    kept = write(file, Lines(values, {}))
    assert kept == tmp_path / "config.properties.before-tune"
    assert kept.read_bytes() == OLD.encode("latin-1")
    assert file.stat().st_mode & 0o777 == 0o640
    text = file.read_bytes().decode("latin-1").split("\r\n")
    assert text[:3] == ["# ours, since 2021: \xe9", "cpu_launcher_enable=true", ""]
    assert text[4:] == ["! the end", "job_queue_size:100", "new=1", ""]
    assert javaproperties.loads(file.read_bytes()) == values | {"job_queue_size": "100"}
    assert sorted(tmp_path.iterdir()) == [file, kept]


def test_no_old_file_is_ever_lost(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    assert write(file, Lines({"a": "0"}, {})) is None
    for number in (1, 2, 3):
        write(file, Lines({"a": str(number)}, {}))
    assert write(file, Lines({"a": "3"}, {})) is None  # nothing to change, nothing to keep
    found = {one.name: one.read_text() for one in tmp_path.iterdir()}
    name = "config.properties"
    assert found == {
        name: "a=3\n",
        f"{name}.before-tune": "a=0\n",
        f"{name}.before-tune-2": "a=1\n",
        f"{name}.before-tune-3": "a=2\n",
    }


def test_an_old_file_is_kept_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(old: Path, new: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "config.properties"
    file.write_text("a=1\n")
    kept = write(file, Lines({"a": "2"}, {}))
    assert kept is not None
    assert (kept.read_text(), file.read_text()) == ("a=1\n", "a=2\n")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file = tmp_path / "real" / "config.properties"
    file.write_text("a=1\n")
    link = tmp_path / "config.properties"
    link.symlink_to(file)
    assert write(link, Lines({"a": "2"}, {})) == tmp_path / "real" / "config.properties.before-tune"
    assert link.is_symlink()
    assert file.read_text() == "a=2\n"


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_text("a=1\n")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, old[1]))
    try:
        with pytest.raises(CommandError, match=r"config\.properties: not written, it is as it was: File too large"):
            write(file, Lines({"b": "x" * 100}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert file.read_text() == "a=1\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="not written, it is as it was: No such file or directory"):
        write(tmp_path / "none" / "config.properties", Lines({"a": "1"}, {}))


def test_json_for_scripts() -> None:
    given = answer(Target(rate=500), confirmed=())
    told = json.loads(to_json([given], lines([given])))
    (model,) = told["models"]
    assert (model["model"], model["met"], model["archive"]) == ("m", False, "m.mar")
    assert model["choice"]["p99"] is None  # endless
    assert model["sentence"] == sentence(given)
    assert json.loads(told["lines"]["properties"]["models"])["m"]["1.0"]["minWorkers"] == 2


@pytest.mark.process
def test_the_picture_shows_every_division_that_leaves_no_core_idle(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    wide = replace(PROFILE, cores=16, node_cores=8, cells=tuple(one for one in CELLS if one.instances == 1))
    cells = *wide.cells, *(replace(one, threads=8, seconds=0.3 * one.seconds) for one in CELLS if one.threads == 2)
    choices = tuple(choose(replace(wide, cells=cells), Target()))
    picture(tmp_path / "tuned.svg", answer(choices=choices, choice=choices[0], confirmed=()))
    drawn = (tmp_path / "tuned.svg").read_text()
    shown = [
        one
        for one in ("16 x 1", "15 x 1", "8 x 2", "5 x 3", "4 x 4", "3 x 5", "2 x 8", "2 x 7", "1 x 8")
        if one in drawn
    ]
    assert shown == ["16 x 1", "8 x 2", "5 x 3", "4 x 4", "3 x 5", "2 x 8"]
