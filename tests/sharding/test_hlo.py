# ruff: noqa: E501
"""Reading a compiled program's text: loops multiplied out, each exchange counted once."""

import pytest

from experiments.aot.hlo import read

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %a)
}

%fused (p: bf16[64,512]) -> bf16[512,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  %wide = bf16[64,513]{1,0} convert(%p)
  ROOT %gathered.1 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}, metadata={op_name="jit(f)/weight"}
}

%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = bf16[512,512]{1,0} fusion(%x), kind=kCustom, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %fusion.2 = bf16[512,512]{1,0} fusion(%x), kind=kCustom, calls=%fused, backend_config={"window_config":{"estimated_cycles":"11"}}
  %kernel.3 = bf16[4,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}, frontend_attributes={kernel_metadata={
"note":"a line of its own"
}}, backend_config={"custom_call_config":{}}
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%i, %x)
}

%condition (t.1: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %t.1 = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0} parameter(0)
  %fusion.5 = f32[8,128]{1,0} fusion(%x.1), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %start = (s32[]{:T(128)}, f32[8,128]{1,0}) tuple(%x.1, %fusion.5)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %moved = (f32[13]{0}, f32[13]{0}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=2
  %reduced = (f32[13]{0:T(128)}, f32[]{:T(128)}) all-reduce(%x.1, %x.1), channel_id=1, to_apply=%add
  ROOT %y = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_cycles_of_a_counted_loop_are_multiplied():
    cost = read(TEXT)
    assert cost.cycles == 1000 + 28 * 111 and cost.open_loops == 0


def test_an_exchange_cut_into_pieces_counts_once_for_every_round():
    assert read(TEXT).bytes_by_kind() == {
        "all-gather": 28 * 512 * 512 * 2,
        "collective-permute": 52,
        "all-reduce": 52 + 4,
    }
    (gather, *_) = read(TEXT).collectives
    assert gather.shapes == ("bf16[512,512]",) and gather.source == "jit(f)/weight"


def test_a_kernel_without_an_estimate_is_listed_with_its_shapes():
    (kernel,) = read(TEXT).kernels
    assert (kernel.name, kernel.rounds, kernel.result_bytes) == ("kernel", 28, 1024)
    assert kernel.shapes == ((4, 128), (8, 128))


def test_what_stays_inside_a_fusion_is_not_written():
    assert ("bf16", (64, 513)) not in read(TEXT).written and ("f32", (8, 128)) in read(TEXT).written
    assert ("bf16", (4, 128)) in read(TEXT).written, "the result of a kernel"


@pytest.mark.parametrize("limit", ["get-tuple-element(%t.1), index=2", "constant(28)\n  %second = s32[] constant(3)"])
def test_a_loop_that_is_not_counted_is_open(limit):
    cost = read(TEXT.replace("constant(28)", limit))
    assert cost.open_loops == 1 and cost.cycles == 1111
