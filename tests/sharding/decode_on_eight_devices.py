"""Compiles decoding for meshes of eight CPU devices, with the GPU's kernel interpreted, and prints what they exchange.

    python tests/sharding/decode_on_eight_devices.py KV_HEADS DATA,FSDP,TENSOR …

For every mesh: the collectives of one decoding step and of a whole rollout, each with its largest array in bytes, and
the bytes of what one token of every row is at most. Run as a program of its own: the tests have one device.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.aot.programs import Case, compile_program, rollout, step  # noqa: E402
from experiments.common.specs import parse  # noqa: E402
from experiments.configs import base  # noqa: E402
from tinylora_jax.models import ModelConfig, attention  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec  # noqa: E402

calls = []


def interpreted(kernel):
    def run(*arrays):
        calls.append([x.shape for x in arrays])
        return kernel(*arrays, interpret=True)

    return run


def model(kv_heads):
    return ModelConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_layers=2,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=64,
        qkv_bias=True,
        tie_embeddings=kv_heads == 2,
    )


def run(kv_heads, sizes):
    config = base.get_config()
    config.batch_size, config.max_prompt_tokens, config.max_new_tokens = 16, 64, 192
    case = Case(config, parse(config), model(kv_heads), MeshSpec(*sizes).make(jax.devices()), 16e9)
    found = {"step": _exchanged(case, step(case)), "rollout": _exchanged(case, rollout(case))}
    token = case.rows * max(case.model.intermediate_size, case.model.hidden_size) * jnp.dtype(jnp.float32).itemsize
    return found | {"a token of every row": token, "kernels": len(calls)}


def _exchanged(case, program):
    cost = compile_program(program, case.mesh).cost
    return [{"kind": c.kind, "bytes": c.num_bytes, "shapes": c.shapes, "source": c.source} for c in cost.collectives]


if __name__ == "__main__":
    attention._on_gpu = lambda x: True
    attention.decode_kernel = interpreted(attention.decode_kernel)
    attention._cudnn = lambda q, k, v, lengths=None: attention._plain(q, k, v, is_causal=True)
    kv_heads, *meshes = sys.argv[1:]
    one = partial(run, int(kv_heads))
    print(json.dumps({mesh: one(tuple(int(size) for size in mesh.split(","))) for mesh in meshes}))
