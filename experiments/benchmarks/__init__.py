"""Benchmarks that compare each result with the hardware's limit."""
