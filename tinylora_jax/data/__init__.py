"""Questions from files, the hub and generators; prompt templates; a resumable stream of batches."""

from tinylora_jax.data.pipeline import (
    Prompt,
    PromptArrays,
    encode_prompts,
    make_pipeline,
    pad_prompts,
    padded_width,
)
from tinylora_jax.data.prompts import TEMPLATES, PromptTemplate, get_template, render
from tinylora_jax.data.questions import DataSpec, Question, load_questions
from tinylora_jax.data.queue import PromptQueue
from tinylora_jax.data.solutions import encode_solutions, solution_text
from tinylora_jax.data.sources import DataError, read_jsonl
from tinylora_jax.data.suites import EVAL_SETS, EvalSet, parse_suite

__all__ = [
    "EVAL_SETS",
    "TEMPLATES",
    "DataError",
    "DataSpec",
    "EvalSet",
    "Prompt",
    "PromptArrays",
    "PromptQueue",
    "PromptTemplate",
    "Question",
    "encode_prompts",
    "encode_solutions",
    "get_template",
    "load_questions",
    "make_pipeline",
    "pad_prompts",
    "padded_width",
    "parse_suite",
    "read_jsonl",
    "render",
    "solution_text",
]
