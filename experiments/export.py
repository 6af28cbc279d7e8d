"""Writes a trained adapter in another form.

    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=merged --output=/tmp/merged
    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=peft-tinylora --output=/tmp/peft
    python -m experiments.export --adapter=/tmp/peft --to=peft-lora --output=/tmp/lora
    python -m experiments.export --adapter=/tmp/peft --to=tinylora --output=/tmp/adapter

`merged` is a model folder with W + ΔW, config and tokenizer, which transformers, vLLM and SGLang load. `peft-tinylora`
is what `PeftModel.from_pretrained` loads as TinyLoRA, `peft-lora` plain LoRA of the same rank, which PEFT, vLLM and
SGLang load; `tinylora` is our own folder, from one of PEFT's. All hold the same ΔW. The adapter may be a run's or
PEFT's own TinyLoRA. The base model is loaded by the name in the adapter unless --model gives another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.common.cli import NOT_IN_CACHE, define_path, parse_flags, reporting_errors, tell, use_compilation_cache
from tinylora_jax.io import Pretrained, SavedAdapter, load_pretrained, new_folder, open_adapter
from tinylora_jax.io.adapter import base_fingerprint, save_adapter
from tinylora_jax.io.hf import NotInCacheError, export_merged, rounding_loss
from tinylora_jax.io.peft import export_lora, export_tinylora

FLAGS = flags.FLAGS
_PEFT = {"peft-tinylora": export_tinylora, "peft-lora": export_lora}
_LOSS_TOLD = 0.01


def export(
    adapter: Path, to: str, output: Path, model: str | None = None, dtype: str = "float32", download: bool = False
) -> None:
    """Writes an adapter as a PEFT folder, as one of ours, or a model merged with it.

    Args:
      adapter: folder with `vector.bin` and `adapter.json`, or PEFT's with `adapter_config.json`.
      to: `merged`, `peft-tinylora`, `peft-lora` or `tinylora`.
      output: folder to make; refused if there is something in it. After an error nothing is left there.
      model: the base model, as `load_pretrained` takes it; None takes the adapter's own name for it.
      dtype: dtype of merged weights, or of the vector in our own folder.
      download: whether a base that the adapter alone names may be downloaded: whoever made it chose it.

    Raises:
      AdapterError, PeftError: the adapter is damaged, or belongs to another base model.
      ValueError: the dtype is not for this form, or the base model is not named.
      FileExistsError: the folder is not empty, or lies in the adapter's.
    """
    if to in _PEFT and dtype != "float32":
        raise ValueError(f"--dtype={dtype}: {to} is written in float32, as PEFT adds it; leave --dtype out")
    trained = open_adapter(adapter)
    if output.resolve().is_relative_to(adapter.resolve()):
        raise FileExistsError(f"{output} lies in the adapter's own folder; name another with --output")
    base = model or trained.base
    if base is None:
        raise ValueError(f"{adapter} does not name its base model; give it with --model")
    with new_folder(output) as folder:
        tell(f"loading {base}")
        try:
            pretrained = load_pretrained(base, jnp.dtype(trained.dtype), download=download or model is not None)
        except NotInCacheError as error:
            raise ValueError(f"{adapter} calls its base {base!r}, which {NOT_IN_CACHE}") from error
        tell("reading or computing the factors")
        if to == "tinylora":
            return _save(folder, trained, pretrained, base, dtype)
        factors = trained.factors(pretrained.params, "auto")
        tell(f"writing {to}")
        if to != "merged":
            return _PEFT[to](folder, factors, trained.v, base)
        loss = rounding_loss(pretrained.params, factors, trained.v, dtype)
        if loss > _LOSS_TOLD:
            tell(
                f"warning: rounding to {dtype} is off by {loss:.0%} of the update's size;"
                f"{' the trained change is mostly lost:' if loss > 0.5 else ''} --dtype=float32 keeps it"
            )
        export_merged(folder, pretrained, factors, trained.v, dtype)


def _save(folder: Path, trained: SavedAdapter, pretrained: Pretrained, base: str, dtype: str) -> None:
    """Our own folder: P, and only what else cannot be computed again, travel with the vector."""
    factors, v = trained.own(pretrained.params)
    v = np.asarray(v)
    loss = np.linalg.norm(v - v.astype(jnp.dtype(dtype)).astype(v.dtype)) / max(np.linalg.norm(v), 1e-30)
    if loss:
        tell(f"rounding to {dtype} moves the vector by {loss:.2%} of its length; --dtype=float32 keeps it")
    save_adapter(folder, factors, jnp.asarray(v), base, dtype, base_fingerprint(pretrained.params), **trained.about)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with reporting_errors():
        export(Path(FLAGS.adapter), FLAGS.to, Path(FLAGS.output), FLAGS.model, FLAGS.dtype, FLAGS.allow_download)
    print(f"written to {FLAGS.output}")


if __name__ == "__main__":
    define_path("adapter", "Folder of a trained adapter, ours or PEFT's TinyLoRA.")
    flags.DEFINE_enum("to", None, ["merged", "tinylora", *_PEFT], "Form to write.")
    define_path("output", "Folder to make.")
    flags.DEFINE_string("model", None, "The base model, if not by the name in the adapter: `config.model` of its run.")
    flags.DEFINE_bool("allow_download", False, "Download the base that the adapter names if it is not in the cache.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of merged weights, or of our vector.")
    flags.mark_flags_as_required(["adapter", "to", "output"])
    app.run(main, flags_parser=parse_flags)
