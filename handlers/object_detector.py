"""TorchServe's object_detector on its own cores: `torch-model-archiver --handler handlers/object_detector.py`."""

from ts.torch_handler.object_detector import ObjectDetector

from ts_plugin.handlers import CoreSliceMixin


class CoreSliceObjectDetector(CoreSliceMixin, ObjectDetector):  # type: ignore[misc]
    """`object_detector` as TorchServe documents it; see CoreSliceMixin."""
