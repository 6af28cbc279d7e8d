"""Helpers for the notebooks in `colab`."""
