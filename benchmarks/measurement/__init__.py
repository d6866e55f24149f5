"""Measure TorchServe with and without ts-cores on this machine: real servers, real archives, real requests."""
