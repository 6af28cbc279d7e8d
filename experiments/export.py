"""Writes a trained adapter in another form.

    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=peft-tinylora --output=/tmp/peft
    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=peft-lora --output=/tmp/lora

`peft-tinylora` is what `PeftModel.from_pretrained` loads as TinyLoRA, `peft-lora` plain LoRA of the same rank, which
PEFT, vLLM and SGLang load. Both hold the same ΔW. The base model is loaded to compute its factors, by the name in the
adapter unless --model gives another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags

from experiments.cli import parse_flags, reporting_errors, tell, use_compilation_cache
from tinylora_jax.io.adapter_file import load_adapter, read_adapter
from tinylora_jax.io.peft import export_lora, export_tinylora
from tinylora_jax.io.pretrained import load_pretrained

FLAGS = flags.FLAGS
_WRITERS = {"peft-tinylora": export_tinylora, "peft-lora": export_lora}


def export(adapter: Path, to: str, output: Path, model: str | None = None) -> None:
    """Writes an adapter as a PEFT folder.

    Args:
      adapter: folder with `vector.bin` and `adapter.json`.
      to: `peft-tinylora` or `peft-lora`.
      output: folder to make; refused if there is something in it.
      model: the base model, as `load_pretrained` takes it; None takes the adapter's own name for it.

    Raises:
      AdapterError: the adapter is damaged, or belongs to another base model.
      FileExistsError: the folder is not empty.
    """
    _, _, description = read_adapter(adapter)  # what is wrong with the files is said before the model is loaded
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; name a new folder with --output")
    base = model or str(description["base"])
    tell(f"loading {base}")
    trained_on = (description["base_fingerprint"] or {}).get("dtype")
    dtype = jnp.dtype(trained_on if trained_on in ("bfloat16", "float16") else "float32")
    pretrained = load_pretrained(base, dtype)
    tell("factorizing its weights")
    factors, v = load_adapter(adapter, pretrained.params)
    _WRITERS[to](output, factors, v, base)


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with reporting_errors():
        export(Path(FLAGS.adapter), FLAGS.to, Path(FLAGS.output), FLAGS.model)
    print(f"written to {FLAGS.output}")


if __name__ == "__main__":
    flags.DEFINE_string("adapter", None, "Folder of a trained adapter.")
    flags.DEFINE_enum("to", None, list(_WRITERS), "Form to write.")
    flags.DEFINE_string("output", None, "Folder to make.")
    flags.DEFINE_string("model", None, "The base model, if not by the name in the adapter: `config.model` of its run.")
    flags.mark_flags_as_required(["adapter", "to", "output"])
    app.run(main, flags_parser=parse_flags)
