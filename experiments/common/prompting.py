"""Loads a model together with the adapters that answer the same prompts in one batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.common.cli import NOT_IN_CACHE
from experiments.common.meshes import on_mesh
from experiments.common.progress import tell
from experiments.common.wording import paragraph
from tinylora_jax.adapters import CombinationError, Space, Trained
from tinylora_jax.data import TEMPLATES, get_template
from tinylora_jax.io import Pretrained, SavedAdapter, open_pretrained, open_saved, policy_together
from tinylora_jax.io.adapter import SavedOffsets
from tinylora_jax.io.hf import NotInCacheError
from tinylora_jax.models import param_shardings, policy_shardings

BASE = "base"  # stands for the model without an adapter; write ./base for a folder of that name
_adapted = jax.jit(lambda policy, v: policy(v))
_Saved: TypeAlias = SavedAdapter | SavedOffsets


class InputError(ValueError):
    """A flag or a prompt cannot be used."""


@dataclass(frozen=True)
class Answering:
    """A model and the adapters that answer prompts.

    Attributes:
      base: base model.
      names: displayed names of the adapters.
      templates: name of each adapter's prompt template.
      policy: policy whose space contains the adapters; None without adapters.
      vectors: v of each adapter, with a leading axis of adapters; zeros for the base model.
      mesh: devices that hold the weights; None for a single device.
    """

    base: Pretrained
    names: tuple[str, ...]
    templates: tuple[str, ...]
    policy: Space | None
    vectors: Trained
    mesh: Mesh | None = None

    def weights(self, prompts: int) -> Any:
        """The weights for prompt-major rows: every prompt with every adapter."""
        if self.policy is None:
            return self.base.params
        one = len(self.names) == 1
        rows = lambda x: jnp.asarray(x[0] if one else np.tile(x, (prompts, *(1,) * (x.ndim - 1))))
        return _adapted(self.policy, jax.tree.map(rows, self.vectors))


def short_names(adapters: Sequence[str]) -> tuple[str, ...]:
    """Shortens folder names by their common prefix and suffix.

    >>> short_names(["/tmp/a/adapter", "/tmp/b/adapter", "base"])
    ('a', 'b', 'base')
    """
    paths = {name: Path(name).absolute().parts for name in adapters if name != BASE}
    start = len(os.path.commonprefix(list(paths.values()))) if len(paths) > 1 else 0
    rest = {name: parts[start:] for name, parts in paths.items()}
    end = len(os.path.commonprefix([parts[::-1] for parts in rest.values()])) if len(paths) > 1 else 0
    shown = {
        name: "/".join(parts[: len(parts) - end] if len(paths) > 1 else parts[-1:]) for name, parts in rest.items()
    }
    return tuple(shown.get(name) or name for name in adapters)


def load(
    model: str | None,
    adapters: Sequence[str],
    dtype: Any,
    template: str | None = None,
    download: bool = False,
    quantize: str | None = None,
    mesh: Callable[[Pretrained, str], Mesh | None] = lambda model, quantize: None,
) -> Answering:
    """Loads the model and reads its adapters.

    Args:
      model: source of the model, as for `load_pretrained`; None uses the base model named in the adapters.
      adapters: folders of adapters, or `base`; empty for the base model only.
      dtype: dtype of the weights.
      template: name of the prompt template; None uses each adapter's own.
      download: whether a base model named only by the adapters, and so chosen by their author, may be downloaded.
      quantize: storage of the weights, as for `load_pretrained`; None for that of the first adapter's training. `none`
        transfers adapters that were trained on a quantized base to the base in 16 bit.
      mesh: function from the model without its weights, and their storage, to the mesh; None for a single device.

    Raises:
      AdapterError, PeftError: an adapter is damaged or was trained on another model.
      InputError: no model is named, an adapter is repeated, or adapters cannot share a batch.
    """
    adapters = list(adapters) or [BASE]
    if twice := sorted({name for name in adapters if adapters.count(name) > 1}):
        raise InputError(f"--adapter={twice[0]} is given twice; use --samples for several answers of one adapter")
    folders = [name for name in adapters if name != BASE]
    trained = {name: open_saved(Path(name), transfer=quantize == "none") for name in folders}
    quantize = quantize or next((each.quantize for each in trained.values()), "none")
    shown = short_names(adapters)
    templates = _templates(shown, [trained.get(name) for name in adapters], template)
    _check_alike(trained, model)
    named = next((each.base for each in trained.values() if each.base is not None), None)
    if model is None and named is None:
        where = "the adapter does not name its base model" if trained else "without an adapter it is required"
        raise InputError(f"--model is missing: {where}; set it to a hub id, a folder or a .gguf file")
    tell(f"loading {model or named}")
    base, chosen = _base(model, named, dtype, download, quantize, mesh)
    if not trained:
        return Answering(base, (BASE,), templates, None, None, chosen)
    tell("loading the adapters")
    with on_mesh(chosen):
        try:
            policy, read = policy_together(base.params, list(trained.values()))
        except CombinationError as error:
            raise InputError(f"the adapters cannot share a batch: {error}; run a separate command for each") from error
        policy = policy if chosen is None else jax.device_put(policy, policy_shardings(chosen, policy))
        by_name = dict(zip(trained, read, strict=True)) | {BASE: policy.init()}
    vectors = jax.tree.map(lambda *each: np.stack(each), *(by_name[name] for name in adapters))
    return Answering(replace(base, params=policy.params), shown, templates, policy, vectors, chosen)


def _base(
    model: str | None,
    named: str | None,
    dtype: Any,
    download: bool,
    quantize: str,
    mesh: Callable[[Pretrained, str], Mesh | None],
) -> tuple[Pretrained, Mesh | None]:
    """Loads the base model, and places it on its mesh: `model`, or the one that is named in the adapters."""
    try:
        opened = open_pretrained(model or named or "", dtype, download or model is not None, quantize)
        chosen = mesh(opened.abstract, opened.quantize)
        with on_mesh(chosen), opened.reading(chosen and partial(param_shardings, chosen)) as reading:
            return replace(opened.abstract, params=reading.result()), chosen
    except NotInCacheError as error:
        raise InputError(f"the adapter names the base model {named!r}, which {NOT_IN_CACHE}") from error
    except (FileNotFoundError, ValueError) as error:
        if model is None:
            raise InputError(f"{error} (the adapter names its base {named!r}; set --model to its path)") from error
        raise


def _check_alike(adapters: Mapping[str, _Saved], model: str | None) -> None:
    """Raises an error for adapters that cannot share a batch, before anything is loaded."""
    for first, one in list(adapters.items())[:1]:
        for name, other in adapters.items():
            (theirs, key), (ours, expected) = other.shape, one.shape
            if key != expected:
                raise InputError(
                    f"{name} adapts {theirs}, but {first} {ours}; adapters in one batch need the same rank and weights,"
                    " or are all offsets, so run a separate command for each"
                )
            if model is None and None not in (one.base, other.base) and other.base != one.base:
                raise InputError(
                    f"{name} was trained on {other.base!r}, but {first} on {one.base!r}; run a separate command for"
                    " each, or name the model of both with --model"
                )


def _templates(names: Sequence[str], adapters: Sequence[_Saved | None], given: str | None) -> tuple[str, ...]:
    """Chooses each adapter's template: the given one, else its own, else the first one that any adapter names."""
    if given is not None:
        get_template(given)
        return (given,) * len(adapters)
    own = [adapter.template if adapter else None for adapter in adapters]
    for name, template in zip(names, own, strict=True):
        if template is not None and template not in TEMPLATES:
            raise InputError(
                f"{name} was trained with the template {template!r:.60}, which is unknown; choose one of"
                f" {', '.join(TEMPLATES)} with --template"
            )
    first = next(filter(None, own), None)
    found = tuple(template or first or "plain" for template in own)
    if first:
        users = lambda template: ", ".join(name for name, its in zip(names, found, strict=True) if its == template)
        said = "; ".join(f"{template} ({users(template)})" for template in dict.fromkeys(found))
        tell(paragraph(f"templates from training: {said}; change with --template"))
    return found
