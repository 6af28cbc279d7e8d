"""Rewards of the tests: importable as `module:function`, like a user's own."""

import sys

from tinylora_jax.rewards import Grade


def even(completion, answer, question):
    """A signal that a random model has too: is the text of even length?"""
    return Grade(float(len(completion) % 2 == 0), float(len(completion) % 3 > 0))


def raises(completion, answer, question):
    raise KeyError("no such grade")


def nan(completion, answer, question):
    return float("nan")


def leaves(completion, answer, question):
    sys.exit()


def interrupts(completion, answer, question):
    raise KeyboardInterrupt


NOT_CALLABLE = 3
