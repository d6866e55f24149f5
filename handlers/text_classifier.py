"""TorchServe's text_classifier on its own cores: `torch-model-archiver --handler handlers/text_classifier.py`."""

from ts.torch_handler.text_classifier import TextClassifier

from ts_plugin.handlers import CoreSliceMixin


class CoreSliceTextClassifier(CoreSliceMixin, TextClassifier):  # type: ignore[misc]
    """`text_classifier` as TorchServe documents it; see CoreSliceMixin."""
