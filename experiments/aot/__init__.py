"""Compiling a run for a TPU without one: topologies, programs, and what XLA says of them."""
