"""Benchmarks: what a layer costs, as a ratio to the work that cannot be avoided."""
