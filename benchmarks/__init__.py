"""Benchmarks of omni_moe: `python -m benchmarks --help`."""
