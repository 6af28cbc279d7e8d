"""Packing: every wanted token once, in rows that read as prompt and completion, whatever the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.models.packing import Packing, before, gather, to_rows, to_sequences
from tinylora_jax.training import Batch, pack, sequence_shapes, unpack
from tinylora_jax.training.batch import empty_microbatch


def rollout(seed, prompts, samples, prompt_tokens, new_tokens, vocab=1000):
    rng = np.random.default_rng(seed)
    shape = (prompts, samples, new_tokens)
    ends = np.minimum(rng.geometric(3 / new_tokens, shape[:2]), new_tokens)
    ends[0, 0] = 0  # filtered out
    mask = np.arange(new_tokens) < ends[:, :, None]
    mask &= rng.random(shape) < 0.9  # tokens that are not trained on, inside a completion too
    return Batch(
        prompts=rng.integers(0, vocab, (prompts, prompt_tokens)).astype(np.int32),
        lengths=rng.integers(1, prompt_tokens + 1, prompts).astype(np.int32),
        completions=rng.integers(0, vocab, shape).astype(np.int32),
        mask=mask,
        rollout_logprobs=rng.standard_normal(shape).astype(np.float32),
        advantages=rng.standard_normal(shape[:2]).astype(np.float32),
    )


CASES = [
    # prompts, samples, prompt tokens, new tokens, sequence tokens, sequences
    (5, 3, 7, 9, 10_000, 1),
    (5, 3, 7, 9, 1, 1),
    (6, 4, 20, 30, 100, 1),
    (6, 4, 20, 30, 100, 3),
    (3, 8, 100, 2500, 3000, 2),  # rows of two widths, groups that do not fit into one sequence
]


@pytest.mark.parametrize("case", CASES)
def test_every_token_once_in_rows_of_prompt_and_completion(case):
    *bounds, stream_tokens, sequences = case
    prompts, samples, prompt_tokens, new_tokens = bounds
    batch = rollout(1, *bounds)
    shapes = sequence_shapes(prompts, prompt_tokens, samples, new_tokens, stream_tokens)
    assert len(shapes) == (2 if new_tokens > 2000 else 1)
    packs = list(pack(batch, 2 * batch.rollout_logprobs, shapes, sequences))
    ends = np.where(batch.mask, np.arange(1, new_tokens + 1), 0).max(-1)

    seen = np.concatenate([p.source[p.source >= 0] for p in packs])
    inside = np.arange(new_tokens) < ends[:, :, None]
    np.testing.assert_array_equal(np.sort(seen), np.flatnonzero(inside))
    np.testing.assert_array_equal(unpack(packs, [p.weights for p in packs], batch), 2 * batch.rollout_logprobs * inside)
    rows_seen = []
    for packed in packs:
        there = packed.source >= 0
        np.testing.assert_array_equal(packed.mask[there], batch.mask.reshape(-1)[packed.source[there]])
        assert not packed.mask[~there].any() and (packed.weights[~there] == 0).all()
        assert {p.shape for p in jax.tree.leaves(packed)} == {
            p.shape
            for p in jax.tree.leaves(
                empty_microbatch(next(s for s in shapes if s.places == packed.packing.tokens_at.shape[2]), sequences)
            )
        }
        for b in range(sequences):
            for r, row in enumerate(packed.packing.tokens_at[b]):
                real = row[row < packed.tokens.shape[1]]
                if not len(real):
                    continue
                assert (row[: len(real)] == real).all() and packed.packing.lengths[b, r] == len(real)
                np.testing.assert_array_equal(packed.packing.positions[b, real], np.arange(len(real)))
                i, j, _ = np.unravel_index(packed.source[b, real[-1]], batch.mask.shape)
                expected = [*batch.prompts[i, : batch.lengths[i]], *batch.completions[i, j, : ends[i, j]]]
                np.testing.assert_array_equal(packed.tokens[b, real], expected)
                assert batch.advantages[i, j] == packed.advantages[b, real[-1]]
                rows_seen.append((i, j))
    assert sorted(rows_seen) == [(i, j) for i in range(prompts) for j in range(samples) if ends[i, j]]


def test_only_what_is_wanted():
    batch = rollout(2, 6, 4, 20, 30)
    wanted = np.zeros((6, 4), bool)
    wanted[2], wanted[4, 1] = True, True
    shapes = sequence_shapes(6, 20, 4, 30, 10_000)
    (packed,) = pack(batch, batch.rollout_logprobs, shapes, wanted=wanted)
    found = {
        (i, j) for i, j, _ in zip(*np.unravel_index(packed.source[packed.source >= 0], batch.mask.shape), strict=True)
    }
    assert found == {(2, 0), (2, 1), (2, 2), (2, 3), (4, 1)}
    assert list(pack(batch, batch.rollout_logprobs, shapes, wanted=np.zeros((6, 4), bool))) == []


def test_streams_of_a_realistic_rollout_are_mostly_full():
    rng = np.random.default_rng(0)
    batch = rollout(3, 64, 4, 320, 512)
    ends = np.clip(rng.normal(290, 110, (64, 4)), 1, 512).astype(int)
    mask = np.arange(512) < ends[:, :, None]
    batch = Batch(
        batch.prompts,
        np.clip(batch.lengths, 80, 200),
        batch.completions,
        mask,
        *[batch.rollout_logprobs] * 1,
        batch.advantages,
    )
    shapes = sequence_shapes(64, 320, 4, 512, 8192)
    packs = list(pack(batch, batch.rollout_logprobs, shapes))
    used = (ends.sum() + batch.lengths.sum()) / sum(p.tokens.size for p in packs)
    assert used > 0.85


@pytest.fixture
def packed():
    batch = rollout(4, 3, 2, 5, 6)
    packs = list(pack(batch, batch.rollout_logprobs, sequence_shapes(3, 5, 2, 6, 1), 2))
    return jax.tree.map(jnp.asarray, packs[0])


def loop_rows(x, packing: Packing):
    sequences, rows, places = packing.tokens_at.shape
    out = np.zeros((sequences * rows, places, *x.shape[2:]), np.float32)
    for b in range(sequences):
        for r in range(rows):
            for p in range(places):
                token = packing.tokens_at[b, r, p]
                if token < x.shape[1]:
                    out[b * rows + r, p] = x[b, token]
    return out


def test_rows_and_streams_are_what_a_loop_makes_of_them(packed):
    packing, tokens = packed.packing, packed.tokens.shape[1]
    x = np.random.default_rng(0).standard_normal((2, tokens, 3)).astype(np.float32)
    rows = to_rows(jnp.asarray(x), packing)
    np.testing.assert_array_equal(rows, loop_rows(x, packing))
    used = (packing.places_of[..., 0] < packing.tokens_at[0].size)[..., None]
    np.testing.assert_array_equal(to_sequences(rows, packing), np.where(used, x, 0))


def test_before_is_the_entry_of_the_token_before_in_the_row(packed):
    packing, tokens = packed.packing, packed.tokens.shape[1]
    x = np.random.default_rng(0).standard_normal((2, tokens, 3)).astype(np.float32)
    got = np.asarray(before(jnp.asarray(x), packing))
    for b in range(2):
        for row in packing.tokens_at[b]:
            real = row[row < tokens]
            for earlier, token in zip(real, real[1:], strict=False):
                np.testing.assert_array_equal(got[b, token], x[b, earlier])
            if len(real):
                assert (got[b, real[0]] == 0).all()


@pytest.mark.parametrize("function", [to_rows, before, lambda x, p: to_sequences(to_rows(x, p), p)])
def test_gradients_are_those_of_an_ordinary_gather(packed, function):
    packing, tokens = packed.packing, packed.tokens.shape[1]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, tokens, 3)), jnp.float32)
    out, pull = jax.vjp(lambda x: function(x, packing), x)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), jnp.float32)
    # The map is linear: its transpose, one basis vector at a time.
    basis = jnp.eye(2 * tokens).reshape(-1, 2, tokens)
    columns = jax.vmap(lambda e: function(e[..., None], packing)[..., 0])(basis)
    expected = jnp.einsum("n...,...d->nd", columns, g).reshape(x.shape)
    np.testing.assert_allclose(pull(g)[0], expected, atol=1e-5)


def test_gather_leaves_out_what_is_out_of_range():
    x = jnp.arange(6.0).reshape(1, 3, 2)
    index, inverse = jnp.asarray([[2, 3, 0]]), jnp.asarray([[[2], [3], [0]]])
    out, pull = jax.vjp(lambda x: gather(x, index, inverse), x)
    np.testing.assert_array_equal(out, [[[4, 5], [0, 0], [0, 1]]])
    np.testing.assert_array_equal(pull(jnp.ones_like(out))[0], [[[1, 1], [0, 0], [1, 1]]])


def test_groups_are_divided_rather_than_leave_streams_half_empty():
    """Nine groups of 173 tokens: two fit into a sequence of 448, and a third one's rest would be wasted."""
    batch = rollout(3, 9, 8, 45, 16)
    full = np.ones(batch.mask.shape, bool)
    batch = Batch(
        batch.prompts, np.full(9, 45, np.int32), batch.completions, full, batch.rollout_logprobs, batch.advantages
    )
    shapes = sequence_shapes(9, 45, 8, 16, 448)
    assert shapes[0].tokens == 448
    assert len(list(pack(batch, batch.rollout_logprobs, shapes))) == 4  # 1557 tokens, and a few prompts twice
