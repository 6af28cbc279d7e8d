"""Benchmarks with the hardware's floor beside every figure."""
