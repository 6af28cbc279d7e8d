"""Runs Tunix with this library's weights: its model, its sampler, and its GRPO with LoRA.

Llama models also run in its Qwen2 with zero biases, because it uses `rope_theta`, which Tunix's Llama ignores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from tinylora_jax.models import ModelConfig

NEVER = -1  # a stop token that no model generates
PROJECTIONS = "qkvo"


def named_as_theirs(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Converts this library's weights to the names and shapes of Tunix's Qwen2.

    Args:
      config: architecture of the model.
      params: plain weights, nested as in `tinylora_jax.models.init_params`.

    Returns:
      A nested dict of arrays, with zero biases if the model has none.

    Raises:
      ValueError: Tunix's Qwen2 does not support the architecture.
    """
    lacking = {
        "qk_norm": config.qk_norm,
        "o_bias": config.o_bias,
        f"rope {config.rope.kind!r}": config.rope.kind != "default",
    }
    if wrong := [name for name, wanted in lacking.items() if wanted]:
        raise ValueError(f"Tunix's Qwen2 has no {', '.join(wrong)}: choose a Qwen2, SmolLM2 or Llama without them")
    width = config.hidden_size

    def block(layer: Any) -> dict[str, Any]:
        ours, theirs = layer["self_attn"], {}
        for name in PROJECTIONS:
            kernel = ours[f"{name}_proj"]["kernel"]
            shape = (-1, config.head_dim, width) if name == "o" else (width, -1, config.head_dim)
            theirs[f"{name}_proj"] = {"w": kernel.reshape(shape)}
            if name != "o":
                bias = ours[f"{name}_proj"].get("bias")
                theirs[f"{name}_bias"] = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
        norms = ("input_layernorm", "post_attention_layernorm")
        return {"attn": theirs, "mlp": layer["mlp"], **{name: {"w": layer[name]["scale"]} for name in norms}}

    head = {} if config.tie_embeddings else {"lm_head": {"w": params["lm_head"]["kernel"]}}
    return head | {
        "embedder": {"input_embedding": params["embed_tokens"]["embedding"]},
        "layers": {place: block(layer) for place, layer in params["layers"].items()},
        "final_norm": {"w": params["norm"]["scale"]},
    }


def qwen2(config: ModelConfig, params: Any) -> nnx.Module:
    """Creates Tunix's Qwen2 with this library's weights and dtype."""
    from tunix.models.qwen2 import model as theirs

    dtype = params["norm"]["scale"].dtype
    sizes = theirs.ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=config.rope.theta,
        norm_eps=config.rms_norm_eps,
        use_tied_embedding=config.tie_embeddings,
        dtype=dtype,
        param_dtype=dtype,
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: theirs.Qwen2(sizes, rngs=nnx.Rngs(0))))
    shapes, weights = nnx.to_pure_dict(state), named_as_theirs(config, params)
    assert jax.tree.all(jax.tree.map(lambda expected, ours: expected.shape == ours.shape, shapes, weights))
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


@dataclass
class Tokenizer:
    """A tokenizer for Tunix: known ids of prompts, an unused padding id, and a record of answer lengths."""

    ids: dict[str, list[int]]
    stop_tokens: tuple[int, ...]
    vocab_size: int
    text: Callable[[list[int]], str]
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self):
        taken = {token for ids in self.ids.values() for token in ids} | set(self.stop_tokens)
        self.padding = next(token for token in reversed(range(self.vocab_size)) if token not in taken)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt."""
        return self.ids[prompt]

    def decode(self, answer: list[int]) -> str:
        """Text of an answer."""
        self.lengths.append(len(answer))
        return self.text(answer)

    def bos_id(self) -> None:
        """No token to add, because the prompts already contain it."""

    def eos_id(self) -> int:
        """The first of the stop tokens."""
        return self.stop_tokens[0]

    def pad_id(self) -> int:
        """The last token that no prompt contains; Tunix masks it everywhere, and it is unlikely in answers."""
        return self.padding


def sampler(
    model: nnx.Module, rows: Sequence[Sequence[int]], samples: int, new_tokens: int, temperature: float = 1.0
) -> Callable[[int], list[np.ndarray]]:
    """Creates Tunix's sampler for given prompts.

    Args:
      model: model from `qwen2`.
      rows: token ids of the prompts.
      samples: number of answers per prompt.
      new_tokens: length of each answer, in tokens.
      temperature: sampling temperature, > 0.

    Returns:
      A function of a seed that generates all answers at once, and returns their tokens on the host.
    """
    from tunix.generate.sampler import CacheConfig, Sampler

    prompts = {str(place): list(row) for place, row in enumerate(rows)}
    longest, sizes = max(map(len, rows)), model.config
    cache = CacheConfig(longest + new_tokens, sizes.num_layers, sizes.num_kv_heads, sizes.head_dim)
    draw = Sampler(model, Tokenizer(prompts, (NEVER,), sizes.vocab_size, lambda _: ""), cache)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    limits = {"max_generation_steps": new_tokens, "max_prompt_length": longest, "eos_tokens": [NEVER]}

    return lambda seed: draw(repeated, temperature=temperature, top_p=1.0, seed=seed, **limits).tokens


class Steps(NamedTuple):
    """Seconds of each step (the first includes compilation), trained parameters, and mean tokens per answer."""

    seconds: list[float]
    trained: int
    mean_tokens: float


def grpo_steps(
    model: nnx.Module, tokenizer: Tokenizer, samples: int, new_tokens: int, micro_batch: int, steps: int
) -> Steps:
    """Runs steps of Tunix's GRPO, with LoRA of rank 1 on all seven projections and its own rollout.

    Args:
      model: model from `qwen2`.
      tokenizer: tokenizer with all prompts of a step.
      samples: number of answers per prompt.
      new_tokens: longest answer, in tokens.
      micro_batch: number of prompts whose answers are differentiated at once; divides the number of prompts.
      steps: number of steps.
    """
    import qwix
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    logging.set_verbosity(logging.WARNING)  # otherwise it prints every answer during the step
    prompts, longest = list(tokenizer.ids), max(map(len, tokenizer.ids.values()))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    everywhere = ".*(q|k|v|o|gate|up|down)_proj"
    with mesh:
        lora = qwix.LoraProvider(module_path=everywhere, rank=1, alpha=1.0)
        actor = qwix.apply_lora_to_model(model, lora, rngs=nnx.Rngs(0), **model.get_model_input())
    cluster = RLCluster(
        actor=actor,
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=RLTrainingConfig(
                actor_optimizer=optax.adam(1e-3),
                eval_every_n_steps=1 + steps,
                max_steps=1 + steps,
                mini_batch_size=len(prompts),
                train_micro_batch_size=micro_batch,
                rollout_micro_batch_size=len(prompts),
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=new_tokens,
                max_prompt_length=longest,
                kv_cache_size=longest + new_tokens,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=list(tokenizer.stop_tokens),
            ),
        ),
    )
    adapter = lambda: nnx.state(cluster.actor_trainer.model, nnx.LoRAParam)
    stamps: list[float] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        """Yields the same prompts for every step; the last step ends when a further batch is requested."""
        for _ in range(steps):
            stamps.append(time.perf_counter())
            yield {"prompts": np.array(prompts)}  # Tunix would repeat the entries of a list one by one
            jax.block_until_ready(adapter())
        stamps.append(time.perf_counter())

    def alternating(completions: list[str], **_: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    config = GRPOConfig(num_generations=samples, beta=0.0)
    GRPOLearner(cluster, config, alternating).train(batches())
    seconds = [end - begin for begin, end in zip(stamps[:-1], stamps[1:], strict=True)]
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter()))
    drawn = np.minimum(np.array(tokenizer.lengths) + 1, new_tokens)  # it removes stop tokens before decoding
    return Steps(seconds, trained, float(drawn.mean()))
