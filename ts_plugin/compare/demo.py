"""An archive and a request for those who have none at hand: a torchvision ResNet and a picture."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from ts_plugin.errors import CommandError
from ts_plugin.trial.store import cache_directory

SEED = 20240229


def demonstration(name: str) -> tuple[Path, Path]:
    """Return ``NAME.mar`` with random weights and TorchServe's image_classifier, and a JPEG file; both are made once.

    Raises:
        CommandError: torchvision is not installed, or has no such model.
    """
    cache = cache_directory() / "demo"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))  # else importing it leaves one in TMPDIR
    try:
        import torch
        import torchvision
        from PIL import Image
    except ImportError as error:
        raise CommandError(f"--demo needs torchvision ({error}): pip install torchvision captum") from error
    folder = cache / f"torch-{torch.__version__}"
    archive, body = folder / f"{name}.mar", folder / "picture.jpg"
    folder.mkdir(parents=True, exist_ok=True)
    if not body.exists():
        Image.radial_gradient("L").resize((512, 600)).convert("RGB").save(body)
    if archive.exists():
        return archive, body
    torch.manual_seed(SEED)
    try:
        model = torchvision.models.get_model(name, weights=None).eval()
    except ValueError as error:
        raise CommandError(f"--demo {name}: torchvision has no such model; resnet18 and resnet50 are two") from error
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = Path(scratch, "model.pt")
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TorchServe serves TorchScript
            torch.jit.script(model).save(str(weights))
        words = ["--model-name", name, "--version", "1.0", "--export-path", scratch]
        words += ["--serialized-file", str(weights), "--handler", "image_classifier"]
        command = [sys.executable, "-m", "model_archiver.model_packaging", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"torch-model-archiver: exit status {done.returncode}: {done.stderr.strip()}")
        Path(scratch, archive.name).replace(archive)
    return archive, body
