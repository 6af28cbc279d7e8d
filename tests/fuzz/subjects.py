"""Everything that reads what comes from outside: how to make a sound example, and how to read it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
from gguf_files import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.common.combining import ReportError, checked_report, points_of, read_runs
from experiments.compare import CompareError
from experiments.compare import read as read_evaluation
from experiments.plot import PlotError, checked_curves, read_run
from experiments.report import runs_table
from tinylora_jax.adapters import LoRA, Target, TinyLoRA, factorize
from tinylora_jax.data import DataError, DataSpec, get_template, load_questions, render
from tinylora_jax.files import read_at_most
from tinylora_jax.io._checkpoint import CheckpointError, Checkpoints
from tinylora_jax.io._pretrained import _folder_tokenizer
from tinylora_jax.io._run_log import RunLog, WorkdirError
from tinylora_jax.io.adapter._file import AdapterError, load_adapter, read_adapter, save_adapter
from tinylora_jax.io.adapter._fingerprint import base_fingerprint
from tinylora_jax.io.gguf._model import load_gguf
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._hub import check_links, open_tensors, read_json, stop_ids
from tinylora_jax.io.hf._safetensors import write_safetensors
from tinylora_jax.io.hf._weights import LazyTensor
from tinylora_jax.io.peft._export import export_tinylora
from tinylora_jax.io.peft._lora import read_lora, save_lora
from tinylora_jax.io.peft._tinylora import PeftError, read_tinylora
from tinylora_jax.training import Optimizer, init_state


@dataclass(frozen=True)
class Subject:
    """A reader.

    Attributes:
      make: writes a sound example to a folder.
      read: reads it; what it returns is compared.
      errors: what it may raise.
      covered: whether a checksum covers all of it, so that damage is an error or changes nothing.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    covered: bool = False


def plain(value: Any) -> Any:
    """A value that can be compared: arrays as their bytes."""
    if isinstance(value, jax.Array | np.ndarray):
        return np.asarray(value).dtype.str, np.shape(value), np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


_MODULES = ("q_proj", "up_proj")
_SPEC = TinyLoRA(u=2, n_tie=2, targets=(Target(".*/kernel"),))


def _params() -> dict[str, Any]:
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
    layers = {
        index: {"self_attn": {"q_proj": {"kernel": draw(index, (8, 12))}}, "mlp": {"up_proj": {"kernel": jnp.eye(8)}}}
        for index in range(2)
    }
    return {"layers": layers}


def _factors() -> Any:
    return factorize(_params(), _SPEC)


def make_adapter(folder: Path) -> None:
    factors = _factors()
    v = jnp.arange(1.0, 1 + factors.num_groups * 2).reshape(-1, 2)
    about = {"config": {"template": "plain"}, "steps": 3}
    save_adapter(folder, factors, v, "a/base", "float32", base_fingerprint(_params()), **about)


def read_bare_adapter(folder: Path) -> Any:
    _, v, description = read_adapter(folder)
    if "description_sha256" not in description:
        raise AdapterError("a file from before there was a checksum, of which no damage to all fields can be told")
    return plain([v, description])


def read_whole_adapter(folder: Path) -> Any:
    read_bare_adapter(folder)
    factors, v = load_adapter(folder, _params())
    return plain([v, [[leaf.U, leaf.S, leaf.V, leaf.P] for leaf in factors.leaves.values()]])


def make_peft(folder: Path) -> None:
    factors = _factors()
    export_tinylora(folder, factors, jnp.ones((factors.num_groups, 2)), "a/base")


def read_peft(folder: Path) -> Any:
    found = read_tinylora(folder)
    return plain([found.v, found.modules, found.groups, found.base])


def make_lora(folder: Path) -> None:
    pair = {"right": jnp.ones((8, 2)), "left": jnp.ones((12, 2))}
    path = "layers/0/self_attn/q_proj/kernel"
    save_lora(folder, LoRA(2, 4.0, (Target(path),)), {path: pair}, "a/base", None, steps=1)


def read_lora_folder(folder: Path) -> Any:
    found = read_lora(folder)
    return plain([found.v, found.base, found.spec.rank, found.spec.alpha])


def make_safetensors(folder: Path) -> None:
    for shard in (1, 2):
        tensors = {f"{name}{shard}": LazyTensor((4, 3), lambda: np.ones((4, 3))) for name in "ab"}
        write_safetensors(folder / f"model-0000{shard}-of-00002.safetensors", tensors, "bfloat16")
    names = {f"{name}{shard}": f"model-0000{shard}-of-00002.safetensors" for name in "ab" for shard in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def read_safetensors(folder: Path) -> Any:
    with open_tensors(folder) as tensors:
        return {name: plain(tensor.read()) for name, tensor in tensors.items()}


def read_gguf_model(folder: Path) -> Any:
    model = load_gguf(folder / "m.gguf")
    tensors = {name: plain(tensor.read()) for name, tensor in model.tensors.items()}
    return tensors, model.config, model.stop_tokens, model.tokenizer.encode("hello")


CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eos_token_id": [1, 2],
    "layer_types": ["full_attention"] * 2,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def make_config(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(CONFIG))


def read_config(folder: Path) -> Any:
    return parse_config(read_json(folder / "config.json")), stop_ids(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Split("c", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def make_tokenizer(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def read_tokenizer(folder: Path) -> Any:
    check_links(folder)
    return _folder_tokenizer(folder).encode("abcab")


TEMPLATE = (
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}<|{{ m['role'] }}|>"
    "{{ m.content | trim }}"
    "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}"
)


def make_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def read_template(folder: Path) -> Any:
    tokenizer = _tokenizer()
    try:
        text = read_at_most(folder / "chat_template.jinja", 100_000)
    except (OSError, ValueError):  # whoever loads a tokenizer reads the file, and that is another subject
        return None
    tokenizer.chat_template = text.decode("utf-8", "replace")
    return render(get_template("plain"), "ab", tokenizer)


ROWS = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}", "level": "5", "error": 0.5} for i in range(6)]
DATA = {"tolerance_column": "error", "keep": "level=5"}


def make_rows(folder: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(text)


def make_archive(folder: Path) -> None:
    make_rows(folder)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "a.jsonl").unlink()


def make_parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet", compression="zstd")


def read_questions(name: str) -> Callable[[Path], Any]:
    return lambda folder: load_questions(DataSpec(str(folder / name), **DATA))


_OPTIMIZER = Optimizer(1e-3, total_updates=9).transform()


def _state(value: float) -> Any:
    return init_state(jnp.full((3, 2), value), _OPTIMIZER)


def make_checkpoint(folder: Path) -> None:
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(1, _state(0.5), {"data": {"next": 1}, "totals": {"wall_s": 1.5}})


def read_checkpoint(folder: Path) -> Any:
    with closing(Checkpoints(folder)) as checkpoints:
        if checkpoints.latest_step() is None:
            raise CheckpointError("no complete step: it is done again")
        return plain(jax.tree.leaves(checkpoints.restore(_state(0.0))))


RUN = {"model": "m", "method": "tinylora", "seed": 0, "adapter": {"rank": 2, "tying": "tiled", "u": 1, "n_tie": 1}}
RUN |= {"optimizer": {"learning_rate": 1e-3}, "lora": {"rank": 8}}
_STEP = dict.fromkeys(
    ("reward", "reward_lenient", "length", "truncated", "v_norm", "delta_prob", "rollout_s", "update_s"), 0.5
)
_ACCURACY = {"strict": 0.5, "lenient": 0.5, "mean_tokens": 9.0}


def make_workdir(folder: Path) -> None:
    log = RunLog(folder, RUN)
    rows = [{"step": step, **_STEP, "v": [0.1, 0.2]} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"id": i, "mode": "greedy", "strict": i % 2} for i in range(4)]
    for name in ("answers_before.jsonl", "answers_after.jsonl"):
        log.write_rows(name, answers)
    summary = {"model": "m", "params": 2, "steps": 4, "wall_s": 3.0}
    log.write_json("summary.json", summary | {"eval_before": _ACCURACY, "eval_after": _ACCURACY})
    log.write_json("eval_before.json", _ACCURACY)
    log.close()


def read_workdir(folder: Path) -> Any:
    log = RunLog(folder, RUN)
    try:
        found = log.read_json("summary.json"), log.read_json("eval_before.json")
        log.start(3)
        log.samples(3, "a page")
        log.metrics(3, {"reward": 1.0})
        return found
    finally:
        log.close()


def read_picture(folder: Path) -> Any:
    run = read_run(folder)
    return run.title, plain(run.steps), run.before, run.after


def read_result(folder: Path) -> Any:
    return read_runs("RL", folder)[0]["after"]


_ROW = {"series": "RL", "method": "TinyLoRA", "rank": 2, "params": 13, "tying": "tiled", "u": 1, "n_tie": 1}
_ROW |= {"precision": "float32", "learning_rate": 1e-3, "seed": 0, "steps": 4, "training": 0.5, "accuracy": 0.5}
_ROW |= {"low": 0.4, "high": 0.6, "difference": 0.1, "p": 0.5, "eval": _ACCURACY}


def make_report(folder: Path) -> None:
    base = {"accuracy": 0.4, "low": 0.3, "high": 0.5, "eval": _ACCURACY}
    result = {"model": "m", "questions": 4, "untrained": base, "runs": [_ROW, _ROW | {"seed": 1}]}
    (folder / "report.json").write_text(json.dumps(result))


def read_report(folder: Path) -> Any:
    result = checked_report(folder / "report.json")
    return points_of(result["runs"]), runs_table(result)


def make_curves(folder: Path) -> None:
    curve = {"label": "a", "runs": ["x", "y"], "steps": [3, 3], "values": [[0.1, 0.2, 0.3]] * 2}
    curve |= {"mean": [0.1, 0.2, 0.3], "se": [0.0, 0.1, 0.1], "trained": [0.5]}
    (folder / "curves.json").write_text(
        json.dumps({"model": "m", "metric": "reward", "untrained": 0.4, "curves": [curve]})
    )


def read_curves(folder: Path) -> Any:
    return checked_curves(folder / "curves.json")


def make_evaluation(folder: Path) -> None:
    result = {"data": "d", "template": "plain", "reward": "hash", "max_new_tokens": 9, "sampled": {"samples": 2}}
    (folder / "e.json").write_text(json.dumps(result))
    rows = [
        {"set": "d", "id": i, "mode": "greedy", "question": "q", "answer": "1", "strict": 1.0, "lenient": 1.0}
        for i in range(3)
    ]
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_comparison(folder: Path) -> Any:
    found = read_evaluation(folder / "e.json")
    return found.how, found.decoding, found.asked, found.grades


_MODEL = (FileNotFoundError, OSError, ValueError)
SUBJECTS = {
    "adapter": Subject(make_adapter, read_bare_adapter, (AdapterError,), covered=True),
    "adapter and model": Subject(make_adapter, read_whole_adapter, (AdapterError,), covered=True),
    "PEFT": Subject(make_peft, read_peft, (PeftError, *_MODEL)),
    "LoRA": Subject(make_lora, read_lora_folder, (PeftError, *_MODEL)),
    "safetensors": Subject(make_safetensors, read_safetensors, _MODEL),
    "GGUF": Subject(lambda folder: write_gguf(folder / "m.gguf") and None, read_gguf_model, _MODEL),
    "config": Subject(make_config, read_config, _MODEL),
    "tokenizer": Subject(make_tokenizer, read_tokenizer, _MODEL),
    "template": Subject(make_template, read_template, (DataError,)),
    "jsonl": Subject(make_rows, read_questions("a.jsonl"), (DataError,)),
    "jsonl.gz": Subject(make_archive, read_questions("a.jsonl.gz"), (DataError,)),
    "parquet": Subject(make_parquet, read_questions("a.parquet"), (DataError,)),
    "checkpoint": Subject(make_checkpoint, read_checkpoint, (CheckpointError,), covered=True),
    "workdir": Subject(make_workdir, read_workdir, (WorkdirError,)),
    "picture": Subject(make_workdir, read_picture, (PlotError,)),
    "result": Subject(make_workdir, read_result, (ReportError,)),
    "report": Subject(make_report, read_report, (ReportError,)),
    "curves": Subject(make_curves, read_curves, (PlotError,)),
    "evaluation": Subject(make_evaluation, read_comparison, (CompareError, DataError)),
}
