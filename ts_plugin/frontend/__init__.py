"""Both sides of the door into TorchServe's frontend: the Java hook, and the Python that answers it."""
