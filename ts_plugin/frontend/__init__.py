"""The plug-in in TorchServe's frontend: the Java hook, and the Python program that answers it."""
