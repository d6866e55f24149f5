"""A harness for real servers, and what runs on it: measurement, checks and the demonstration. See README.md."""
