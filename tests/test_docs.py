"""Every code block of the documents: run where it can run, parsed where it cannot."""

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

from ts_plugin.planning.policy import option_reference, parse_launcher_args
from ts_plugin.tune.torchserve import free_ports

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
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
                assert path.name in ("README.md", "tuning.md")
            case "console":  # needs what no test has: a Docker engine, a cluster, minutes; or runs this test
                commands = re.findall(r"^\./dev \w+", (checkout / "dev").read_text(), re.MULTILINE)
                for line in block.text.splitlines():
                    assert (
                        line.startswith(("docker ", "kubectl ", "pip ", "ts-cores tune "))
                        or line.split("  ")[0] in commands
                    ), line
                for file in re.findall(r"config/\S+", block.text):
                    assert (checkout / file).is_file(), file
            case _:
                pytest.fail(f"a block in {block.language!r}, which nothing checks")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target


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
