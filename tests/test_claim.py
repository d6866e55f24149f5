"""What a worker claims with: what its archive says, which worker it is, which CPUs it was meant to have."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ts_plugin.machine import discovery
from ts_plugin.machine.topology import Allowance
from ts_plugin.worker.archive import Wishes, read_archive
from ts_plugin.worker.start import own_limit, worker_id


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An extracted archive whose manifest names a config file."""
    (tmp_path / "MAR-INF").mkdir()
    model = {"modelName": "resnet", "modelVersion": "2.0", "configFile": "model-config.yaml"}
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "cores", "share"),
    [
        pytest.param("cpu: {cores: 4}\n", 4, 1.0, id="a number of cores"),
        pytest.param("cpu:\n  share: 2\n", None, 2.0, id="a share"),
        pytest.param("cpu: {cores: 4, share: 0.5}\n", 4, 0.5, id="both"),
        pytest.param("batchSize: 4\n", None, 1.0, id="nothing of ours"),
        pytest.param("cpu: {profile: {1: 0.09, 2: 0.055}}\n", None, 1.0, id="a profile"),
        pytest.param("cpu:\n", None, 1.0, id="an empty section"),
        pytest.param("", None, 1.0, id="an empty file"),
        pytest.param("cpu : {cores: 4}\n", 4, 1.0, id="a blank before the colon"),
        pytest.param('{"minWorkers": 1, "cpu": {"cores": 4}}', 4, 1.0, id="JSON"),
        pytest.param("'cpu'  : {cores: 4}\n", 4, 1.0, id="quotes"),
        pytest.param("? cpu\n: {cores: 4}\n", 4, 1.0, id="a key in a line of its own"),
    ],
)
def test_wishes_of_an_archive(archive: Path, config: str, cores: int | None, share: float) -> None:
    (archive / "model-config.yaml").write_text(config)
    assert read_archive(str(archive)) == Wishes("resnet", "2.0", cores, share)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        pytest.param("cpu: {corse: 4}\n", "cpu: has no 'corse'", id="a typo"),
        pytest.param("cpu: {profile: {1: fast}}\n", "cpu.profile must be seconds by cores", id="no seconds"),
        pytest.param("cpu: {cores: 0}\n", "cpu.cores must be a whole number of at least 1, not 0", id="no cores"),
        pytest.param("cpu: {cores: true}\n", "not True", id="a boolean is no number"),
        pytest.param("cpu: {cores: 2.5}\n", "not 2.5", id="part of a core"),
        pytest.param("cpu: {share: -1}\n", "cpu.share must be a number above 0, not -1", id="a negative share"),
        pytest.param("cpu: {share: .inf}\n", "not inf", id="everything"),
        pytest.param("cpu: {share: .nan}\n", "not nan", id="no number at all"),
        pytest.param("cpu: 4\n", "cpu: must be a section such as {cores: 4} or {share: 2}, not 4", id="no section"),
        pytest.param("cpu: four\n", "not 'four'", id="a word"),
        pytest.param("cpu: {1: 4}\n", "cpu: has no '1'", id="a number for a key"),
        pytest.param("cpu: {cores: [\n", "model-config.yaml", id="not YAML"),
        pytest.param("- cpu:\n", "the file must hold keys, not a list", id="a list"),
        pytest.param(None, "No such file", id="no file"),
    ],
)
def test_wrong_wishes_become_a_note_and_an_equal_share(archive: Path, config: str | None, complaint: str) -> None:
    if config is not None:
        (archive / "model-config.yaml").write_text(config)
    found = read_archive(str(archive))
    assert (found.model, found.cores, found.share) == ("resnet", None, 1.0)
    (note,) = found.notes
    assert complaint in note
    assert note.endswith("; the section has no effect")


@pytest.mark.parametrize("config", ["deviceType: cpu\n", '{"deviceType": "cpu", "cpus": 4}', "# cpu and gpu\na: 1\n"])
def test_yaml_is_not_imported_for_an_archive_without_the_section(
    archive: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would cost each start of a worker 20 ms."""
    (archive / "model-config.yaml").write_text(config)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert read_archive(str(archive)).notes == ()


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"model": {}}', '{"model": null}'])
def test_an_unreadable_manifest_is_a_guess_and_a_note(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "MAR-INF").mkdir()
    if manifest is not None:
        (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(manifest)
    found = read_archive(str(tmp_path))
    assert (found.model, found.version, found.cores, found.share) == (tmp_path.name, "1.0", None, 1.0)
    assert "the model's name is a guess" in found.notes[0]


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    """An extracted workflow archive, as a worker of its functions finds it."""
    (tmp_path / "WAR-INF").mkdir()
    manifest = {"workflow": {"workflowName": "pair", "specFile": "spec.yaml", "handler": "functions.py"}}
    (tmp_path / "WAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.mark.parametrize(
    ("section", "cores", "share"),
    [
        pytest.param("", 0, 1.0, id="nothing"),
        pytest.param("cpu:\n", 0, 1.0, id="an empty section"),
        pytest.param("cpu: {}\n", 0, 1.0, id="an empty mapping"),
        pytest.param("cpu: {cores: 2}\n", 2, 1.0, id="a number of cores"),
        pytest.param("cpu: {share: 0.5}\n", None, 0.5, id="a share"),
    ],
)
def test_functions_of_a_workflow_own_no_core_unless_they_ask(
    workflow: Path, section: str, cores: int | None, share: float
) -> None:
    (workflow / "spec.yaml").write_text(f"models:\n  only: {{url: a.mar}}\ndag:\n  before: [only]\n{section}")
    assert read_archive(str(workflow)) == Wishes("pair", "1.0", cores, share)


def test_a_wrong_wish_of_a_workflow_is_a_note(workflow: Path) -> None:
    (workflow / "spec.yaml").write_text("cpu: {cores: many}\n")
    found = read_archive(str(workflow))
    assert found.cores == 0
    (note,) = found.notes
    assert "cpu.cores must be a whole number of at least 1, not 'many'" in note
    assert note.endswith("; the function owns no core")


@pytest.mark.parametrize(
    ("arguments", "rank", "expected"),
    [
        pytest.param(["w.py", "--sock-type", "unix", "--sock-name", "/tmp/.ts.sock.9003"], None, "9003", id="UNIX"),
        pytest.param(["w.py", "--sock-type", "tcp", "--port", "9004"], None, "9004", id="TCP"),
        pytest.param(["w.py", "--sock-name", "/tmp/.ts.sock.9000"], "1", "9001", id="the second rank of torchrun"),
        pytest.param(["w.py", "--sock-name", "/tmp/socket.of.mine"], None, "mine", id="not TorchServe's own name"),
        pytest.param(["w.py", "--sock-name", "/tmp/.ts.sock.9000"], "first", "9000", id="a rank that is none"),
        pytest.param(["w.py"], None, "?", id="nothing"),
    ],
)
def test_worker_id(monkeypatch: pytest.MonkeyPatch, arguments: list[str], rank: str | None, expected: str) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert worker_id(arguments) == expected


ALL = Allowance(frozenset({4, 5, 6, 7}))


def test_a_mask_that_spans_the_cpuset_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "read_mask", lambda pid: frozenset({3, 4, 5, 6, 7}))
    assert own_limit(ALL) is None
    monkeypatch.setattr(discovery, "read_mask", lambda pid: frozenset({3, 4, 5}))
    assert own_limit(ALL) == frozenset({3, 4, 5}), "taskset's"


def test_one_cpu_that_openmp_left_over_is_not_taken_for_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {os.getpid(): frozenset({7}), os.getppid(): frozenset({4, 5, 6, 7})}
    monkeypatch.setattr(discovery, "read_mask", lambda pid: wide[pid])
    assert own_limit(ALL) == frozenset({7}), "one CPU may be all there is"
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert own_limit(ALL) == frozenset({7}), "no runtime has run yet"
    monkeypatch.setitem(sys.modules, "torch", os)
    assert own_limit(ALL) is None, "the parent's mask"
