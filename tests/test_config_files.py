"""The files in config/: read by what will read them, as far as that can be had without a cluster."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from benchmarks.harness import archives
from benchmarks.harness.server import TorchServe
from tests.eventually import eventually
from tests.impatience import sitecustomize
from ts_plugin.machine.cpulist import parse_cpulist
from ts_plugin.trial.properties import Property
from ts_plugin.worker.readback import METRICS

KUBERNETES = "1.30"
MANIFESTS = sorted((Path(__file__).resolve().parent.parent / "config" / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def torchserve() -> Path:
    """The installed package, not imported: that leaves a file open, and warnings are errors here."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def only(path: Path, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def fields(*required: str, **known: Any) -> dict[str, Any]:
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


STRING, BOOLEAN, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
STRINGS = {"type": "array", "items": STRING}
MAP = {"type": "object", "additionalProperties": STRING}
POD: dict[str, Any] = {}  # whatever a pod may have there: that is Kubernetes' schema

# Source: KServe 0.21, the fields and types of ServingRuntimeSpec, PredictorSpec and ModelSpec in its Python client.
KSERVE = {
    "ServingRuntime": fields(
        "containers",
        supportedModelFormats={
            "type": "array",
            "items": fields("name", name=STRING, version=STRING, autoSelect=BOOLEAN, priority={**NUMBER, "minimum": 1}),
        },
        protocolVersions=STRINGS,
        disabled=BOOLEAN,
        multiModel=BOOLEAN,
        annotations=MAP,
        labels=MAP,
        **dict.fromkeys(["affinity", "containers", "imagePullSecrets", "nodeSelector", "tolerations", "volumes"], POD),
    ),
    "InferenceService": fields(
        "predictor",
        predictor=fields(
            "model",
            model=fields(
                "modelFormat",
                modelFormat=fields("name", name=STRING, version=STRING),
                runtime=STRING,
                runtimeVersion=STRING,
                protocolVersion=STRING,
                storageUri=STRING,
                **dict.fromkeys(["args", "env", "resources"], POD),
            ),
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            timeout=NUMBER,
            annotations=MAP,
            labels=MAP,
            **dict.fromkeys(["affinity", "nodeSelector", "tolerations"], POD),
        ),
    ),
}


def validate(document: dict[str, Any]) -> None:
    """Strictly: an unknown key is an error.

    Raises:
        jsonschema.ValidationError: the document is not what Kubernetes or KServe knows.
    """
    if not document["apiVersion"].startswith("serving.kserve.io/"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document["spec"], KSERVE[document["kind"]])
    if "containers" in document["spec"]:
        pod = {"containers": document["spec"]["containers"]}
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": pod}, KUBERNETES, strict=True
        )


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_match_the_schema(path: Path) -> None:
    for document in documents(path):
        validate(document)


@pytest.mark.parametrize(
    ("file", "kind", "keys"),
    [
        ("guaranteed", "Deployment", ("spec", "template", "spec", "containers", 0)),
        ("kserve", "ServingRuntime", ("spec",)),
        ("kserve", "ServingRuntime", ("spec", "supportedModelFormats", 0)),
        ("kserve", "ServingRuntime", ("spec", "containers", 0)),
        ("kserve", "InferenceService", ("spec", "predictor")),
        ("kserve", "InferenceService", ("spec", "predictor", "model")),
    ],
)
def test_the_schema_check_can_fail(checkout: Path, file: str, kind: str, keys: tuple[str | int, ...]) -> None:
    document = only(checkout / f"config/kubernetes/{file}.yaml", kind)
    place: Any = document
    for key in keys:
        place = place[key]
    place["resource"] = {}
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_kserve_runtime(checkout: Path) -> None:
    path = checkout / "config/kubernetes/kserve.yaml"
    runtime, service = only(path, "ServingRuntime"), only(path, "InferenceService")
    spec = runtime["spec"]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in [known["name"] for known in spec["supportedModelFormats"]]
    (container,) = spec["containers"]
    words = shlex.split(container["args"][0])
    assert container["name"] == "kserve-container"
    assert "--plugins-path" in words
    assert "/mnt/models/config/config.properties" in words


def test_quality_of_service_is_what_the_name_says(checkout: Path) -> None:
    """Source: Kubernetes, "Pod Quality of Service Classes"; the static CPU manager wants whole CPUs on top."""

    def resources(name: str) -> dict[str, Any]:
        pod = only(checkout / f"config/kubernetes/{name}.yaml", "Deployment")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        found: dict[str, Any] = container["resources"]
        return found

    own, shared = resources("guaranteed"), resources("burstable")
    assert own["requests"] == own["limits"]
    assert own["limits"]["cpu"].isdigit()
    assert shared["requests"]["cpu"] != shared["limits"]["cpu"]


@pytest.mark.parametrize("name", ["guaranteed", "burstable"])
def test_a_dead_worker_restarts_no_pod_and_the_root_is_read_only(checkout: Path, name: str) -> None:
    pod = only(checkout / f"config/kubernetes/{name}.yaml", "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert "httpGet" not in container["livenessProbe"], "/ping fails when one worker of one model is missing"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["timeoutSeconds"] > 1, "the default, which a busy server does not always keep"
    (wait,) = [int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"] if word.isdigit()]
    assert pod["terminationGracePeriodSeconds"] > wait
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in empty}
    assert writable == {"/tmp", "/home/model-server/logs"}
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] not in empty}
    claim = only(checkout / "config/kubernetes/model-store.yaml", "PersistentVolumeClaim")
    assert claims == {claim["metadata"]["name"]}


def test_variables_in_manifests_are_torchserves(checkout: Path) -> None:
    """A misspelt TS_* variable is ignored without a word: every one must be a property that its ConfigManager has."""
    with zipfile.ZipFile(torchserve() / "frontend" / "model-server.jar") as archive:
        manager = archive.read("org/pytorch/serve/util/ConfigManager.class")
    files = [*MANIFESTS, checkout / "config" / "Dockerfile"]
    names = {name for file in files for name in re.findall(r"\bTS_[A-Z_]+\b", file.read_text(encoding="utf-8"))}
    assert names >= {"TS_CPU_LAUNCHER_ENABLE", "TS_INFERENCE_ADDRESS"}
    for name in names - {"TS_CORES_STATE_DIR"}:
        assert name.encode() in manager, name


def test_metrics_file_holds_torchserves_defaults_and_ours(checkout: Path) -> None:
    ours = yaml.safe_load((checkout / "config" / "metrics.yaml").read_text(encoding="utf-8"))
    default = yaml.safe_load((torchserve() / "configs" / "metrics.yaml").read_text(encoding="utf-8"))
    assert ours["ts_metrics"] == default["ts_metrics"]
    for kind, metrics in default["model_metrics"].items():
        assert [one for one in metrics if one not in ours["model_metrics"][kind]] == []
    for name, (unit, kind) in METRICS.items():
        (found,) = [one for one in ours["model_metrics"][kind] if one["name"] == name]
        assert found == {"name": name, "unit": unit, "dimensions": ["ModelName", "WorkerName"]}


@pytest.mark.server
def test_metrics_are_visible_to_prometheus(checkout: Path, tmp_path: Path) -> None:
    """A real server in Prometheus mode, with the metrics file as it is."""
    properties: dict[str, Property] = {
        "plugins_path": checkout / "ts_plugin" / "frontend",
        "cpu_launcher_enable": True,
        "metrics_mode": "prometheus",
        "metrics_config": checkout / "config" / "metrics.yaml",
    }
    environment = sitecustomize(tmp_path, "from ts_plugin.worker import follower; follower.LOOK_INTERVAL = 0.5")
    with TorchServe(archives.facts(), workers=1, properties=properties, environment=environment) as server:
        assert eventually(lambda: server.predict("facts", b"{}") and "SliceCores{" in server.metrics())
        (piece,) = server.cores()["slices"]
        text = server.metrics()
        (value,) = re.findall(r'^SliceCores\{ModelName="facts",WorkerName="W-\S+".*\} (\S+)$', text, re.MULTILINE)
        assert float(value) == piece["threads"]
        assert "ts_inference_requests_total{" in text


def test_dashboard_asks_for_metrics_that_exist(checkout: Path) -> None:
    dashboard = json.loads((checkout / "config" / "grafana.json").read_text(encoding="utf-8"))
    metrics = yaml.safe_load((checkout / "config" / "metrics.yaml").read_text(encoding="utf-8"))
    known = {
        one["name"] for group in ("ts_metrics", "model_metrics") for kind in metrics[group].values() for one in kind
    }
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"([A-Za-z_]\w+)\{", target["expr"]))
    assert asked <= known
    assert set(METRICS) <= asked
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_systemd_unit(checkout: Path) -> None:
    """Without a running systemd: its sections, and that it starts a server in the foreground which reads its file."""
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(checkout / "config" / "torchserve.service", encoding="utf-8")
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    assert {"--foreground", "--ts-config"} <= set(service["ExecStart"].split())
    assert [Path(service[key].split()[0]).name for key in ("ExecStartPre", "ExecStart")] == ["ts-cores", "torchserve"]
    assert parse_cpulist(service["AllowedCPUs"])


def test_dockerfile_copies_and_starts_what_exists(checkout: Path) -> None:
    text = (checkout / "config" / "Dockerfile").read_text(encoding="utf-8")
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    assert entry[:4] == ["tini", "-g", "--", "torchserve"]
    assert "--foreground" in entry
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000"
    copied = " ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)).split()
    assert "ts_plugin" in copied
    assert all((checkout / name).exists() for name in copied)


@pytest.mark.server
@pytest.mark.parametrize("tokens", [True, False])
def test_the_images_health_check_tells_life_from_death(checkout: Path, tokens: bool) -> None:
    text = (checkout / "config" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    _, *words = json.loads(re.findall(r"^HEALTHCHECK .*CMD (.*)$", text, re.MULTILINE)[0])

    def healthy(port: int) -> bool:
        command = [sys.executable, *(word.replace("8080", str(port)) for word in words)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    with TorchServe(properties={"disable_token_authorization": not tokens}) as server:
        port = int(server.inference_url.rpartition(":")[2])
        assert healthy(port)
    assert not healthy(port)
