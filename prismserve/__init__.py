"""prismserve: disaggregated serving of large vision-language models with compression as part of serving."""

__version__ = "0.1.0"
