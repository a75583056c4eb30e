"""Speed of the tiers below the KV pool: ``python -m benchmarks.tiers``."""
