"""TorchServe's image classifier in a handler file, so that archives.py can put another class in front of it."""

from ts.torch_handler.image_classifier import ImageClassifier as Base


class ImageHandler(Base):  # type: ignore[misc]
    pass
