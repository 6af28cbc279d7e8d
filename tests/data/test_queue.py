"""The queue of prompts: its order, that no step has a prompt twice, exact resume, and which prompts are skipped."""

import json
import random
from itertools import islice

import numpy as np
import pytest

from tinylora_jax.data import DataError, Prompt, PromptQueue, make_pipeline
from tinylora_jax.data.queue import draw_probability


def make_prompts(count):
    return tuple(Prompt(10 * i, (1, 2), f"{i}?", str(i)) for i in range(count))


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_the_order_is_that_of_the_pipeline():
    batches = make_pipeline(make_prompts(12), 4, seed=1, epochs=3)
    expected = [prompt.id for batch in batches for prompt in batch]
    queue = PromptQueue(make_prompts(12), 4, seed=1)
    assert [prompt.id for _ in range(9) for prompt in next(queue)] == expected


def naive(order, steps):
    """The prompts of every step by the rule alone: the next ones of an endless order that the step does not have."""
    position, found = 0, []
    for count in steps:
        own = []
        while len(own) < count:
            if order[position] not in own:
                own.append(order[position])
            position += 1
        found.append(own)
    return found


def test_steps_of_any_size_follow_the_rule_and_have_no_prompt_twice():
    one_by_one = PromptQueue(make_prompts(7), 1, seed=3)
    order = [next(one_by_one)[0].id for _ in range(300)]
    rng = random.Random(0)
    steps = [rng.randint(1, 7) for _ in range(30)]
    queue, found = PromptQueue(make_prompts(7), 4, seed=3), []
    for count in steps:
        found.append(ids(islice(queue.ahead(), rng.randint(count, 7)))[:count])  # more may be looked at than are taken
        queue.take(count)
    assert found == naive(order, steps)
    assert all(len(set(own)) == len(own) for own in found)
    assert len(ids(queue.ahead())) == 7, "it ends when a step has them all"


def play(queue, steps, rng):
    """Takes steps of random sizes and observes random pass rates; the prompts of every step."""
    found = []
    for _ in range(steps):
        own = ids(islice(queue.ahead(), rng.randint(2, 9)))
        queue.take(len(own) - 1)
        queue.observe(own[:-1], [rng.choice((0, 0, 4, 2)) for _ in own[:-1]], 4)
        found.append(own[:-1])
    return found


@pytest.mark.parametrize("consumed", [0, 1, 5, 17])
def test_resume_is_exact(consumed):
    make = lambda: PromptQueue(make_prompts(11), 3, seed=5, samples=4, min_draw=0.1)
    stream, rng = make(), random.Random(1)
    play(stream, consumed, rng)
    resumed = make()
    resumed.set_state(json.loads(json.dumps(stream.get_state())))
    again = random.Random()
    again.setstate(rng.getstate())
    assert play(resumed, 20, again) == play(stream, 20, rng)
    assert resumed.get_state() == stream.get_state()


def test_questions_without_signal_are_drawn_less_often():
    prompts, rates = make_prompts(60), {}
    queue = PromptQueue(prompts, 5, seed=2, samples=4, min_draw=0.1)
    assert sorted(ids(queue.ahead())) == ids(prompts), "a prompt that was never seen is always drawn"
    right = {prompt.id: (0, 8, 4)[place % 3] for place, prompt in enumerate(prompts)}
    queue.take(60)
    queue.observe(list(right), list(right.values()), 8)
    drawn = {id: 0 for id in right}
    while queue.get_state()["position"] < 60 * 81:
        for prompt in next(queue):
            drawn[prompt.id] += 1
    for place, kind in enumerate((0, 8, 4)):
        rates[kind] = np.mean([drawn[prompt.id] for prompt in prompts[place::3]]) / 80
        assert rates[kind] == pytest.approx(draw_probability(kind, 8, 4, 0.1), abs=0.04)
    assert rates[0] < 0.3 and rates[8] < 0.3 and rates[4] > 0.9


def test_another_seed_skips_others_and_looking_ahead_changes_nothing():
    def drawn(seed):
        queue = PromptQueue(make_prompts(40), 40, seed, samples=4, min_draw=0.1)
        queue.observe([10 * i for i in range(40)], [0] * 40, 40)
        first = ids(islice(queue.ahead(), 5))
        assert ids(islice(queue.ahead(), 5)) == first
        return set(first)

    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("samples", [2, 4, 16])
def test_the_probability_is_that_of_a_signal(samples):
    """Against numerical integration over the posterior of the pass rate, and the two limits."""
    p = (np.arange(200_000) + 0.5) / 200_000
    signal = 1 - p**samples - (1 - p) ** samples
    for right, seen in ((0, 4), (3, 4), (8, 16), (31, 32)):
        density = p ** (right - 0.5) * (1 - p) ** (seen - right - 0.5)
        expected = (density * signal).sum() / density.sum() / (1 - 0.5 ** (samples - 1))
        assert draw_probability(right, seen, samples, 1e-9) == pytest.approx(min(1, expected), rel=3e-3)
    assert draw_probability(0, 0, samples, 0.1) == 1
    assert draw_probability(10**6, 10**6, samples, 0.1) == 0.1
    assert draw_probability(5 * 10**5, 10**6, samples, 0.1) == pytest.approx(1, abs=1e-5)


def test_the_state_is_small():
    """After an epoch of GSM8K, with a batch of 64 questions."""
    queue = PromptQueue(make_prompts(7473), 64, seed=0, samples=4, min_draw=0.1)
    rng = random.Random(0)
    for _ in range(117):
        batch = next(queue)
        queue.observe(ids(batch), [rng.randint(0, 4) for _ in batch], 4)
    assert len(json.dumps(queue.get_state())) < 6_000


def test_a_state_of_other_prompts_or_a_damaged_one_is_refused():
    state = PromptQueue(make_prompts(5), 2, seed=0).get_state()
    queue = PromptQueue(make_prompts(6), 2, seed=0)
    with pytest.raises(DataError, match="not one of 6 prompts"):
        queue.set_state(state)
    for damaged in ({}, {"position": 1}, {"position": 1, "counts": "?"}, {"position": 1, "counts": "AAAA"}):
        with pytest.raises(DataError, match="damaged"):
            queue.set_state(damaged)
    with pytest.raises(DataError, match="not one of 6"):
        queue.set_state({**queue.get_state(), "position": -1})


def test_arguments_are_checked():
    with pytest.raises(DataError, match="batch_size=4 exceeds the number of prompts, 3"):
        PromptQueue(make_prompts(3), 4, seed=0)
    with pytest.raises(ValueError, match="min_draw=0"):
        PromptQueue(make_prompts(3), 2, seed=0, min_draw=0.0)
    queue = PromptQueue(make_prompts(3), 2, seed=0)
    with pytest.raises(ValueError, match="cannot take 1 prompts of the 0"):
        queue.take(1)
