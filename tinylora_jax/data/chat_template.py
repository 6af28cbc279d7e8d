"""Renders chat templates, which are untrusted programs, within limits of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from types import FrameType
from typing import Any

from tinylora_jax.data.sources import DataError

RENDER_S = 2.0
"""Limit of processor time per prompt, in seconds; a real template takes about a millisecond.

The limit is not of wall time: a machine that is compiling programs at the same time may take seconds for anything.
"""

_TRIAL_S = 60.0  # wall time, which includes starting a process on a busy machine
_TRIAL_BYTES = 1 << 29
_MAX_TEMPLATE = 1 << 20
_MAX_TEXT = 1 << 23

# The program that `_try_out` runs. Its output is not used, so it may differ from what transformers renders.
_TRIAL = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({int(RENDER_S)}, {int(RENDER_S)}))
resource.setrlimit(resource.RLIMIT_AS, ({_TRIAL_BYTES}, {_TRIAL_BYTES}))
from jinja2.sandbox import ImmutableSandboxedEnvironment
def refuse(message): raise ValueError(message)
options = {{"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}}
environment = ImmutableSandboxedEnvironment(**options)
environment.globals |= {{"raise_exception": refuse, "strftime_now": str}}
template = environment.from_string(json.load(sys.stdin))
turn = [{{"role": "user", "content": "What is 2 + 3?"}}, {{"role": "assistant", "content": "5"}}]
for messages in (turn[:1], [{{"role": "system", "content": "Be brief."}}, *turn, turn[0]]):
    template.render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
"""


class _TooLong(Exception):
    """A template exceeded its time limit."""


def render_within_bounds(template: Any, render: Callable[[], str]) -> str:
    """Renders a chat template, and converts every failure into one error type.

    Args:
      template: text of the chat template, or several texts by name.
      render: function that renders the template with transformers.

    Raises:
      DataError: the template fails, does not finish within `RENDER_S`, or produces many megabytes of text.
    """
    for text in template.values() if isinstance(template, dict) else [template]:
        if problem := _try_out(text):
            raise DataError(f"the model's chat template cannot be used: {problem}; fix or remove it")
    try:
        text = _timed(render)
    except _TooLong:
        raise DataError(
            f"the model's chat template takes more than {RENDER_S:g} s per prompt; fix or remove it"
        ) from None
    except Exception as error:  # the template's own code may raise anything
        problem = f"{type(error).__name__}: {error}"
        raise DataError(
            f"the model's chat template cannot render a prompt ({problem:.300}); fix or remove it"
        ) from error
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        size = f"{len(text)} characters" if isinstance(text, str) else f"a {type(text).__name__}"
        raise DataError(f"the model's chat template turns a prompt into {size}; fix or remove it")
    return text


@lru_cache(maxsize=64)
def _try_out(template: Any) -> str | None:
    """Finds what is wrong with a template, in a process that can be killed: one operation may never end."""
    if not isinstance(template, str):
        return f"it is a {type(template).__name__}, expected a string"
    if len(template) > _MAX_TEMPLATE:
        return f"it has {len(template)} characters, expected at most {_MAX_TEMPLATE}"
    if not any(
        mark in template for mark in ("*", "range", "macro", "namespace", "recursive", "|", "~", "+", "%(", ".")
    ):
        return None  # contains nothing that can grow
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=json.dumps(template).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TRIAL_S,
        )
    except subprocess.TimeoutExpired:
        return "it does not finish"
    if result.returncode < 0:
        return f"it takes more than {RENDER_S:g} s or {_TRIAL_BYTES >> 20} MB"
    return "it uses too much memory" if b"MemoryError" in result.stderr[-200:] else None


def _timed(render: Callable[[], str]) -> str:
    """Calls a function, and stops it between two of its lines once its time is up."""
    end, before = time.thread_time() + RENDER_S, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise _TooLong
        return trace

    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(before)
