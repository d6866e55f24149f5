"""TorchServe's image_segmenter on its own cores: `torch-model-archiver --handler handlers/image_segmenter.py`."""

from ts.torch_handler.image_segmenter import ImageSegmenter

from ts_plugin.handlers import CoreSliceMixin


class CoreSliceImageSegmenter(CoreSliceMixin, ImageSegmenter):  # type: ignore[misc]
    """`image_segmenter` as TorchServe documents it; see CoreSliceMixin."""
