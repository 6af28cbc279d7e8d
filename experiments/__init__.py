"""Command-line programs."""

import os

# transformers recommends installing PyTorch, which this project does not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
