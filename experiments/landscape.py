"""Measures the reward along a line or over a plane in v, which few parameters make possible.

    python -m experiments.landscape --config=demo --adapter=/tmp/tinylora-demo/adapter --output=/tmp/line.json
    python -m experiments.landscape --config=demo --adapter=/tmp/a --adapter=/tmp/b --points=15 --output=/tmp/plane.json

Points on the line are t times the trained vector, with t from --low to --high; t = 0 is the untrained model. A second
adapter with the same factors spans a plane. With --random=SEED, the second axis is a random direction, orthogonal to
the vector and of the same length. All points answer the same questions with the same sampling noise, as one batch of
adapters. Writes a JSON file and a PNG next to it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    opening.define_config("Config with model, questions and samples: a name such as demo, or a file.")
    opening.define_path(
        "adapter", "Folder, URL or hub:owner/name of an adapter; a second one spans a plane.", several=True, url=True
    )
    opening.define_path("output", "Write the result to this .json file, and a .png file next to it.")
    flags.DEFINE_integer("points", 21, "Number of points on each axis.", lower_bound=2)
    flags.DEFINE_float("low", -1.0, "First coordinate, as a multiple of the vector.")
    flags.DEFINE_float("high", 3.0, "Last coordinate, as a multiple of the vector.")
    flags.DEFINE_integer("random", None, "Seed of a random orthogonal second axis.", lower_bound=0)
    opening.define_json()
    flags.mark_flags_as_required(["adapter", "output"])
    opening.begin(__doc__, (*opening.EVALUATION_FIELDS, ("samples", 4, "answers per question")))

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from experiments.common.answering import answer, lower_answer
from experiments.common.cli import fail, reporting_errors, use_compilation_cache
from experiments.common.closing import block, emit, place_lines
from experiments.common.compilation import compile_together
from experiments.common.meshes import find_devices
from experiments.common.opening import parse_flags
from experiments.common.places import adapter_of
from experiments.common.progress import phase, tell, with_names
from experiments.common.specs import ConfigError, parse
from experiments.common.task import Task, load_graded_questions, load_task, make_prompts
from experiments.common.wording import percent, table
from experiments.plotting.charts import draw_landscape
from tinylora_jax import rl
from tinylora_jax.data import Prompt, padded_width
from tinylora_jax.files import write_atomically
from tinylora_jax.io import open_adapter

FLAGS = flags.FLAGS
_ROWS = 2048  # approximate number of completions decoded together


def grid(first: np.ndarray, second: np.ndarray | None, ts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the points of a line or a plane.

    Args:
      first: vector of the first axis, `[groups, u]`.
      second: vector of the second axis; None for a line.
      ts: coordinates on each axis.

    Returns:
      The coordinates `[points, axes]` and the vectors `[points, groups, u]`.
    """
    axes = [first] if second is None else [first, second]
    places = np.stack([x.ravel() for x in np.meshgrid(*[ts] * len(axes), indexing="ij")], axis=1)
    return places, np.einsum("pa,agu->pgu", places, np.stack(axes)).astype(np.float32)


def orthogonal(v: np.ndarray, seed: int) -> np.ndarray:
    """Draws a random direction orthogonal to v and of the same length.

    Raises:
      ConfigError: v has only one number, or is zero.
    """
    if v.size < 2 or not np.any(v):
        raise ConfigError("--random: a vector of one number, or of zeros, has no orthogonal direction")
    noise = np.random.default_rng(seed).standard_normal(v.shape)
    noise -= v * np.sum(v * noise) / np.sum(v * v)
    return noise * np.linalg.norm(v) / np.linalg.norm(noise)


def rewards(
    task: Task, vectors: np.ndarray, prompts: Sequence[Prompt], samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Grades every point on the same questions with the same noise.

    Args:
      task: model with its reward and sampling settings.
      vectors: vector of each point, `[points, groups, u]`.
      prompts: encoded questions.
      samples: number of completions per question.
      seed: seed of the sampling noise.

    Returns:
      Strict and lenient grades, averaged over samples, each `[points, questions]`.
    """
    width, points = padded_width(prompts), len(vectors)
    chunk = max(1, min(len(prompts), _ROWS // (points * samples)))
    v = jnp.repeat(jnp.asarray(vectors), chunk, axis=0)
    with phase("compiling") as work:
        compile_together([lower_answer(task, v, points * chunk, width, task.sampling, samples)], report=work.count)
    found = {"strict": [], "lenient": []}
    with phase(f"answering questions at {points} points") as work:
        for start in range(0, len(prompts), chunk):
            work.count(start, len(prompts))
            batch = list(prompts[start : start + chunk])
            filled = batch + [batch[0]] * (chunk - len(batch))  # the last batch runs the same program
            answers = answer(task, v, filled * points, rl.step_key(seed, "eval", 0), task.sampling, samples, width)
            for which, columns in found.items():
                means = answers.rewards(which).reshape(points, chunk, samples).mean(axis=2)
                columns.append(means[:, : len(batch)])
    return np.concatenate(found["strict"], axis=1), np.concatenate(found["lenient"], axis=1)


def run(config: ConfigDict, adapters: Sequence[Path], ts: np.ndarray, random: int | None) -> dict[str, Any]:
    """Measures the landscape.

    Args:
      config: run configuration with model, questions (`eval_data`), samples and sampling.
      adapters: folder of one adapter, or of two with the same factors.
      ts: coordinates on each axis.
      random: seed of a random second axis; None for no such axis.

    Returns:
      The JSON-serializable result.

    Raises:
      ConfigError: the adapters cannot span a plane.
    """
    specs, opened = parse(config), [open_adapter(path) for path in adapters]
    questions = load_graded_questions(specs.eval_data, config.reward)
    task = load_task(config, specs, opened[0].policy)
    vectors = [np.asarray(adapter.v, np.float32) for adapter in opened]
    if len(vectors) == 2:
        other = opened[1].factors(task.policy.params, config.svd)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape and bool(jnp.all(a == b)), task.policy.factors.leaves, other.leaves
        )
        if vectors[0].shape != vectors[1].shape or not all(jax.tree.leaves(same)):
            raise ConfigError(f"{adapters[0]} and {adapters[1]} have different specs; a plane needs the same factors")
    second = vectors[1] if len(vectors) == 2 else (None if random is None else orthogonal(vectors[0], random))
    places, points = grid(vectors[0], second, ts)
    prompts = make_prompts(config, questions, task)
    tell(f"{len(points)} points, {len(prompts)} questions, {config.samples} samples of each")
    strict, lenient = rewards(task, points, prompts, config.samples, config.seed)
    error = strict.std(axis=1, ddof=1) / len(prompts) ** 0.5 if len(prompts) > 1 else np.zeros(len(points))
    rows = [
        {"t": place.tolist(), "strict": round(float(s), 6), "lenient": round(float(x), 6), "se": round(float(e), 6)}
        for place, s, x, e in zip(places, strict.mean(axis=1), lenient.mean(axis=1), error, strict=True)
    ]
    return {
        "model": task.name,
        "adapters": [with_names(path) for path in adapters],
        "params": int(vectors[0].size),
        "axes": places.shape[1],
        "random": random,
        "questions": len(prompts),
        "samples": config.samples,
        "temperature": config.temperature,
        "points": rows,
    }


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    use_compilation_cache()
    output = Path(FLAGS.output)
    if output.suffix != ".json":
        fail(f"--output={FLAGS.output}: expected a file name that ends in .json")
    if len(FLAGS.adapter) > 2 or (len(FLAGS.adapter) == 2 and FLAGS.random is not None):
        fail("a landscape needs one --adapter, two, or one and --random")
    if not FLAGS.low < FLAGS.high:
        fail(f"--low={FLAGS.low} must be below --high={FLAGS.high}")
    adapters = [adapter_of(text) for text in FLAGS.adapter]
    with reporting_errors():
        find_devices()
        output.parent.mkdir(parents=True, exist_ok=True)
        ts = np.linspace(FLAGS.low, FLAGS.high, FLAGS.points)
        result = run(FLAGS.config, adapters, ts, FLAGS.random)
        write_atomically(output, json.dumps(result, indent=1) + "\n")
        draw_landscape(result, output.with_suffix(".png"))
    best = max(result["points"], key=lambda row: row["strict"])
    emit({"output": str(output), "best": best}, ending(result, best, output), FLAGS.json)


def ending(result: dict[str, Any], best: dict[str, Any], output: Path) -> str:
    """The ending of the command: the untrained, the trained and the best point."""
    places = [("untrained", [0.0] * result["axes"]), ("trained", [1.0, *[0.0] * (result["axes"] - 1)])]
    rows = [["", "times the vector", "strict", "lenient"]]
    for name, place in places:
        near = min(result["points"], key=lambda row, place=place: float(np.linalg.norm(np.subtract(row["t"], place))))
        rows.append([name, *_cells(near)])
    rows.append(["best point", *_cells(best)])
    files = {"result": output, "picture": output.with_suffix(".png")}
    return block(table(rows, left=(0, 1)), place_lines(files))


def _cells(row: dict[str, Any]) -> list[str]:
    return [", ".join(f"{t:.2g}" for t in row["t"]), percent(row["strict"]), percent(row["lenient"])]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
