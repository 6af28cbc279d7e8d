"""Plots of runs, sweeps, comparisons and landscapes."""
