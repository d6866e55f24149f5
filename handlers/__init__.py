"""Handlers whose workers own their cores: a base handler, a mix-in, and TorchServe's own handlers with it.

Archives import this package as ``ts_plugin.handlers``. An archive's directory comes first on its worker's path, so that
a ``handlers.py`` or ``handlers/`` in the archive is found before the top-level ``handlers``, which is this package too.
"""

from ts_plugin.handlers.slices import CoreSliceHandler, CoreSliceMixin

__all__ = ["CoreSliceHandler", "CoreSliceMixin"]
