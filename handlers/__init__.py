"""Handlers whose workers own their cores: a base handler, a mix-in, and TorchServe's own handlers with it."""

from handlers.slices import CoreSliceHandler, CoreSliceMixin

__all__ = ["CoreSliceHandler", "CoreSliceMixin"]
