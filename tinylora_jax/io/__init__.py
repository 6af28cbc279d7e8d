"""Bytes to trees and back: checkpoints, tokenizers and the vectors trained on them."""
