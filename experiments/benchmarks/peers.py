"""Compares the same job in other libraries, with the same weights, prompts and limits.

    python -m experiments.benchmarks.peers --what=generate
    python -m experiments.benchmarks.peers --what=grpo --prompts=4 --new_tokens=16

`generate` compares generation with transformers; `grpo` compares a whole step with TRL's GRPOTrainer and PEFT's
TinyLoRA (both need torch; the second also `pip install trl`). A missing library is reported and skipped. On a GPU both
libraries share the memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 to leave memory for torch.

`tunix` compares generation with Tunix's sampler, and `tunix_grpo` a whole step with its GRPO, which trains LoRA of rank
1 because it has no TinyLoRA (`pip install google-tunix==0.1.7`). It stores all activations, so long answers need a
smaller --micro_batch.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common, tunix_peer
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from tinylora_jax.adapters import Factors
from tinylora_jax.io import resolve_gguf
from tinylora_jax.io.peft import export_tinylora
from tinylora_jax.rewards import load_reward
from tinylora_jax.rollout import Sampling, generate
from tinylora_jax.training import (
    GRPO,
    Batch,
    Optimizer,
    Plan,
    Update,
    group_advantages,
    init_state,
    sequence_shapes,
)

FLAGS = flags.FLAGS
TUNIX = ("tunix", "qwix", "metrax", "clu", "perfetto", "sentencepiece", "tensorboardX")
NEEDED = {"generate": ("torch",), "grpo": ("torch", "peft", "trl"), "tunix": TUNIX, "tunix_grpo": TUNIX}


def torch_model() -> tuple[Any, Any]:
    """Loads the same weights and tokenizer in transformers, on torch's device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = resolve_gguf(FLAGS.model)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name} if gguf else {}
    where = where or {"pretrained_model_name_or_path": FLAGS.model}
    dtype = getattr(torch, str(common.dtype()))
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    if gguf:  # to transformers this is a quantized model, which TRL would not train: the same weights in a plain one
        weights, settings, config = model.state_dict(), model.generation_config, model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(weights)
        model.generation_config = settings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(**where)


def questions(count: int) -> list[str]:
    """Sums that a small model can answer."""
    rng = np.random.default_rng(0)
    return [f"What is {a} + {b}? Explain each step." for a, b in rng.integers(10, 99, (count, 2))]


def timed(run: Any) -> float:
    """Median seconds of `run(i)` after one warm-up call."""
    seconds = []
    for index in range(1 + FLAGS.runs):
        started = time.perf_counter()
        run(index)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def encoded(tokenizer: Any) -> list[list[int]]:
    """The questions as chat prompts."""
    ask = lambda text: [{"role": "user", "content": text}]
    render = lambda text: tokenizer.apply_chat_template(ask(text), tokenize=False, add_generation_prompt=True)
    return [tokenizer(render(text), add_special_tokens=False)["input_ids"] for text in questions(FLAGS.prompts)]


def padded(rows: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, right-padded tokens and lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return jnp.arange(len(rows), dtype=jnp.uint32), jnp.asarray(tokens), jnp.asarray(lengths)


def our_generate(model: common.Model, rows: Sequence[Sequence[int]]) -> float:
    """Seconds to generate every completion to its full length."""
    prompts, sampling = padded(rows), Sampling(FLAGS.new_tokens)

    @jax.jit
    def program(policy, v, key):
        return generate(model.config, policy(v), *prompts, key, sampling, FLAGS.samples)

    return timed(lambda i: jax.block_until_ready(program(model.policy, model.v, jax.random.key(i))))


def their_generate(rows: Sequence[Sequence[int]]) -> float:
    """The same with transformers, with left padding and one row per completion."""
    import torch

    model, tokenizer = torch_model()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    repeated = [list(row) for row in rows for _ in range(FLAGS.samples)]
    batch = tokenizer.pad({"input_ids": repeated}, return_tensors="pt").to(model.device)
    limits = {"min_new_tokens": FLAGS.new_tokens, "max_new_tokens": FLAGS.new_tokens}

    @torch.no_grad()
    def run(_: int) -> None:
        model.generate(**batch, do_sample=True, top_k=0, **limits)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return timed(run)


def our_step(model: common.Model, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Seconds of a step with rollout, reward and update, and the mean number of tokens per answer."""
    prompts, samples, longest = padded(rows), FLAGS.samples, FLAGS.new_tokens
    sampling = Sampling(longest, stop_tokens=model.stop_tokens)
    count, width = prompts[1].shape
    shapes = sequence_shapes(count, width, samples, longest, GRPO().stream_tokens)
    plan = Plan(model.config, GRPO(skip_without_signal=False), 1.0, longest, shapes)
    optimizer = Optimizer(1e-3).transform()
    step, state = Update(plan, optimizer), init_state(model.v, optimizer)
    reward, lengths = load_reward("boxed"), []

    @jax.jit
    def program(policy, v, key):
        return generate(model.config, policy(v), *prompts, key, sampling, samples)

    def run(index: int) -> None:
        drawn = jax.device_get(program(model.policy, state.v, jax.random.key(index)))
        lengths.append(drawn.lengths)
        texts = [model.tokenizer.decode(t[:n]) for t, n in zip(drawn.tokens, drawn.lengths, strict=True)]
        grades = np.array([reward(text, "7", "").strict for text in texts], np.float32)
        grades += np.arange(len(texts), dtype=np.float32) % 2  # gives every group a signal, in both libraries
        shape = (count, samples, longest)
        batch = Batch(
            prompts=np.asarray(prompts[1]),
            lengths=np.asarray(prompts[2]),
            completions=drawn.tokens.reshape(shape),
            mask=(np.arange(longest) < drawn.lengths[:, None]).reshape(shape),
            rollout_logprobs=drawn.logprobs.reshape(shape),
            advantages=np.asarray(group_advantages(jnp.asarray(grades.reshape(shape[:2])))),
        )
        jax.block_until_ready(step(state, model.policy, batch))

    return timed(run), float(np.mean(lengths))


def micro_batch() -> int:
    """Number of completions that the peer differentiates at once."""
    completions = FLAGS.prompts * FLAGS.samples
    micro = min(FLAGS.micro_batch, completions)
    if completions % micro:
        raise ValueError(f"--micro_batch={micro} does not divide the {completions} completions of a step")
    return micro


def their_step() -> tuple[float, int]:
    """Median seconds of a TRL step with PEFT's TinyLoRA, all modules tied, and its number of parameters."""
    from datasets import Dataset
    from peft import TinyLoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = torch_model()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [[{"role": "user", "content": text}] for text in questions(FLAGS.prompts)]
    stamps: list[float] = []

    class Clock(TrainerCallback):
        """Records when steps begin and end."""

        def on_step_begin(self, *args, **kwargs):
            stamps.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    micro = micro_batch()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=FLAGS.prompts * FLAGS.samples // micro,
            num_generations=FLAGS.samples,
            max_completion_length=FLAGS.new_tokens,
            max_steps=1 + FLAGS.runs,
            beta=0.0,
            temperature=1.0,
            bf16=str(common.dtype()) == "bfloat16",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            use_cpu=jax.default_backend() == "cpu",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = GRPOTrainer(
            model=model,
            args=settings,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            train_dataset=Dataset.from_dict({"prompt": rows * (1 + FLAGS.runs)}),
            peft_config=TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        trainer.train()
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    seconds = [end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True)]
    return statistics.median(seconds[1:]), trained


def tunix_step(model: common.Model, rows: Sequence[Sequence[int]]) -> tunix_peer.Steps:
    """Runs Tunix's steps on the same questions; the first one is a warm-up."""
    micro, rest = divmod(micro_batch(), FLAGS.samples)
    if rest or not micro or FLAGS.prompts % micro:
        raise ValueError(
            f"--micro_batch={FLAGS.micro_batch}: Tunix takes whole groups of {FLAGS.samples}, equally many"
        )
    ids = {str(place): list(row) for place, row in enumerate(rows)}
    tokenizer = tunix_peer.Tokenizer(ids, model.stop_tokens, model.config.vocab_size, model.tokenizer.decode)
    theirs = tunix_peer.qwen2(model.config, model.policy.params)
    return tunix_peer.grpo_steps(theirs, tokenizer, FLAGS.samples, FLAGS.new_tokens, micro, 1 + FLAGS.runs)


def missing(*needed: str) -> str:
    """Lists the packages that are not installed, as a string."""
    return " ".join(name for name in needed if find_spec(name) is None)


def installed() -> bool:
    """Whether the peer is installed; reports missing packages."""
    if absent := missing(*NEEDED[FLAGS.what]):
        tell(f"{absent} not installed: nothing to compare with")
    return not absent


def their_adapters(
    root: Path, factors: Factors, v: np.ndarray, prompt: np.ndarray, new_tokens: int
) -> dict[str, float]:
    """Times PEFT's TinyLoRA adapters, all loaded but used one by one, as PEFT has one active adapter at a time."""
    import torch
    from peft import PeftModel

    folders = [root / f"peft-{place}" for place in range(len(v))]
    for folder, row in zip(folders, v, strict=True):
        export_tinylora(folder, factors, jnp.asarray(row), FLAGS.model)
    model = PeftModel.from_pretrained(torch_model()[0], str(folders[0]), adapter_name="0").eval()
    batch = torch.tensor(prompt, dtype=torch.long, device=model.device)
    limits = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": True, "top_k": 0}

    def seconds(run: Any) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    answer = lambda: model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), **limits)
    add = lambda place: partial(model.load_adapter, str(folders[place]), adapter_name=str(place))
    load = [seconds(add(place)) for place in range(1, len(v))]
    seconds(answer)
    swap, answers = [], []
    for place in range(len(v)):
        swap.append(seconds(partial(model.set_adapter, str(place))))
        answers.append(seconds(answer))
    result = {
        "PEFT, one after the other: tokens per second": len(v) * new_tokens / (sum(swap) + sum(answers)),
        "PEFT, set_adapter, ms": 1e3 * statistics.median(swap),
    }
    return result | ({"PEFT, load_adapter, ms": 1e3 * statistics.median(load)} if load else {})


def compare_generation(model: common.Model, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compares full-length generation with transformers or Tunix's sampler."""
    ours, count = our_generate(model, rows), FLAGS.prompts * FLAGS.samples * FLAGS.new_tokens
    table: dict[str, Any] = {"ours, seconds": ours, "ours, tokens per second": count / ours}
    if not installed():
        return table
    if FLAGS.what == "generate":
        theirs, name = their_generate(rows), "transformers"
    else:
        name = f"Tunix {version('google-tunix')}"
        draw = tunix_peer.sampler(
            tunix_peer.qwen2(model.config, model.policy.params), rows, FLAGS.samples, FLAGS.new_tokens
        )
        drawn: list[int] = []
        theirs = timed(lambda i: drawn.append(sum(map(len, draw(i)))))
        if set(drawn) != {count}:
            raise ValueError(f"{name} generated {drawn} tokens, expected {count}; the comparison is invalid")
    return table | {f"{name}, seconds": theirs, f"{name}, tokens per second": count / theirs, "ratio": theirs / ours}


def compare_steps(model: common.Model, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compares a whole step with TRL and PEFT's TinyLoRA, or with Tunix's LoRA of rank 1."""
    ours, mean_tokens = our_step(model, rows)
    table: dict[str, Any] = {"ours, seconds a step": ours, "ours, tokens an answer": mean_tokens}
    if not installed():
        return table
    if FLAGS.what == "grpo":
        name, (theirs, trained) = "TRL + PEFT", their_step()
    else:
        name, steps = f"Tunix {version('google-tunix')}", tunix_step(model, rows)
        theirs, trained = statistics.median(steps.seconds[1:]), steps.trained
        table[f"{name}, tokens an answer"] = steps.mean_tokens
    return table | {f"{name}, seconds a step": theirs, f"{name}, parameters": trained, "ratio": theirs / ours}


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring(alone=True):
        model = common.load()
        if model.tokenizer is None:
            raise ValueError("--model: peers need a model with a tokenizer, not random weights")
        compare = compare_steps if FLAGS.what.endswith("grpo") else compare_generation
        table = {
            "model": model.name,
            "dtype": str(common.dtype()),
            "prompts × samples, longest": f"{FLAGS.prompts} × {FLAGS.samples}, {FLAGS.new_tokens}",
            **compare(model, encoded(model.tokenizer)),
        }
    common.report(f"peers: {FLAGS.what}", table)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_enum("what", "generate", list(NEEDED), "Comparison to run.")
    flags.DEFINE_integer("prompts", 4, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Number of completions per prompt.", lower_bound=2)
    flags.DEFINE_integer("micro_batch", 64, "Number of completions the peer differentiates at once.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "Longest completion, in tokens; without a step, its length.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
