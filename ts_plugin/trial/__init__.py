"""An archive on trial: in bare processes, and on the real server under load. For tune and benchmarks."""
