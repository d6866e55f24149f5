"""Real model archives, built with torch-model-archiver into a cache; only ``fetch_weights`` downloads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import CHECKOUT
from ts_plugin.trial.store import cache_directory

if TYPE_CHECKING:
    import torch

SEED = 20240229
SOURCES = Path(__file__).parent / "models"
HANDLERS = CHECKOUT / "handlers"


class ArchiveError(RuntimeError):
    """An archive could not be built; the message has the archiver's output."""


class Handler(StrEnum):
    """Which handler an archive carries."""

    STOCK = "stock"  # TorchServe's own, nothing of ours
    OURS = "ours"  # the same under CoreSliceMixin
    ASYNC = "async"  # the same as a coroutine, for asyncCommunication


def resnet(name: str = "resnet18", *, handler: Handler = Handler.STOCK, weights: Path | None = None) -> Path:
    """Return the archive ``NAME.mar`` of a torchvision classifier as TorchScript, with ImageNet's class names.

    ``name`` is "resnet18", "resnet50", "mobilenet_v3_small", ...; ``weights`` a state dict from ``fetch_weights``, None
    for random ones from a fixed seed.
    A STOCK archive names TorchServe's ``image_classifier`` as its handler, OURS carries handlers/image_classifier.py.
    """

    def model() -> torch.nn.Module:
        import torch
        import torchvision

        made: torch.nn.Module = torchvision.models.get_model(name, weights=None)
        if weights:
            made.load_state_dict(torch.load(weights, weights_only=True))
        return made

    def classes() -> dict[str, str]:
        import torchvision

        categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
        return {str(number): label for number, label in enumerate(categories)}

    variant = f"{handler}-hub" if weights else str(handler)
    source = (HANDLERS / "image_classifier.py").read_text() if handler is Handler.OURS else "image_classifier"
    return _archive(name, variant, source, model=model, classes=classes)


def convolutions() -> Path:
    """Return the archive of two convolutions that gain by more cores; its handler can fork: models/convolutions.py."""

    def model() -> torch.nn.Module:
        import torch

        layers = [torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 32, 3, padding=1)]
        return torch.nn.Sequential(*layers)

    return _archive("convolutions", "stock", _source("convolutions.py", Handler.STOCK), model=model)


def sleeps() -> Path:
    """Return the archive ``sleeps.mar``: parallel regions that sleep instead of computing, see models/sleeps.py."""
    return _archive("sleeps", "stock", _source("sleeps.py", Handler.STOCK), model=_trivial)


def facts(name: str = "facts", *, handler: Handler = Handler.STOCK, config: str = "", version: str = "1.0") -> Path:
    """Return an archive with a trivial model that answers with facts about its worker process: see models/facts.py.

    ``config`` is the text of its model-config.yaml.
    """
    source = _source("facts.py", handler)
    return _archive(name, f"{handler}-{version}", source, model=_trivial, config=config, version=version)


def fetch_weights(name: str = "resnet18", *, timeout: float = 10.0) -> Path | None:
    """Return a file with torchvision's pretrained weights, downloading it once; None where the hub cannot be reached.

    ``timeout`` bounds connecting and every read, in seconds.
    """
    import urllib.request

    import torchvision

    url: str = torchvision.models.get_model_weights(name).DEFAULT.url
    file = cache_directory() / "weights" / url.rsplit("/", 1)[1]
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                while block := answer.read(1 << 20):
                    partial.write(block)
        except OSError:
            Path(partial.name).unlink()
            return None
    return Path(partial.name).replace(file)


def load(archive: Path) -> torch.jit.ScriptModule:
    """Return the TorchScript model of an archive, in evaluation mode.

    Raises:
        ArchiveError: the archive has no TorchScript model.
    """
    import torch

    with zipfile.ZipFile(archive) as parts:
        manifest: dict[str, Any] = json.loads(parts.read("MAR-INF/MANIFEST.json"))
        name = manifest["model"].get("serializedFile", "")
        if not name.endswith(".pt"):
            raise ArchiveError(f"{archive}: no TorchScript model (serializedFile is {name!r})")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                io.BytesIO(parts.read(name)), map_location="cpu"
            )
    model.eval()
    return model


def photograph() -> bytes:
    """Return the JPEG photograph of Grace Hopper that matplotlib's wheel carries (512 x 600 pixels)."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg").read_bytes()


def _trivial() -> torch.nn.Module:
    import torch

    return torch.nn.Linear(1, 1)


def _archive(
    name: str,
    variant: str,
    source: str,
    *,
    model: Callable[[], torch.nn.Module],
    classes: Callable[[], dict[str, str]] | None = None,
    config: str = "",
    version: str = "1.0",
) -> Path:
    """Build ``CACHE/torch-VERSION/VARIANT/NAME.mar`` unless it is there; it appears complete or not at all.

    ``source`` is the handler's text, or one word: the name of a handler inside TorchServe.
    """
    import torch

    folder = cache_directory() / f"torch-{torch.__version__}" / variant
    mar, made_from = folder / f"{name}.mar", folder / f"{name}.py"
    recipe = f"{source}\n# {config!r}"
    if mar.exists() and made_from.exists() and made_from.read_text() == recipe:
        return mar
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        torch.manual_seed(SEED)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TorchServe serves TorchScript
            torch.jit.script(model().eval()).save(  # type: ignore[no-untyped-call]
                str(work / "model.pt")
            )
        names = work / "index_to_name.json"
        if classes:
            names.write_text(json.dumps(classes()))
        (work / "handler.py").write_text(source)
        (work / "model-config.yaml").write_text(config)
        _run_archiver(
            *("--model-name", name, "--version", version, "--export-path", scratch),
            *(("--config-file", str(work / "model-config.yaml")) if config else ()),
            *("--serialized-file", str(work / "model.pt")),
            *("--handler", source if source.isidentifier() else str(work / "handler.py")),
            *(("--extra-files", str(names)) if classes else ()),
        )
        made_from.write_text(recipe)
        (work / f"{name}.mar").replace(mar)
    return mar


def _source(name: str, handler: Handler) -> str:
    """Return the handler file's text with the variant's mix-in put in front of its base class."""
    text = (SOURCES / name).read_text()
    match handler:
        case Handler.STOCK:
            return text
        case Handler.OURS:
            text = text.replace("(Base):", "(CoreSliceMixin, Base):")
            return f"from ts_plugin.handlers import CoreSliceMixin\n{text}"
        case Handler.ASYNC:
            return text.replace("    def handle(", "    async def handle(")


def _run_archiver(*words: str) -> None:
    command = [sys.executable, "-m", "model_archiver.model_packaging", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ArchiveError(f"torch-model-archiver {' '.join(words)}: exit status {done.returncode}\n{done.stderr}")
