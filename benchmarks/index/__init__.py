"""Speed of the prefix index: ``python -m benchmarks.index``."""
