"""Converts a trained adapter to another format.

    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=merged --output=/tmp/merged
    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --to=peft-tinylora --output=/tmp/peft
    python -m experiments.export --adapter=/tmp/peft --to=peft-lora --output=/tmp/lora
    python -m experiments.export --adapter=/tmp/peft --to=tinylora --output=/tmp/adapter
    python -m experiments.export --adapter=/tmp/steering/adapter --to=merged --output=/tmp/steered
    python -m experiments.export --adapter=/tmp/tinylora-demo/adapter --push=me/sums --dry_run

`merged` is a model folder with W + ΔW, config and tokenizer, for transformers, vLLM and SGLang. `peft-tinylora` is a
folder that `PeftModel.from_pretrained` loads as TinyLoRA. `peft-lora` is plain LoRA of the same rank, for PEFT, vLLM
and SGLang. `tinylora` is this project's format. All contain the same ΔW. The input may come from a run or be a PEFT
TinyLoRA adapter. The base model is loaded by its name in the adapter, unless --model gives another.

Offsets (`steering`, `bias`, `norm`) become biases and scales of a `merged` model. `peft-lora` is then LoRA with a bias,
for offsets of outputs, and `peft-ln-tuning` PEFT's LN tuning, for scales of norms. Only PEFT loads these two.

--push uploads the adapter to the Hugging Face hub as `tinylora` and as `peft-lora`, with a model card, in one commit.
Every command then takes it as --adapter=hub:me/sums. Log in with `hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    _FORMATS = ("merged", "tinylora", "peft-tinylora", "peft-lora", "peft-ln-tuning")
    opening.define_path("adapter", "Folder, URL or hub:owner/name of an adapter, also in PEFT's TinyLoRA.", url=True)
    flags.DEFINE_enum("to", None, list(_FORMATS), "Format to write.")
    opening.define_path("output", "Folder or URL to create.", url=True)
    flags.DEFINE_string("model", None, "Load this base model. Default: the one named in the adapter.")
    flags.DEFINE_bool("allow_download", False, "Download the base model named in the adapter if it is not cached.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of merged weights or of the vector.")
    _about = "Storage of the base model. Default: that of training."
    flags.DEFINE_enum("quantize", None, ["none", "int8", "int4"], _about)
    flags.DEFINE_string("push", None, "Upload to this repository of the hub, <user>/<name>, instead of --to.")
    flags.DEFINE_bool("private", False, "Make a new repository of --push private.")
    flags.DEFINE_string("licence", None, "Licence for the model card of --push, such as apache-2.0.")
    flags.DEFINE_bool("dry_run", False, "Show the model card and the files of --push, and upload nothing.")
    flags.mark_flag_as_required("adapter")
    opening.begin(__doc__)

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.common.cli import NOT_IN_CACHE, fail, reporting_errors, use_compilation_cache
from experiments.common.closing import block, next_lines
from experiments.common.licences import check_licence
from experiments.common.meshes import find_devices
from experiments.common.opening import parse_flags
from experiments.common.places import adapter_of, new_folder_of
from experiments.common.progress import tell
from experiments.common.pushing import push
from experiments.common.serving import vllm_command
from tinylora_jax.adapters import Factors, scheme_of
from tinylora_jax.files import read_json
from tinylora_jax.hub import HubError
from tinylora_jax.io import Pretrained, SavedAdapter, load_pretrained, new_folder, open_adapter, open_saved
from tinylora_jax.io.adapter import SavedOffsets, base_fingerprint, save_adapter
from tinylora_jax.io.hf import NotInCacheError, check_push, export_merged, export_offsets, rounding_loss
from tinylora_jax.io.peft import export_ln_tuning, export_lora, export_output_offsets, export_tinylora

FLAGS = flags.FLAGS
_PEFT = {"peft-tinylora": export_tinylora, "peft-lora": export_lora}
_PEFT_OFFSETS = {"peft-lora": export_output_offsets, "peft-ln-tuning": export_ln_tuning}
_LOSS_TOLD = 0.01


def export(
    adapter: Path,
    to: str,
    output: Path,
    model: str | None = None,
    dtype: str = "float32",
    download: bool = False,
    quantize: str | None = None,
    name: str | None = None,
) -> str | None:
    """Writes an adapter as a PEFT folder, in this project's format, or merged into its model.

    Args:
      adapter: folder with `vector.bin` and `adapter.json`, folder with offsets, PEFT folder with `adapter_config.json`,
        or `hub:owner/name`.
      to: output format: `merged`, `peft-tinylora`, `peft-lora`, `peft-ln-tuning` or `tinylora`.
      output: output folder, which must be absent or empty. After an error nothing is left there.
      model: source of the base model, as for `load_pretrained`; None uses the name in the adapter.
      dtype: dtype of merged weights, or of the vector in this project's format.
      download: whether a base model named only by the adapter, and so chosen by its author, may be downloaded.
      quantize: storage of the base model, as for `load_pretrained`; None for that in training. `none` merges an adapter
        that was trained on a quantized base into the original weights.
      name: name of the base model in the output; None for the source from which it is loaded.

    Returns:
      The name of the prompt template of its training, if the adapter states it.

    Raises:
      AdapterError, PeftError: the adapter is damaged, or belongs to another base model.
      ValueError: the format cannot contain the adapter, the dtype does not apply to it, or no base model is named.
      FileExistsError: the output folder is not empty, or is inside the adapter's folder.
    """
    if to.startswith("peft") and dtype != "float32":
        raise ValueError(f"--dtype={dtype}: {to} is always float32, as in PEFT; omit --dtype")
    trained = open_saved(adapter, transfer=quantize == "none")
    known = ("merged", *(_PEFT_OFFSETS if isinstance(trained, SavedOffsets) else ("tinylora", *_PEFT)))
    if to not in known:
        raise ValueError(f"--to={to}: this format cannot contain {adapter}; choose {' or '.join(known)}")
    quantize = quantize or trained.quantize
    if to == "tinylora" and quantize != trained.quantize:
        raise ValueError(f"--quantize={quantize}: {to} keeps the base of training, {trained.quantize}; omit --quantize")
    if output.resolve().is_relative_to(adapter.resolve()):
        raise FileExistsError(f"{output} is inside the adapter's folder; choose another --output")
    base = model or trained.base
    if base is None:
        raise ValueError(f"{adapter} does not name its base model; set --model")
    with new_folder(output) as folder:
        tell(f"loading {base}")
        try:
            allowed = download or model is not None
            pretrained = load_pretrained(base, jnp.dtype(trained.dtype), download=allowed, quantize=quantize)
        except NotInCacheError as error:
            raise ValueError(f"{adapter} names the base model {base!r}, which {NOT_IN_CACHE}") from error
        if to == "merged" and (scheme := scheme_of(pretrained.params)) != "none":
            stored = "quantization_config" in (pretrained.hf_config or {})  # such a file has no other weights
            advice = "" if stored else "; --quantize=none takes the originals"
            tell(f"merging into the weights of training, restored from {scheme}{advice}")
        if to.startswith("peft") and trained.quantize != "none":
            tell(
                f"the adapter was trained on {trained.quantize}; {to} does not record it. It adds the same update to"
                " whatever storage of the base is loaded: measure the score there"
            )
        tell("loading the adapter")
        if isinstance(trained, SavedOffsets):
            _write_offsets(folder, to, trained, pretrained, name or base, dtype)
        elif to == "tinylora":
            _save(folder, trained, pretrained, name or base, dtype)
        else:
            factors = trained.factors(pretrained.params, "auto")
            tell(f"writing {to}")
            if to == "merged":
                _merge(folder, pretrained, trained, factors, dtype)
            else:
                _PEFT[to](folder, factors, trained.v, name or base)
    return trained.template


def _write_offsets(folder: Path, to: str, trained: SavedOffsets, pretrained: Pretrained, base: str, dtype: str) -> None:
    """Writes offsets in a format that can contain them."""
    trained.policy(pretrained.params)  # raises for another base model
    tell(f"writing {to}")
    if to == "merged":
        _warn_of_rounding(export_offsets(folder, pretrained, trained.v, dtype), dtype)
    else:
        _PEFT_OFFSETS[to](folder, pretrained.params, trained.v, base)


def _merge(folder: Path, pretrained: Pretrained, trained: SavedAdapter, factors: Factors, dtype: str) -> None:
    """Writes the model with the adapter in its weights, and says what rounding loses."""
    _warn_of_rounding(rounding_loss(pretrained.params, factors, trained.v, dtype), dtype)
    export_merged(folder, pretrained, factors, trained.v, dtype)


def _warn_of_rounding(loss: float, dtype: str) -> None:
    """Says how much of the update a rounding loses, unless it is little."""
    if loss > _LOSS_TOLD:
        tell(
            f"warning: rounding to {dtype} has an error of {loss:.0%} of the update's size;"
            f"{' the trained change is mostly lost;' if loss > 0.5 else ''} --dtype=float32 keeps it"
        )


def _save(folder: Path, trained: SavedAdapter, pretrained: Pretrained, base: str, dtype: str) -> None:
    """Writes this project's format, with P and those factors that cannot be recomputed."""
    factors, v = trained.own(pretrained.params)
    v = np.asarray(v)
    loss = np.linalg.norm(v - v.astype(jnp.dtype(dtype)).astype(v.dtype)) / max(np.linalg.norm(v), 1e-30)
    if loss:
        tell(f"rounding to {dtype} changes the vector by {loss:.2%} of its length; --dtype=float32 keeps it")
    save_adapter(folder, factors, jnp.asarray(v), base, dtype, base_fingerprint(pretrained.params), **trained.about)


def _check_flags() -> None:
    """Ends the command unless the flags name an export or an upload."""
    named = {name: getattr(FLAGS, name) for name in ("to", "output")}
    if FLAGS.push is None:
        if missing := [f"--{name}" for name, value in named.items() if value is None]:
            fail(f"{' and '.join(missing)} missing: {FLAGS[missing[0][2:]].help} Or set --push. --help shows examples")
        if given := [f"--{name}" for name in ("private", "licence", "dry_run") if getattr(FLAGS, name)]:
            fail(f"{given[0]} needs --push, the repository to upload to")
        return
    named |= {"quantize": FLAGS.quantize, "dtype": None if FLAGS.dtype == "float32" else FLAGS.dtype}
    if given := [f"--{name}" for name, value in named.items() if value is not None]:
        fail(f"--push uploads tinylora and peft-lora together, as they were trained; omit {' and '.join(given)}")
    try:
        check_push(FLAGS.push)
    except HubError as error:
        fail(f"--push: {error}")
    try:
        check_licence(FLAGS.licence or "other")
    except ValueError as error:
        fail(f"--licence: {error}")


def _push(adapter: Path) -> str:
    """Uploads the adapter as the flags say; returns the end of the command."""
    trained = open_adapter(adapter)
    name = trained.base and (trained.base if not trained.base.startswith(("/", "~", ".")) else Path(trained.base).name)
    how = {"model": FLAGS.model, "download": FLAGS.allow_download, "name": name}  # paths stay private
    write = lambda folder, to: export(adapter, to, folder, **how)
    options = {"private": FLAGS.private, "licence": FLAGS.licence, "dry_run": FLAGS.dry_run}
    return push(adapter, trained, FLAGS.push, write, **options)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    use_compilation_cache()
    _check_flags()
    adapter = adapter_of(FLAGS.adapter)
    with reporting_errors():
        find_devices()
        if FLAGS.push is not None:
            print(_push(adapter))
            return
        how = FLAGS.model, FLAGS.dtype, FLAGS.allow_download, FLAGS.quantize
        with new_folder_of(FLAGS.output) as output:
            template = export(adapter, FLAGS.to, output, *how)
            commands = next_commands(FLAGS.to, output, template, FLAGS.output)
    print(block(f"written to {FLAGS.output}", next_lines(commands)))


def next_commands(to: str, folder: Path, template: str | None, name: str | None = None) -> list[tuple[str, list[str]]]:
    """What can be done with an export; other formats than this project's do not keep the template of the training.

    Args:
      to: format of the export.
      folder: local folder of the export.
      template: name of the prompt template of the training; None if unknown.
      name: name of the export in the commands, such as its URL; None for the folder.
    """
    asked, shown = [f"--template={template}"] if template else [], name or str(folder)
    generate = ["python", "-m", "experiments.generate"]
    if to == "merged":
        return [("ask it", [*generate, f"--model={shown}", *asked]), ("serve it", ["vllm", "serve", shown])]
    config = read_json(folder / "adapter_config.json", 2**20) if to == "peft-lora" else {}
    if to == "peft-ln-tuning" or config.get("lora_bias"):
        return []  # only PEFT loads it
    if to == "peft-lora":
        return [("serve it", vllm_command(config["base_model_name_or_path"], shown, config["r"]))]
    return [("ask it", [*generate, f"--adapter={shown}", *(asked if to == "peft-tinylora" else [])])]


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
