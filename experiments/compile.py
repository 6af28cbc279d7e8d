"""Compiles every program of a run for a TPU, on a machine without one, and reports estimates.

    python -m experiments.compile --config=gsm8k_qwen2_5_7b --topology=v5e:2x4
    python -m experiments.compile --config=gsm8k_qwen2_5_7b --topology=v5e:2x2 --topology=v5e:2x4 --suggest

This needs neither weights nor a TPU, only `pip install -e '.[tpu]'`. For each program it reports compilation time,
memory per device, operations, communication between devices, and an estimated run time next to the limits of memory
bandwidth and matrix units. --topology may be repeated. --mesh=data,fsdp,tensor and any --config.field=value change the
run. --suggest tries meshes and sizes, and names the cheapest that fits.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the machine's own devices are not used
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # avoids querying the cloud for devices
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    opening.define_config("Config of the run: a name such as demo, or a file.")
    flags.DEFINE_multi_string("topology", ["v5e:2x4"], "TPU topology, such as v5e:2x4 or v5p:2x2x1; may be repeated.")
    flags.DEFINE_string("mesh", None, "Mesh sizes data,fsdp,tensor. Default: config.mesh (0: choose by memory).")
    opening.define_path("model_config", "Known architecture or path of a config.json. Default: that of config.model.")
    opening.define_path("json", "Also write the result to this file.")
    _programs = ("factorize", "rollout", "decode", "update", "optimizer")
    flags.DEFINE_multi_enum("only", [], _programs, "Compile only this program; may be repeated.")
    flags.DEFINE_bool("suggest", False, "Find a mesh and sizes that fit; list cheaper topologies first.")
    opening.begin(__doc__)

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from experiments.aot.chips import Topology, larger, topology
from experiments.aot.programs import Case, compile_all
from experiments.aot.report import print_table, summary
from experiments.aot.suggest import search
from experiments.common.architectures import described
from experiments.common.cli import reporting_errors
from experiments.common.fitting import fit, with_storage
from experiments.common.meshes import mesh_words, parse_mesh
from experiments.common.opening import parse_flags
from experiments.common.progress import tell
from experiments.common.specs import parse
from tinylora_jax.files import write_atomically
from tinylora_jax.models import MeshSpec

FLAGS = flags.FLAGS


def make_case(config: ConfigDict, model: str | None, target: Topology, spec: MeshSpec) -> Case:
    """Builds a run on a topology; mesh and slots that the config leaves open follow from a chip's memory."""
    (shape, quantize), memory = described(model or config.model, config.quantize), target.chip.hbm_bytes
    fitted = with_storage(config, quantize)
    found = fit(shape, fitted, spec, target.devices, memory)
    fitted.slots = found.slots
    return Case(fitted, parse(fitted), shape, found.mesh.make(target.devices), memory, model or "")


def run(
    config: ConfigDict, names: Sequence[str], mesh: str | None, model: str | None, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compiles a run for every topology, and prints a table for each.

    Raises:
      TopologyError: a topology name is unknown, or the compiler is not installed.
      ValueError: the mesh or a size does not fit, or the architecture is unknown.
    """
    spec = MeshSpec(**config.mesh) if mesh is None else parse_mesh(mesh)
    targets = [topology(name) for name in names]
    results = []
    for target in targets:
        case = make_case(config, model, target, spec)
        tell(f"{target.name}: mesh {mesh_words(case.mesh)}; {case.slots} completions at once")
        results.append(summary(case, target, compile_all(case, only, target.chip.at_once)))
        print_table(results[-1])
        if not results[-1]["fits"]:
            print(f"does not fit {target.name}; try a larger one ({', '.join(larger(target.name)[:3])}) or --suggest")
    return results


def suggest(config: ConfigDict, names: Sequence[str], model: str | None) -> list[dict[str, Any]]:
    """Tries meshes, slots and lengths of streams, and prints the cheapest that fits, with its command: the fewest
    devices, and of equally many the topology named first.

    Raises:
      TopologyError: a topology name is unknown, or the compiler is not installed.
      ValueError: nothing fits.
    """

    def make(target: Topology, spec: MeshSpec, slots: int, stream_tokens: int) -> Case:
        changed = config.copy_and_resolve_references()
        changed.slots, changed.grpo.stream_tokens = slots, stream_tokens
        return make_case(changed, model, target, spec)

    prove = lambda case, target: summary(case, target, compile_all(case, (), target.chip.at_once))
    targets = [topology(name) for name in names]
    result = search(targets, make, config.batch_size * config.samples, config.grpo.stream_tokens, prove)
    print_table(result)
    chosen = result["suggestion"]
    print(
        f"  suggested: {result['topology']} with --config.mesh.tensor={chosen['tensor']}"
        f" --config.slots={chosen['slots']} --config.grpo.stream_tokens={chosen['stream_tokens']}"
    )
    return [result]


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    logging.getLogger("jax").setLevel(logging.ERROR)
    jax.config.update("jax_enable_compilation_cache", False)  # without a TPU, cached programs cannot be loaded
    with reporting_errors():
        if FLAGS.suggest:
            results = suggest(FLAGS.config, FLAGS.topology, FLAGS.model_config)
        else:
            results = run(FLAGS.config, FLAGS.topology, FLAGS.mesh, FLAGS.model_config, FLAGS.only)
        if FLAGS.json:
            told = [argument for argument in sys.argv[1:] if not argument.startswith("--json")]
            command = " ".join(["python -m experiments.compile", *told])
            text = json.dumps({"command": command, "results": results}, indent=1) + "\n"
            write_atomically(Path(FLAGS.json), text)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
