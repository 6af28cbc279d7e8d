"""A line or a plane of adapters, evaluated as one batch."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments import landscape
from experiments.common.answering import answer
from experiments.common.specs import ConfigError, parse
from experiments.common.task import load_task, make_prompts
from experiments.landscape import grid, orthogonal
from experiments.plotting.charts import draw_accuracy, draw_landscape
from tinylora_jax import rl
from tinylora_jax.data import load_questions, padded_width
from tinylora_jax.io._trained import open_adapter


def is_blank(path):
    pixels = matplotlib.image.imread(path)[..., :3]
    return np.mean(pixels.min(axis=-1) < 0.85) < 0.005


def test_points_of_a_line_and_of_a_plane():
    first, second = np.array([[1.0], [2.0]]), np.array([[4.0], [-2.0]])
    places, points = grid(first, None, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(points[1], [[0.5], [1.0]])
    np.testing.assert_allclose(places, [[0.0], [0.5], [1.0]])
    places, points = grid(first, second, np.array([0.0, 1.0]))
    np.testing.assert_allclose(places, [[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_allclose(points[3], first + second)


def test_a_random_direction_is_orthogonal_and_as_long():
    v = np.random.default_rng(1).standard_normal((3, 2))
    other = orthogonal(v, seed=4)
    assert abs(np.sum(v * other)) < 1e-12 and np.linalg.norm(other) == pytest.approx(np.linalg.norm(v))
    assert np.any(other != orthogonal(v, seed=5))
    with pytest.raises(ConfigError, match="no orthogonal direction"):
        orthogonal(np.ones((1, 1)), seed=0)


@pytest.fixture(scope="module")
def measured(finished, make_config):
    """The line through a trained vector, and each point's reward one at a time."""
    config, ts = make_config(), np.array([-1.0, 0.0, 1.0, 40.0])
    result = landscape.run(config, [finished.workdir / "adapter"], ts, None)
    return config, ts, result


def test_every_point_is_what_its_adapter_gives_alone(finished, measured):
    config, ts, result = measured
    trained = open_adapter(finished.workdir / "adapter")
    specs = parse(config)
    task = load_task(config, specs, trained.policy)
    prompts = make_prompts(config, load_questions(specs.eval_data), task)
    seen = set()
    for t, row in zip(ts, result["points"], strict=True):
        v = np.float32(t) * np.asarray(trained.v, np.float32)
        key = rl.step_key(config.seed, "eval", 0)
        answers = answer(task, v, prompts, key, task.sampling, config.samples, padded_width(prompts))
        assert row["t"] == [t]
        assert row["strict"] == pytest.approx(float(answers.rewards("strict").mean()), abs=1e-6)
        assert row["lenient"] == pytest.approx(float(answers.rewards("lenient").mean()), abs=1e-6)
        seen.add(answers.texts)
    assert len(seen) > 1, "the points must differ"


def test_a_random_plane(finished, make_config):
    result = landscape.run(make_config(), [finished.workdir / "adapter"], np.array([0.0, 1.0]), 3)
    assert result["axes"] == 2 and len(result["points"]) == 4


def test_the_pictures_show_something(measured, tmp_path):
    _, _, result = measured
    draw_landscape(result, tmp_path / "line.png")
    plane = [{"t": [a, b], "strict": a * b, "lenient": 0.0, "se": 0.0} for a in range(3) for b in range(3)]
    draw_landscape(result | {"axes": 2, "points": plane}, tmp_path / "plane.png")
    point = {"params": 13, "accuracy": 0.4, "low": 0.35, "high": 0.45}
    series = {"RL": [point, point | {"params": 1}], "SFT": [point | {"accuracy": 0.38}]}
    draw_accuracy(series, {"accuracy": 0.3, "low": 0.28, "high": 0.32}, tmp_path / "accuracy.png")
    assert not any(is_blank(tmp_path / f"{name}.png") for name in ("line", "plane", "accuracy"))


def test_an_adapter_of_another_spec(finished, make_config, tmp_path):
    adapter = finished.workdir / "adapter"
    with pytest.raises(ValueError, match="no-adapter"):
        landscape.run(make_config(), [tmp_path / "no-adapter"], np.array([0.0, 1.0]), None)
    result = landscape.run(make_config(), [adapter, adapter], np.array([0.0, 1.0]), None)
    assert json.loads(json.dumps(result))["axes"] == 2
