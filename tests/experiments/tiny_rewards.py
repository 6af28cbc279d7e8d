"""Rewards of the tests: importable as `module:function`, like a user's own."""

import sys

from tinylora_jax.rewards import Grade


def even(completion, answer, question):
    """A signal that a random model has too: is the text of even length?"""
    return Grade(float(len(completion) % 2 == 0), float(len(completion) % 3 > 0))


async def shortest(completions, answer, question):
    """A reward of the whole group: is the completion the shortest one?"""
    return [float(len(each) == min(map(len, completions))) for each in completions]


def raises(completion, answer, question):
    raise KeyError("no such grade")


def nan(completion, answer, question):
    return float("nan")


def leaves(completion, answer, question):
    sys.exit()


def interrupts(completion, answer, question):
    raise KeyboardInterrupt


NOT_CALLABLE = 3
