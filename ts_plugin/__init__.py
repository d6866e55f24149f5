"""ts-cores: every TorchServe worker on its own physical cores.

For archives: ``ts_plugin.handlers`` (``CoreSliceHandler``, ``CoreSliceMixin`` and TorchServe's own handlers with it).
All else in this package is private and may change in any release; docs/installing.md lists what does not.
"""

__version__ = "0.2.0"
