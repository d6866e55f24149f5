"""Handlers whose workers own their cores: a base handler, a mix-in, and TorchServe's own handlers with it.

Archives import this package as ``ts_plugin.handlers``. An archive's directory comes first on its worker's path, so that
a ``handlers.py`` or ``handlers/`` in the archive is found before the top-level ``handlers``, which is this package too.
"""

from ts_plugin.worker import openmp

openmp.load()  # before torch, which the handlers import

from ts_plugin.handlers.slices import CoreSliceHandler, CoreSliceMixin  # noqa: E402

__all__ = ["CoreSliceHandler", "CoreSliceMixin"]
