"""Handlers whose workers own their cores: a base handler, a mix-in, and TorchServe's own handlers with it."""

from ts_plugin.worker import openmp

openmp.load()  # before torch, which the handlers import

from handlers.slices import CoreSliceHandler, CoreSliceMixin  # noqa: E402

__all__ = ["CoreSliceHandler", "CoreSliceMixin"]
