"""The documents: their code blocks run where they can, and what they name and show is what the code has and prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.leases import lease_of
from tests.machines import machine
from tests.pictures import pictures
from ts_plugin.cli.main import COMMANDS
from ts_plugin.compare.comparison import Comparison
from ts_plugin.compare.report import verdict
from ts_plugin.ledger.model import State
from ts_plugin.ledger.unbound import PAST_LAUNCHER
from ts_plugin.machine.topology import Topology
from ts_plugin.planning.planner import Demand, Plan, plan
from ts_plugin.planning.policy import OPTIONS, option_reference, parse_launcher_args
from ts_plugin.trial.properties import free_ports
from ts_plugin.view.core_map import core_map
from ts_plugin.view.view import tag
from ts_plugin.worker.environment import COLLAPSING, THREAD_COUNTS
from ts_plugin.worker.readback import METRICS

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES = [*FILES, *(DOCS.parent / name for name in ("CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"))]
BLOCK = re.compile(r"^```(\w*)[ ]?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that ``file=NAME`` behind it names, and its text."""

    language: str
    file: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    for language, info, text in BLOCK.findall(path.read_text(encoding="utf-8")):
        yield Block(language, info.removeprefix("file="), text)


@pytest.mark.server
@pytest.mark.parametrize(
    "path",
    [path for path in FILES if any(block.language == "bash" for block in blocks(path))],
    ids=lambda path: path.stem,
)
def test_commands_run(path: Path, checkout: Path, tmp_path: Path) -> None:
    """Run a document's bash blocks in order, in an empty directory with the files that its other blocks name."""
    script = ["set -euo pipefail"]
    ports = dict(zip(("8080", "8081", "8082"), free_ports(3), strict=True))
    for block in blocks(path):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            script.append(re.sub(r"(?<=127\.0\.0\.1:)808[012]", lambda match: str(ports[match[0]]), block.text))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    grpc = free_ports(2)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "TEMP": str(temporary),
        "TMPDIR": str(temporary),
        "TS_INFERENCE_ADDRESS": f"http://127.0.0.1:{ports['8080']}",
        "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{ports['8081']}",
        "TS_METRICS_ADDRESS": f"http://127.0.0.1:{ports['8082']}",
        "TS_GRPC_INFERENCE_PORT": str(grpc[0]),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc[1]),
    }
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
    finally:
        subprocess.run(["torchserve", "--stop"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_other_blocks_can_be_read(path: Path, checkout: Path) -> None:
    for block in blocks(path):
        match block.language:
            case "bash":
                continue
            case "python":
                compile(block.text, f"{path.name}: {block.file}", "exec")
            case "json":
                json.loads(block.text)
            case "yaml":
                assert isinstance(yaml.safe_load(block.text), dict)
            case "properties":
                for line in block.text.splitlines():
                    name, equals, value = line.partition("=")
                    assert equals, line
                    if name == "cpu_launcher_args":
                        parse_launcher_args(value)
            case "":  # output, and pictures in letters
                assert path.name in ("README.md", "tuning.md", "measurements.md")
            case "console":  # needs what no test has: a Docker engine, a cluster, minutes; or runs this test
                commands = re.findall(r"^\./dev \w+", (checkout / "dev").read_text(), re.MULTILINE)
                for line in block.text.splitlines():
                    assert (
                        line.startswith(("docker ", "kubectl ", "pip ", "ts-cores tune ", "ts-cores compare "))
                        or line.split("  ")[0] in commands
                    ), line
                for file in re.findall(r"config/\S+", block.text):
                    assert (checkout / file).is_file(), file
            case _:
                pytest.fail(f"a block in {block.language!r}, which nothing checks")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, anchor


def test_every_option_is_documented() -> None:
    """The table in knobs.md is what ts_plugin.planning.policy says of itself."""
    text = (DOCS / "knobs.md").read_text(encoding="utf-8")
    table = text.partition("<!-- options:")[2].partition("<!-- end -->")[0].splitlines()
    expected = ["| Option | Meaning | Default |", "|---|---|---|"]
    for names, meaning, default in option_reference():
        words = ", ".join(f"`{name}`" for name in names.split(", "))
        row = [text.replace("|", r"\|") for text in (words, meaning, default)]
        expected.append(f"| {' | '.join(row)} |")
    assert [line.rstrip() for line in table[1:]] == [line.rstrip() for line in expected]


# ---- what the documents name ------------------------------------------------------------------------------------

CODE = re.compile(r"`([^`\n]+)`")
OF_OTHERS = {  # options of torchserve, torch-model-archiver, pip, docker, systemd and PyTorch's launchers' documents
    *("--start", "--stop", "--ncs", "--ts-config", "--models", "--model-store", "--plugins-path", "--foreground"),
    *("--disable-token-auth", "--model-name", "--version", "--model-file", "--serialized-file", "--config-file"),
    *("--export-path", "--requirements-file", "--force", "--handler", "--no-deps", "--cpuset-cpus", "--cpus"),
    *("--build-arg", "--help"),
    *("--cores", "--nodes"),  # abbreviations, which are refused
}


def named(path: Path) -> list[str]:
    """Return what stands in ``path`` as code: inline, and line by line in blocks that are not output."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in blocks(path) if block.language for line in block.text.splitlines()]
    return CODE.findall(BLOCK.sub("", text)) + lines


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_options_exist(path: Path, checkout: Path) -> None:
    known = OF_OTHERS.union(*(option.names for option in OPTIONS))
    for file in (*(checkout / "ts_plugin").rglob("*.py"), *(checkout / "benchmarks").rglob("*.py")):
        known |= set(re.findall(r"\(\s*\"(--[a-z0-9-]+)\"", file.read_text(encoding="utf-8")))
    for code in named(path):
        words = {word.replace("_", "-") for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", code)}
        assert words <= known, code


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_commands_and_files_exist(path: Path, checkout: Path) -> None:
    development = set(re.findall(r"^\./dev (\w+)", (checkout / "dev").read_text(), re.MULTILINE))
    for code in named(path):
        assert set(re.findall(r"(?<![\w/.=-])ts-cores ([a-z][a-z-]*)", code)) <= COMMANDS.keys(), code
        assert set(re.findall(r"\./dev (\w+)", code)) <= development, code
        for file in re.findall(r"(?<![\w/.])((?:config|docs|ts_plugin|handlers|benchmarks)/[\w./-]*\w)", code):
            assert (checkout / file).exists(), file


def test_environment_variables_exist(checkout: Path) -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((checkout / "ts_plugin").rglob("*.py")))
    section = (DOCS / "knobs.md").read_text(encoding="utf-8").partition("## Environment")[2]
    names = set(re.findall(r"`([A-Z][A-Z_]+)`", section))
    assert {*COLLAPSING, *THREAD_COUNTS, "TS_CORES_STATE_DIR"} <= names
    for path in FILES:
        names |= set(re.findall(r"TS_CORES_\w+", path.read_text(encoding="utf-8")))
    assert not [name for name in names if f'"{name}"' not in source]


def test_comparisons_say_what_the_page_says() -> None:
    text = (DOCS / "comparing.md").read_text(encoding="utf-8")
    files = sorted((DOCS / "comparisons").glob("*.json"))
    assert [file.name for file in files] == sorted(re.findall(r"\(comparisons/([\w-]+\.json)\)", text))
    for file in files:
        found = Comparison.from_json(file.read_text(encoding="utf-8"))
        assert verdict(found).removeprefix("ts-cores: ") in text


def test_metrics_are_those_of_the_code() -> None:
    text = (DOCS / "operating.md").read_text(encoding="utf-8").partition("## Metrics")[2]
    documented = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert documented == {name: kind for name, (_, kind) in METRICS.items()}


def test_alerts_ask_for_metrics_that_exist(checkout: Path) -> None:
    known = set(re.findall(r"name: (\w+)", (checkout / "config" / "metrics.yaml").read_text(encoding="utf-8")))
    (rules,) = (block.text for block in blocks(DOCS / "production.md") if block.language == "yaml")
    expressions = [rule["expr"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]]
    words = "max by unless on sum rate instance ModelName WorkerName"
    for expression in expressions:
        used = set(re.findall(r"\b[A-Za-z_]\w*", expression)) - set(words.split())
        assert used, expression
        assert used <= known, expression


def test_lines_of_the_log_are_in_the_code(checkout: Path) -> None:
    files = [*(checkout / "ts_plugin").rglob("*.py"), *(checkout / "ts_plugin").rglob("*.java")]
    sources = [file.read_text(encoding="utf-8") for file in files]
    section = (DOCS / "production.md").read_text(encoding="utf-8").partition("### Lines to know")[2]
    lines = re.findall(r"^\| `([^`]+)` \| (?:INFO|WARN|ERROR)", section, re.MULTILINE)
    assert len(lines) > 4
    for line in lines:
        # What is left between the values that the code fills in.
        pieces = re.split(r"worker 9000|of MODEL VERSION|REASON|\.\.\.|[:,;]|--\w+|OMP_PROC_BIND|\d[\d-]*", line)
        in_one_place = ".{0,300}?".join(re.escape(piece.strip()) for piece in pieces if piece.strip())
        assert any(re.search(in_one_place, source, re.DOTALL) for source in sources), line


# ---- what the documents show ------------------------------------------------------------------------------------


def planned(topology: Topology, workers: int, launcher_args: str = "") -> Plan:
    return plan(topology, [Demand(topology.online, parse_launcher_args(launcher_args))] * workers)


def test_pictures_are_what_the_code_draws() -> None:
    old = [file.name for file, text in pictures().items() if file.read_text(encoding="utf-8") != text]
    assert not old, "python -m tests.pictures makes them anew"


def test_the_picture_of_how_it_works_shows_a_real_plan() -> None:
    picture = (DOCS / "how-it-works.svg").read_text(encoding="utf-8")
    slices = planned(machine(packages=2, cores=8), 3).slices
    owner = {cpu: tag(n) for n, piece in enumerate(slices) for cpu in piece.cpus}
    assert re.findall(r'class="t"[^>]*>(\w)<', picture) == [owner[cpu] for cpu in range(16)]
    assert re.findall(r'<rect class="([abc])"', picture) == [owner[cpu].lower() for cpu in range(16)]


def test_the_picture_of_before_and_after_shows_a_real_plan() -> None:
    picture = (DOCS / "before-after.svg").read_text(encoding="utf-8")
    slices = planned(machine(packages=2, cores=28), 4).slices
    owner = {cpu: tag(n) for n, piece in enumerate(slices) for cpu in piece.cpus}
    assert re.findall(r'class="t"[^>]*>(\w)<', picture) == [owner[cpu] for cpu in range(56)]
    after = picture.partition("After: ")[2]
    assert re.findall(r'<rect class="([abcd])"', after) == [owner[cpu].lower() for cpu in range(56)]


def test_the_readme_is_one_page() -> None:
    assert len((DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(
    ("topology", "workers", "sizes", "equal"),
    [
        pytest.param(machine(packages=2, cores=8), 3, "8, 4, 4", "6, 5, 5", id="16"),
        pytest.param(machine(packages=2, cores=28, smt=2), 3, "28, 14, 14", "19, 19, 18", id="56"),
        pytest.param(
            machine(packages=2, l3=12, cores=8, smt=2),
            20,
            "four of 16, sixteen of 8",
            "twelve of 10, eight of 9",
            id="192",
        ),
    ],
)
def test_sizes_are_what_the_planner_gives(topology: Topology, workers: int, sizes: str, equal: str) -> None:
    number = {"four": 4, "eight": 8, "twelve": 12, "sixteen": 16}
    text = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    assert f"| {workers} | {sizes} | {equal}; " in text
    for words, arguments in ((sizes, ""), (equal, "--equal")):
        parts = [part.split(" of ") for part in words.split(", ")]
        wanted = [int(part[-1]) for part in parts for _ in range(number[part[0]] if len(part) > 1 else 1)]
        given = [piece.threads for piece in planned(topology, workers, arguments).slices]
        assert sorted(given, reverse=True) == wanted


@pytest.mark.parametrize(
    ("topology", "asked", "threads", "words"),
    [
        pytest.param(machine(cores=36), [(30, 1), (30, 1)], [30, 6], "the first gets 30 and the second 6", id="cores"),
        pytest.param(machine(cores=36), [(None, 2), (None, 1)], [24, 12], "shares 2 and 1 get 24 and 12", id="share"),
        pytest.param(
            machine(packages=2, cores=28),
            [(None, 2), (None, 1)],
            [28, 28],
            "two nodes of 28 cores they get 28 and 28",
            id="two nodes",
        ),
    ],
)
def test_what_a_model_asks_for_is_what_the_planner_gives(
    topology: Topology, asked: list[tuple[int | None, float]], threads: list[int], words: str
) -> None:
    assert words in " ".join((DOCS / "handlers.md").read_text(encoding="utf-8").split())
    slices = plan(topology, [Demand(topology.online, cores=cores, share=share) for cores, share in asked]).slices
    assert [piece.threads for piece in slices] == threads


def test_the_sample_of_the_core_map_has_the_fields_of_the_code() -> None:
    (sample,) = (json.loads(block.text) for block in blocks(DOCS / "operating.md") if block.language == "json")
    (piece,) = planned(machine(cores=2), 1).slices
    lease = lease_of(piece, 4711, server_pid=4690)
    document = core_map(State(leases=(lease,)))
    assert [*sample] == ["enabled", *document]
    assert [*sample["slices"][0]] == [*document["slices"][0]]
    assert PAST_LAUNCHER.startswith(sample["unbound"][0]["reason"])
    assert sample["elsewhere"][0].keys() == {"pid", "whose"}
