"""TorchServe's image_classifier on its own cores: `torch-model-archiver --handler handlers/image_classifier.py`."""

from ts.torch_handler.image_classifier import ImageClassifier

from ts_plugin.handlers import CoreSliceMixin


class CoreSliceImageClassifier(CoreSliceMixin, ImageClassifier):  # type: ignore[misc]
    """`image_classifier` as TorchServe documents it; see CoreSliceMixin."""
