"""What TorchServe makes of config.properties, of the archives in its model store, and so which workers it starts."""
