"""Does Nesterov's momentum speed up training? ``python -m benchmarks.speedup``."""
