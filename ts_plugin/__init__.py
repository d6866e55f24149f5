"""ts-cores: every TorchServe worker on its own physical cores."""

__all__ = ["__version__"]
__version__ = "0.2.0"
