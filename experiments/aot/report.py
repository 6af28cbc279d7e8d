"""Formats the results for a compiled run as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.aot import estimate
from experiments.aot.chips import Topology
from experiments.aot.programs import Build, Case, Compiled
from experiments.common.meshes import describe
from tinylora_jax.models import AXES


def _program(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    row: dict[str, Any] = {
        "program": compiled.name,
        "compile_s": round(compiled.seconds, 1),
        "fits": compiled.refused is None,
        "bytes": {
            "arguments": int(compiled.arguments),
            "outputs": int(compiled.outputs),
            "temporaries": int(compiled.temporaries),
            "total": int(compiled.total),
        },
        "model_flops": compiled.model_flops,
        "xla_flops": compiled.xla_flops,
    }
    if compiled.cost is None:
        return row
    row["collective_bytes"] = compiled.cost.bytes_by_kind()
    row["open_loops"] = compiled.cost.open_loops
    if compiled.cost.open_loops == 0:  # otherwise the text does not determine the run time
        seconds = estimate.seconds(compiled, topology.chip)
        row["seconds"] = {
            "xla": seconds.xla,
            "kernels": seconds.kernels,
            "exchange": seconds.exchange,
            "total": seconds.total,
        }
    return row


def _decode(case: Case, topology: Topology, compiled: Compiled) -> dict[str, Any]:
    seconds = estimate.seconds(compiled, topology.chip)
    floor = estimate.decode_floor(case, topology.chip)
    return {
        "rows": case.slots,
        "seconds": seconds.total,
        "floor_s": floor,
        "over_floor": seconds.total / floor,
        "over_floor_without_exchange": (seconds.xla + seconds.kernels) / floor,
        "tokens_per_s": case.slots / seconds.total,
        "weight_bytes_gathered": estimate.weights_gathered(compiled, case),
        "wide_copies_of_the_cache": len(estimate.wide_copies(compiled, case)),
    }


def _update(case: Case, topology: Topology, compiled: Compiled) -> dict[str, Any]:
    seconds = estimate.seconds(compiled, topology.chip)
    reduced = compiled.cost.bytes_by_kind().get("all-reduce", 0)
    plan = case.plan()
    return {
        "program": compiled.name,
        "seconds": seconds.total,
        "tokens_per_s": plan.sequences * plan.shapes[0].tokens / seconds.total,
        "floor_s": compiled.model_flops / topology.chip.flops,
        "mfu": compiled.model_flops / topology.chip.flops / seconds.total,
        "all_reduce_bytes": reduced,
        "gradient_bytes": 4 * case.vector().size,
        "remat": plan.remat,
    }


def _longest_step(case: Case, decode: Mapping[str, Any], updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a GRPO step whose completions all have the greatest length: an upper bound for real steps."""
    c = case.config
    rollout = c.max_new_tokens * decode["seconds"] * (case.rows / case.slots)
    tokens = c.batch_size * (c.max_prompt_tokens + c.samples * c.max_new_tokens)
    update = tokens / updates[-1]["tokens_per_s"] * case.specs.grpo.updates_per_rollout
    return {"decode_s": rollout, "update_s": update}


def summary(case: Case, topology: Topology, build: Build) -> dict[str, Any]:
    """Collects the results for a compiled run as a JSON-serializable dict."""
    compiled = {p.name: p for p in build.programs if p.cost is not None}
    result: dict[str, Any] = {
        "topology": topology.name,
        "chip": topology.chip.kind,
        "devices": len(topology.devices),
        "hbm_bytes": topology.chip.hbm_bytes,
        "mesh": dict(zip(AXES, describe(case.mesh), strict=True)),
        "model": case.name or case.config.model,
        "dtype": str(case.dtype),
        "quantize": case.config.quantize,
        "quantize_cache": case.config.quantize_cache,
        "parameters": case.vector().size,
        "prompts": case.config.batch_size,
        "samples": case.config.samples,
        "slots": case.slots,
        "prompt_tokens": case.config.max_prompt_tokens,
        "new_tokens": case.config.max_new_tokens,
        "jax": jax.__version__,
        "compile_s": round(build.seconds, 1),
        "compile_cpu_s": round(build.cpu_s, 1),
        "fits": all(p.refused is None for p in build.programs),
        "programs": [_program(p, topology) for p in build.programs],
    }
    updates = [_update(case, topology, p) for name, p in compiled.items() if name.startswith("update")]
    result["updates"] = updates
    if "decode, one step" in compiled:
        result["decode"] = _decode(case, topology, compiled["decode, one step"])
        if updates:
            result["longest_step"] = _longest_step(case, result["decode"], updates)
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a summary as a table."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    print(f"\n{result['model']} on {result['topology']}: {result['devices']} devices ({mesh})")
    shown = (result["prompts"], result["samples"], result["prompt_tokens"], result["new_tokens"], result["slots"])
    print("  {} prompts × {} samples, {} + {} tokens, {} slots".format(*shown))
    print(f"  {'program':<44}{'compile':>9}{'arguments':>11}{'outputs':>9}{'temp.':>8}{'total':>8}   GB a device")
    for row in result["programs"]:
        sizes = [row["bytes"][name] / 1e9 for name in ("arguments", "outputs", "temporaries", "total")]
        fits = f"of {result['hbm_bytes'] / 1e9:.0f}" if row["fits"] else f"does NOT fit {result['hbm_bytes'] / 1e9:.0f}"
        print(
            "  {:<44}{:>7.0f} s{:>11.2f}{:>9.2f}{:>8.2f}{:>8.2f}   {}".format(
                row["program"][:44], row["compile_s"], *sizes, fits
            )
        )
    for row in result["programs"]:
        kinds = {kind: size for kind, size in row.get("collective_bytes", {}).items() if size}
        if kinds:
            loops = " (a round of its open loops)" if row["open_loops"] else ""
            parts = ", ".join(f"{kind} {size / 1e6:,.3f}" for kind, size in kinds.items())
            print(f"  exchanged by {row['program']}{loops}, MB a device: {parts}")
    _print_estimates(result)
    fits = "yes" if result["fits"] else "NO"
    times = f"{result['compile_s']:.0f} s ({result['compile_cpu_s']:.0f} s of processor time)"
    print(f"  compiled in {times}; everything fits: {fits}")


def _print_estimates(result: Mapping[str, Any]) -> None:
    """Prints estimates: XLA's cycles over the clock rate, kernels at half the limits, exchanges at link speed."""
    decode = result.get("decode")
    if decode:
        print(
            f"  decode: {1e3 * decode['seconds']:.2f} ms a step, {decode['over_floor']:.2f} × its bandwidth floor of"
            f" {1e3 * decode['floor_s']:.2f} ms ({decode['over_floor_without_exchange']:.2f} × before exchanges);"
            f" {decode['tokens_per_s']:,.0f} tokens/s; weights gathered: {decode['weight_bytes_gathered']} bytes"
        )
    for update in result["updates"]:
        print(
            f"  {update['program']}: {update['seconds']:.2f} s, {100 * update['mfu']:.0f} % of the matrix peak;"
            f" {update['tokens_per_s']:,.0f} tokens/s; all-reduced {update['all_reduce_bytes']} bytes, of which"
            f" {update['gradient_bytes']} are the gradient; remat {update['remat']}"
        )
    if "longest_step" in result:
        longest = result["longest_step"]
        print(
            f"  a GRPO step of the longest completions: {longest['decode_s']:.0f} s of decoding,"
            f" {longest['update_s']:.0f} s of updates"
        )
