"""What reuse saves over several workers: ``python -m benchmarks.reuse``."""
