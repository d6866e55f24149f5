"""Would the server start, and with how many workers? Each answer beside that of TorchServe's own frontend, a JVM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hatch_build
from ts_plugin.config.file import default_config, parse_config, read_config
from ts_plugin.config.properties import KNOWN, VARIABLES, refused
from ts_plugin.config.served import default_workers, java_cpus, read_store, startup
from ts_plugin.doctor.inspection import java_options, unusable
from ts_plugin.errors import InputError
from ts_plugin.machine import discovery, process

# What lies in the model store: the content of model-config.yaml by archive, None for an archive without one.
ARCHIVES: Mapping[str, str | None] = {
    "a": None,
    "b": "minWorkers: 3\nmaxWorkers: 4\n",
    "only_min": "minWorkers: 3\n",
    "swapped": "minWorkers: 3\nmaxWorkers: 2\n",
    "text": "minWorkers: '3'\nmaxWorkers: '4'\n",
    "zero": "minWorkers: 0\nmaxWorkers: 1\n",
    "octal": "minWorkers: 010\nmaxWorkers: 20\n",
    "float": "minWorkers: 2.0\nmaxWorkers: 2\n",
    "queue": "jobQueueSize: 5\n",
    "batch": "batchSize: 5\n",
    "empty": "",
    "list": "- minWorkers\n",
    "scalar": "hello\n",
    "number_key": "1: 2\n",
    "no_yaml": "a: [\n",
}
PORTS = ("inference_address", "management_address", "metrics_address", "grpc_inference_port", "grpc_management_port")


def models(settings: str) -> str:
    """A file that loads a.mar, with ``settings`` for it."""
    return f"load_models=a.mar\nmodels={{'a':{{'1.0':{{{settings}}}}}}}"


def snapshot(**changes: Any) -> str:
    """A file with a snapshot of a.mar as TorchServe writes it, but for ``changes``; ... takes a key out."""
    settings = {"defaultVersion": True, "marName": "a.mar", "minWorkers": 3, "maxWorkers": 3, "batchSize": 1}
    settings |= {"maxBatchDelay": 100, "responseTimeout": 120, "startupTimeout": 120, "runtimeType": "python"}
    outer: dict[str, Any] = {"name": "x.cfg", "modelCount": 1, "created": 1}
    outer |= {key: changes.pop(key) for key in list(changes) if key in outer}
    kept = {key: value for key, value in (settings | changes).items() if value is not ...}
    return f"model_snapshot={json.dumps(outer | {'models': {'a': {'1.0': kept}}})}"


INTEGERS = [
    "number_of_netty_threads=4 ",
    "number_of_netty_threads=-1",
    "number_of_netty_threads=0",
    "netty_client_threads=x",
    "netty_client_threads=-1",
    "job_queue_size=100 # deep",
    "job_queue_size=100 # deep\nload_models=a.mar",
    "job_queue_size=0",
    "job_queue_size=0\nload_models=a.mar",
    "job_queue_size=0\nload_models=queue.mar",
    "job_queue_size=x\nload_models=queue.mar",
    "default_workers_per_model=",
    "default_workers_per_model= 3\nload_models=a.mar",
    "default_workers_per_model=+3\nload_models=a.mar",
    "default_workers_per_model=03\nload_models=a.mar",
    "default_workers_per_model=\\u0663\nload_models=a.mar",
    "default_workers_per_model=1_0",
    "default_workers_per_model=99999999999",
    "default_workers_per_model=-1",
    "default_workers_per_model=-1\nload_models=a.mar",
    "default_workers_per_model=0\nload_models=a.mar",
    "default_workers_per_model=x\ndebug=true\nload_models=a.mar,b.mar",
    "number_of_gpu=x",
    "number_of_gpu=0x1",
    "number_of_gpu=-1",
    "number_of_gpu=-1\nload_models=a.mar\ndefault_workers_per_model=0",
    "max_request_size=-1",
    "max_request_size=0",
    "max_request_size=10MB",
    "max_request_size=2147483648",
    "max_request_size=2147483647",
    "max_response_size=10MB",
    "unregister_model_timeout=x",
    "default_response_timeout=x",
    "default_response_timeout=x\nload_models=a.mar",
    "default_startup_timeout=x\nload_models=absent.mar",
    "initial_worker_port=x",
    "initial_worker_port=-5",
    "initial_distribution_port=",
    "io_ratio=0",
    "io_ratio=0\nuse_native_io=false",
    "metric_time_interval=0",
    "metric_time_interval=0\ndisable_system_metrics=false",
    "metric_time_interval=x\ndisable_system_metrics=false",
    "grpc_inference_port=http://127.0.0.1:7070",
    "grpc_inference_port=65536",
    "grpc_inference_port=-1",
    "grpc_inference_port=+0",
    "grpc_inference_max_connection_age_ms=0",
    "grpc_inference_max_connection_age_ms=9999999999",
    "grpc_inference_max_connection_age_ms=99999999999999999999",
    "grpc_management_max_connection_age_grace_ms=0",
    "grpc_management_max_connection_age_grace_ms=-1",
    "token_expiration_min=x\ndisable_token_authorization=false",
    "token_expiration_min=1e300\ndisable_token_authorization=false",
    "token_expiration_min=1e300",
]
ADDRESSES = [
    "inference_address=",
    "inference_address=0.0.0.0:PORT",
    "inference_address=http://127.0.0.2:PORT",
    "inference_address=HTTP://127.0.0.1:PORT",
    "inference_address=http://localhost:PORT",
    "inference_address=http://127.0.0.1:0",
    "inference_address=http://127.0.0.1:PORT ",
    "inference_address=http://127.0.0.1:PORT/",
    "inference_address=http://127.0.0.1:65535",
    "inference_address=http://127.0.0.1:99999999999",
    "inference_address=http://127.0.0.1 ",
    "inference_address=http://[::1]:PORT",
    "inference_address=http://*:PORT",
    "inference_address=http://no-such-host.invalid:PORT",
    "inference_address=http://192.0.2.1:PORT",
    "inference_address=http://a..b:PORT",
    f"inference_address=http://{'a' * 64}.invalid:PORT",
    "inference_address=unix:x.sock",
    "inference_address=unix:/nonexistent/x.sock",
    "inference_address=unix:/tmp/x.sock\nuse_native_io=false",
    "inference_address=http://127.0.0.1:PORT\nmanagement_address=http://127.0.0.1:PORT",
    "inference_address=http://localhost:PORT\nmanagement_address=http://127.0.0.1:PORT",
    "inference_address=http://127.0.0.1:PORT\nmanagement_address=https://127.0.0.1:PORT",
    "inference_address=https://127.0.0.1:PORT\nmanagement_address=http://127.0.0.1:PORT",
    "inference_address=http://127.0.0.1:PORT\nmanagement_address=https://127.0.0.1:PORT\nkeystore=/none",
    "inference_address=http://127.0.0.1:PORT\nmetrics_address=http://127.0.0.1:PORT",
    "inference_address=http://127.0.0.1:PORT\nmetrics_address=http://127.0.0.1:PORT\nenable_metrics_api=false",
    "inference_address=http://127.0.0.1:PORT\ngrpc_inference_port=PORT",
    "metrics_address=nonsense\nenable_metrics_api=false",
    "metrics_address=https://127.0.0.1:PORT\nenable_metrics_api=false",
    "inference_address=https://127.0.0.1:PORT",
    "inference_address=https://127.0.0.1:PORT\nkeystore=/none",
    "inference_address=https://127.0.0.1:PORT\nprivate_key_file=/none\ncertificate_file=/none",
    "inference_address=https://127.0.0.1:PORT\nprivate_key_file=/none",
    "keystore=/none",
    "enable_grpc_ssl=true",
    "enable_grpc_ssl=true\ncertificate_file=/none\nprivate_key_file=/none",
    "grpc_inference_address=",
    "grpc_inference_address=127.1",
    "grpc_inference_address=http://127.0.0.1",
    "grpc_inference_address=no-such-host.invalid",
    "grpc_inference_address=a..b",
    "grpc_inference_address=192.0.2.1",
    "grpc_management_address=127.0.0.1 ",
]
JSON = [
    "models={",
    "models=",
    "models=\nload_models=a.mar",
    "models=null\nload_models=a.mar",
    "models=true",
    "models='a'",
    "models=[]",
    "models=[['a',{}]]",
    "models={'a':{}} x",
    "models={} // x",
    "models=/* x */ {}",
    "models={'a':{},}",
    "models={'a':{},'a':{}}",
    "models={'a':{'1.0':{},'1.0':{}}}",
    "models={'a':5}",
    "models={'a':{'minWorkers':1}}",
    "models={'a':{'1.0':null}}",
    "models={'a':{'1.0':[]}}",
    "models={'a':null}\nload_models=a.mar",
    "models={'a':null}\nload_models=b.mar",
    "models={a:{1.0:{minWorkers:1}}}\nload_models=a.mar",
    "models={'a'='b'}",
    "models={a=>{1.0={minWorkers=>1;maxWorkers:1}}}\nload_models=a.mar",
    "models={'a':{'2.0':{'minWorkers':'two'}}}\nload_models=a.mar",
    "models={'b':{'1.0':{'minWorkers':9}}}\nload_models=b.mar",
    models("'minWorkers':'two'"),
    models("'minWorkers':'5'"),
    models("'minWorkers':' 5'"),
    models("'minWorkers':007"),
    models("'minWorkers':2.7"),
    models("'minWorkers':1e1"),
    models("'minWorkers':1."),
    models("'minWorkers':true"),
    models("'minWorkers':null"),
    models("'minWorkers':{}"),
    models("'minWorkers':[4]"),
    models("'minWorkers':[4,5]"),
    models("'minWorkers':[]"),
    models("'minWorkers':0"),
    models("'minWorkers':-3"),
    models("'minWorkers':1,'minWorkers':4"),
    models("'minWorkers':1,'maxWorkers':8"),
    models("'maxWorkers':8"),
    models("'minWorkers':1,'x':[1,,2,]"),
    models("'minWorkers':5") + "\ndebug=true",
    models("'batchSize':'two'"),
    models("'maxBatchDelay':'two'"),
    models("'responseTimeout':null"),
    models("'marName':'elsewhere.mar'"),
    models("'runtimeType':'ruby'"),
    models("'runtimeType':null"),
    models("'runtimeType':['python']"),
    "models={'b':{'1.0':{'responseTimeout':'two'}}}\nload_models=b.mar",
    "models={'b':{'1.0':{'batchSize':'two'}}}\nload_models=b.mar",
    "models={'batch':{'1.0':{'batchSize':'two'}}}\nload_models=batch.mar",
    "models={'b':{'1.0':{'maxWorkers':'two'}}}\nload_models=b.mar",
    "models={'none':{'1.0':{'minWorkers':'two'}}}\nload_models=a.mar",
]
SNAPSHOTS = [
    snapshot(),
    snapshot(maxBatchDelay=...),
    snapshot(minWorkers=...),
    snapshot(batchSize=...),
    snapshot(responseTimeout=..., startupTimeout=..., runtimeType=...),
    snapshot(responseTimeout=None),
    snapshot(defaultVersion=...),
    snapshot(defaultVersion=None),
    snapshot(defaultVersion="yes"),
    snapshot(marName=...),
    snapshot(marName=5),
    snapshot(marName="absent.mar"),
    snapshot(marName="empty.mar"),
    snapshot(marName="b.mar"),
    snapshot(minWorkers="two"),
    snapshot(minWorkers="4"),
    snapshot(minWorkers=0),
    snapshot(minWorkers=-1),
    snapshot(minWorkers=-1, maxWorkers=-1),
    snapshot(minWorkers=None),
    snapshot(runtimeType="ruby"),
    snapshot(parallelLevel="x"),
    snapshot(modelCount=0),
    snapshot(modelCount=0, marName="absent.mar"),
    snapshot(modelCount="1"),
    snapshot(modelCount=1.5),
    snapshot(modelCount=None),
    snapshot(created="x"),
    snapshot(name={}),
    snapshot(name=None),
    snapshot() + "\nload_models=b.mar",
    snapshot() + "\njob_queue_size=0",
    snapshot() + "\ndefault_response_timeout=x",
    snapshot() + "\ndefault_workers_per_model=x",
    "model_snapshot=",
    "model_snapshot={}",
    "model_snapshot={'models':{}}",
    "model_snapshot={'models':{'a':null}}",
    "model_snapshot=20261128-snapshot.cfg",
    "model_snapshot={'modelCount':2,'models':{'a':{'1.0':{'marName':'a.mar'",
]
OTHERS = [
    "",
    "load_models=a.mar",
    "load_models=a.mar,b.mar",
    "load_models=a.mar, b.mar",
    "load_models=x=a.mar,y=a.mar",
    "load_models==a.mar,",
    "load_models=a.mar,a.mar",
    "load_models=absent.mar",
    "load_models=/elsewhere/b.mar",
    "load_models=../a.mar",
    "load_models=none.mar",
    "load_models=no_archive.txt",
    "load_models=directory",
    "load_models=all",
    "load_models=ALL ",
    *(f"load_models={name}.mar" for name in ARCHIVES),
    "blacklist_env_vars=(",
    "blacklist_env_vars=*a",
    "blacklist_env_vars=.*PASS(?<x>a)\\\\p{Alpha}",
    "allowed_urls=(",
    "allowed_urls=(\nload_models=a.mar",
    "allowed_urls=.*,(\nload_models=a.mar",
    "allowed_urls=file://x\nload_models=a.mar",
    "x=$$NO_SUCH_VARIABLE$$",
    "x=$$HOME$$",
    "x=\\u12",
    "metrics_mode=promethues",
    "metrics_config=/none",
    "workflow_store=/none",
    "cpu_launcher_enable=true ",
    "enable_metrics_api=no\nmetrics_address=http://127.0.0.1:PORT\ninference_address=http://127.0.0.1:PORT",
]
FILES = tuple(dict.fromkeys(INTEGERS + ADDRESSES + JSON + SNAPSHOTS + OTHERS))


@dataclass(frozen=True, slots=True)
class Jvm:
    """TorchServe's frontend, to be asked; ``store`` is its model store, ``common`` what every file has."""

    directory: Path
    store: Path
    common: Mapping[str, str]

    def ask(self, *words: object, cwd: Path | None = None, without: Sequence[str] = ()) -> list[str]:
        """Run the probe, which writes its logs into the current directory; ``without`` is a command that starts it."""
        home = hatch_build.find_model_server().parents[2]
        path = f"{self.directory}:{hatch_build.find_model_server()}"
        options = [f"-Djava.io.tmpdir={self.directory}", f"-Dmodel_server_home={home}", "-Xmx512m", "-cp", path]
        command = [*without, "java", *options, "StartProbe", *map(str, words)]
        done = subprocess.run(
            command,
            cwd=cwd or self.directory,
            capture_output=True,
            text=True,
            check=True,
            timeout=500,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def jvm(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Jvm:
    directory, store = tmp_path_factory.mktemp("jvm"), tmp_path_factory.mktemp("store")
    path, sources = hatch_build.find_model_server(), ("StartProbe", "WorkerLifeCycle")
    files = [str(checkout / "tests" / f"{name}.java") for name in sources]
    command = [hatch_build.find_javac(), "-proc:none", "-nowarn", "-cp", str(path), "-d", str(directory), *files]
    subprocess.run(command, check=True, capture_output=True)
    for name, content in ARCHIVES.items():
        write_archive(store / f"{name}.mar", name, content)
    (store / "none.mar").write_bytes(b"")
    (store / "no_archive.txt").write_text("nothing")
    (store / "directory" / "MAR-INF").mkdir(parents=True)
    manifest = {"runtime": "python", "model": {"modelName": "from_directory", "modelVersion": "7", "handler": "h.py"}}
    (store / "directory" / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    free = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    common = {name: str(port) if name.endswith("port") else f"http://127.0.0.1:{port}" for name, port in free.items()}
    common |= {"disable_token_authorization": "true", "disable_system_metrics": "true"}
    common |= {"default_workers_per_model": "2", "model_store": str(store)}
    return Jvm(directory, store, common)


def write_archive(path: Path, name: str, config: str | None) -> None:
    model = {"modelName": name, "modelVersion": "1.0", "handler": "h.py"}
    with zipfile.ZipFile(path, "w") as parts:
        if config is not None:
            model["configFile"] = "model-config.yaml"
            parts.writestr("model-config.yaml", config)
        parts.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="module")
def answers(jvm: Jvm) -> dict[str, tuple[Path, str]]:
    """By text: the file that has it, and what the JVM says of the file."""
    files = []
    for number, text in enumerate(FILES):
        own = {line.partition("=")[0] for line in text.splitlines()}
        lines = [f"{name}={value}" for name, value in jvm.common.items() if name not in own]
        port = jvm.common["inference_address"].rpartition(":")[2]
        files.append(jvm.directory / f"{number}.properties")
        files[-1].write_text("\n".join([*lines, text.replace("PORT", port), ""]))
    said = jvm.ask(jvm.store, *files)
    assert len(said) == len(FILES)
    return dict(zip(FILES, zip(files, said, strict=True), strict=True))


def reasons(file: Path, jvm: Jvm) -> Iterator[str]:
    config = read_config(file, dict(os.environ))
    yield from config.errors
    yield from (one.what for one in refused(config.properties))
    yield from (one.what for one in startup(config, read_store(config), cpus=2).refusals)
    yield from unusable(config.properties).values()


@pytest.mark.process
def test_every_verdict_is_the_jvms(answers: dict[str, tuple[Path, str]], jvm: Jvm) -> None:
    assert len(answers) >= 200
    wrong = []
    for text, (file, said) in answers.items():
        found = list(reasons(file, jvm))
        if bool(found) != said.startswith("no "):
            wrong.append((text, said, found))
    assert wrong == []
    assert sum(said.startswith("no ") for _, said in answers.values()) >= 100, "and not because the probe is broken"


@pytest.mark.process
def test_the_number_of_workers_is_the_jvms(answers: dict[str, tuple[Path, str]]) -> None:
    allowance = discovery.read_allowance()
    cpus = java_cpus(len(allowance.cpus), allowance.quota, java_options(os.environ, None))
    wrong, started = [], 0
    for text, (file, said) in answers.items():
        if said.startswith("ok"):
            config = read_config(file, dict(os.environ))
            served = startup(config, read_store(config), cpus=cpus).served
            ours = sorted(f"{one.model}:{one.version}={one.workers}" for one in served)
            started += len(ours)
            if ours != sorted(said.split()[1:]):
                wrong.append((text, said, ours))
    assert wrong == []
    assert started >= 40


OLD, NEW = "logs/config/20261127170405123-startup.cfg", "logs/config/20261128170405123-shutdown.cfg"


@pytest.mark.process
@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        pytest.param([], {}, None, id="nothing"),
        pytest.param(["config.properties"], {}, "config.properties", id="no snapshot"),
        pytest.param(["config.properties", NEW, OLD], {}, NEW, id="the newest snapshot"),
        pytest.param(["config.properties", "logs/config/x/y"], {}, "config.properties", id="a directory"),
        pytest.param(["logs/config/mine.properties"], {}, "logs/config/mine.properties", id="one file of any name"),
        pytest.param([NEW, "logs/config/mine.properties"], {}, InputError, id="a file among snapshots"),
        pytest.param([NEW, "l/config/1.cfg"], {"LOG_LOCATION": "l"}, "l/config/1.cfg", id="logs elsewhere"),
        pytest.param([NEW, "other"], {"TS_CONFIG_FILE": "other"}, "other", id="named by a variable"),
        pytest.param([NEW, "config.properties"], {"TS_CONFIG_FILE": ""}, None, id="named empty"),
    ],
)
def test_the_file_that_nobody_names_is_the_jvms(
    files: list[str],
    environment: dict[str, str],
    expected: str | type[Exception] | None,
    jvm: Jvm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("LOG_LOCATION", "TS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    said = jvm.ask(jvm.store, cwd=tmp_path)[-1]
    if isinstance(expected, type):
        assert said.startswith("no java.lang.NullPointerException")
        with pytest.raises(expected, match=r"mine\.properties"):
            default_config()
        return
    assert said == (expected or "none")
    assert default_config() == (Path(expected) if expected else None)


PRIVILEGED = ["inference_address=http://127.0.0.1", "management_address=http://127.0.0.1:81", "grpc_inference_port=82"]


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0 or process.first_open_port() <= 82, reason="needs root, and ports of its own")
def test_a_port_of_the_privileged_keeps_the_server_from_starting(jvm: Jvm) -> None:
    """The JVM and we, both without the right to it; and then with it, as CI's root has."""
    files = []
    for number, text in enumerate(PRIVILEGED):
        own = text.partition("=")[0]
        lines = [f"{name}={value}" for name, value in jvm.common.items() if name != own]
        files.append(jvm.directory / f"privileged{number}.properties")
        files[-1].write_text("\n".join([*lines, text]))
    drop = ["setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service"]
    code = (
        "import sys; from ts_plugin.doctor.inspection import unusable; print(unusable(dict([sys.argv[1].split('=')])))"
    )
    for text, said in zip(PRIVILEGED, jvm.ask(jvm.store, *files, without=drop), strict=True):
        assert said.startswith("no "), text
        done = subprocess.run([*drop, sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
        name, port = text.partition("=")[0], {"i": 80, "m": 81, "g": 82}[text[0]]
        assert f"{name!r}: 'user 0 may not listen on port {port}; take one from " in done.stdout
        assert unusable(dict([text.split("=")])) == {}
    assert [said[:2] for said in jvm.ask(jvm.store, *files)] == ["ok"] * len(files)


@pytest.mark.process
def test_every_property_and_every_variable_is_known(jvm: Jvm) -> None:
    constants = dict(line.split(" ", 1) for line in jvm.ask())
    assert {name: value for name, value in constants.items() if name.startswith("TS_")} == VARIABLES
    others = ["ENABLE_ENVVARS_CONFIG", "IO_RATIO", "METRIC_TIME_INTERVAL", "MODEL_CONFIG", "MODEL_SNAPSHOT"]
    others += ["PYTHON_EXECUTABLE", "SYSTEM_METRICS_CMD", "USE_ENV_ALLOWED_URLS", "USE_NATIVE_IO", "VERSION"]
    without = {constants[name] for name in others}
    assert {*VARIABLES.values(), *without, "tsConfigFile", "plugins_path", "vmargs"} == KNOWN


def test_a_port_on_all_addresses_is_taken_on_each() -> None:
    """Not asked of the JVM: no test listens beyond this machine."""
    both = {"inference_address": "http://0.0.0.0:8085", "management_address": "http://127.0.0.1:8085"}
    (found,) = refused(both)
    assert found.what == "management_address wants port 8085, which inference_address has"


@pytest.mark.parametrize(
    ("cpus", "quota", "options", "expected"),
    [
        pytest.param(8, None, "", 8, id="no quota"),
        pytest.param(8, 2.5, "-Xmx1g", 3, id="a quota, rounded up"),
        pytest.param(2, 6.0, "", 2, id="a quota above the CPUs"),
        pytest.param(8, 0.2, "", 1, id="part of a CPU"),
        pytest.param(8, 2.0, "-XX:-UseContainerSupport", 8, id="a JVM that does not look at it"),
        pytest.param(8, 2.0, "-XX:-UseContainerSupport -XX:+UseContainerSupport", 2, id="the last counts"),
        pytest.param(8, 2.0, "-Xmx1g -XX:ActiveProcessorCount=5", 5, id="a number of its own"),
    ],
)
def test_the_cpus_that_the_jvm_counts(cpus: int, quota: float | None, options: str, expected: int) -> None:
    assert java_cpus(cpus, quota, options) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", (6, "one per CPU"), id="nothing said"),
        pytest.param("default_workers_per_model=3", (3, "default_workers_per_model"), id="the property"),
        pytest.param("default_workers_per_model=3\ndebug=true", (1, "debug=true"), id="debug goes before it"),
        pytest.param("number_of_gpu=0", (6, "one per CPU"), id="GPUs left out"),
    ],
)
def test_default_workers(text: str, expected: tuple[int, str]) -> None:
    properties = parse_config(Path("x"), text.encode(), {}).properties
    assert default_workers(properties, cpus=6, gpus=0) == expected
    if not text:
        assert default_workers(properties, cpus=6, gpus=2) == (2, "one per GPU")
