"""The tests: one module for each module, and for each file in config/ and docs/."""
