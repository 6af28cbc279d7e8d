"""Reads the cost and communication of a compiled TPU program from its text.

XLA writes an estimate of clock cycles for every fusion. It counts a loop's body only once, so a sum over the text is
correct only for programs without loops. Here every loop with a known count is multiplied by its number of rounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "f16": 16}  # other names contain the width
_SHAPE = re.compile(r"\b(pred|bf16|f\d+|[su]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.\-]+) = ((?:\(.*?\)|\S+)) ([\w\-]+)\((.*)$", re.DOTALL)
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional")  # write no new array
_FLOATS = ("bf16", "f16", "f32", "f64")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: kind of the collective: `all-gather`, `all-reduce`, ….
      num_bytes: bytes of the result on each device, summed over all rounds of enclosing loops.
      shapes: shapes of the results, such as `bf16[3584,512]`.
      source: JAX operation that caused it.
    """

    kind: str
    num_bytes: int
    shapes: tuple[str, ...]
    source: str


class Kernel(NamedTuple):
    """An operation without an XLA estimate: a Pallas kernel, or a gather in hardware.

    Attributes:
      name: name of the kernel; `gather` for a gather.
      shapes: shapes of the results and, for a Pallas kernel, of the operands.
      result_bytes: bytes of the results.
      rounds: number of executions.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    result_bytes: int
    rounds: int


@dataclass
class Cost:
    """Estimates for one program on one device.

    Attributes:
      cycles: XLA's estimate of clock cycles, with loops multiplied out.
      collectives: collectives, each listed once, with bytes multiplied by the rounds of its loop.
      open_loops: number of loops without a known number of rounds; their bodies count once.
      kernels: operations without an estimate.
      written: dtype and shape, without axes of size 1, of every floating-point array that is written to memory. What
        stays inside a fusion is not written.
    """

    cycles: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    open_loops: int = 0
    kernels: list[Kernel] = field(default_factory=list)
    written: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of collectives, summed by kind."""
        sums: dict[str, int] = {}
        for collective in self.collectives:
            sums[collective.kind] = sums.get(collective.kind, 0) + collective.num_bytes
        return sums


class _Instruction(NamedTuple):
    name: str
    result: str
    op: str
    rest: str


def shape_bytes(text: str) -> list[int]:
    """Bytes of every array shape in a text.

    >>> shape_bytes("(bf16[2,3]{1,0}, f32[], pred[8])")
    [12, 4, 8]
    """
    sizes = []
    for kind, dims in _SHAPE.findall(text):
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sizes


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation, and the name of the entry computation."""
    found: dict[str, list[_Instruction]] = {}
    entry, name, pending = "", None, ""

    def finish() -> None:
        match = _INSTRUCTION.match(pending)
        if match and name is not None:
            found[name].append(_Instruction(*match.groups()))

    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, pending = header.group(2), ""
            found[name] = []
            entry = name if header.group(1) else entry
        elif re.match(r"^  (ROOT )?%", line) or line == "}":
            finish()
            pending = line
        else:
            pending += "\n" + line  # a kernel's metadata may contain line breaks
    return found, entry


def _called(rest: str, word: str) -> str | None:
    match = re.search(rf"\b{word}=%?([\w.\-]+)", rest)
    return match.group(1) if match else None


def _rounds(condition: Sequence[_Instruction]) -> int | None:
    """The number of rounds of a loop whose condition compares a counter with a constant; None for other loops."""
    limits = [int(m.group(1)) for i in condition if i.op == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
    simple = len(limits) == 1 and len(condition) <= 5
    return limits[0] if simple else None


def _collective(instruction: _Instruction, rounds: int) -> Collective | None:
    kind = instruction.op.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    sizes = shape_bytes(instruction.result)
    # An asynchronous start returns its operand, its result and some flags; an all-reduce returns only results.
    started = instruction.op != kind and kind != "all-reduce"
    size = max(sizes) if started or kind == "collective-permute" else sum(sizes)
    shapes = tuple(f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(instruction.result))
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, size * rounds, shapes, source.group(1) if source else "")


def _kernel(instruction: _Instruction, rounds: int) -> Kernel | None:
    rest = instruction.rest
    if instruction.op == "custom-call" and "tpu_custom_call" in rest:
        operands = re.search(r"operand_layout_constraints=\{(.*?)\}, (?:\w+)=", rest, re.DOTALL)
        shown = instruction.result + (operands.group(1) if operands else "")
        name = re.sub(r"\.\d+$", "", instruction.name)
    elif instruction.op == "fusion" and "kind=kCustom" in rest and re.search(r'op_name="[^"]*gather"', rest):
        shown, name = instruction.result, "gather"
    else:
        return None
    shapes = tuple(tuple(int(d) for d in dims.split(",") if d) for _, dims in _SHAPE.findall(shown))
    return Kernel(name, shapes, sum(shape_bytes(instruction.result)), rounds)


def _written(instruction: _Instruction) -> set[tuple[str, tuple[int, ...]]]:
    """The floating-point arrays that an instruction writes."""
    if instruction.op in _FREE:
        return set()
    shapes = ((kind, map(int, filter(None, dims.split(",")))) for kind, dims in _SHAPE.findall(instruction.result))
    return {(kind, tuple(n for n in dims if n != 1)) for kind, dims in shapes if kind in _FLOATS}


def read(text: str) -> Cost:
    """Reads the text of a compiled TPU program (`compiled.as_text()`).

    >>> read("ENTRY %main (x: f32[2]) -> f32[2] {\\n}").cycles
    0.0
    """
    computations, entry = _computations(text)
    cost = Cost()
    seen: set[str] = set()  # channels: one collective may be split over several fused computations

    def add(instruction: _Instruction, rounds: int, inside_fusion: bool) -> None:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        if not inside_fusion:
            cost.cycles += rounds * int(cycles.group(1)) if cycles else 0
            kernel = None if cycles else _kernel(instruction, rounds)
            cost.kernels += [kernel] if kernel else []
            cost.written |= _written(instruction)
        collective = _collective(instruction, rounds)
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = channel.group(1) if channel else instruction.name
        if collective and key not in seen:
            seen.add(key)
            cost.collectives.append(collective)

    def walk(name: str, rounds: int, inside_fusion: bool) -> None:
        for instruction in computations.get(name, ()):
            add(instruction, rounds, inside_fusion)
            for callee, times, fused in _callees(instruction, computations):
                cost.open_loops += times is None
                walk(callee, rounds * (times or 1), inside_fusion or fused)

    walk(entry, 1, False)
    return cost


def _callees(
    instruction: _Instruction, computations: dict[str, list[_Instruction]]
) -> Iterator[tuple[str, int | None, bool]]:
    """The computations an instruction calls, how often (None: unknown), and whether it is a fusion's body."""
    rest = instruction.rest
    if instruction.op == "while":
        condition, body = _called(rest, "condition"), _called(rest, "body")
        yield body, _rounds(computations.get(condition, ())), False
    elif instruction.op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = branches.group(1).split(",") if branches else []
        names += [_called(rest, word) for word in ("true_computation", "false_computation")]
        yield from ((name.strip().lstrip("%"), 1, False) for name in names if name)
    elif instruction.op in ("fusion", "call", "async-start"):
        callee = _called(rest, "calls") or _called(rest, "to_apply")
        if callee:
            yield callee, 1, instruction.op == "fusion"
