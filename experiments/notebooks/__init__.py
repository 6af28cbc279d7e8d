"""What the notebooks of `colab` call."""
