"""Compiles a run for a TPU without having one: topologies, programs and XLA's estimates."""
