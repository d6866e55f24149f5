"""Real TorchServe servers and model archives, for the tests and for everything else in benchmarks/."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PLUGINS = CHECKOUT / "ts_plugin" / "frontend"  # for the property plugins_path
