"""Costs read from a program's text, against products counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jobs.planning.attention import far_chunks
from jobs.planning.compiled_costs import read_costs
from model.config import ModelConfig


def text_of(function, *shapes: tuple[int, ...]) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text
    return text


def test_a_product_is_two_operations_a_multiply_add():
    cost = read_costs(text_of(lambda a, b: a @ b, (48, 32), (32, 20)))
    assert cost.flops == 2 * 48 * 32 * 20
    assert cost.open_loops == 0


def test_a_batched_product_counts_its_batch_once():
    cost = read_costs(
        text_of(lambda a, b: jnp.einsum("hbk,hkc->hbc", a, b), (3, 8, 16), (3, 16, 24))
    )
    assert cost.flops == 2 * 3 * 8 * 16 * 24


def test_loops_within_loops_count_as_often_as_they_go_round():
    def nested(x, weights):
        def outer(x, _):
            x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
            return x, None

        return lax.scan(outer, x, None, length=7)[0]

    cost = read_costs(text_of(nested, (64, 32), (5, 32, 32)))
    assert cost.flops == 7 * 5 * 2 * 64 * 32 * 32
    assert cost.open_loops == 0


def test_a_loop_that_data_ends_counts_one_round_and_is_said():
    def until(x):
        return lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x)

    text = text_of(until, (16, 16))
    cost = read_costs(text)
    assert cost.flops == 2 * 16**3
    assert cost.open_loops == 1
    told = read_costs(text, 7)
    assert (told.flops, told.open_loops) == (7 * cost.flops, 0)


@pytest.mark.parametrize(("length", "window", "tile"), [(64, 16, 8), (60, 20, 16), (16, 32, 8)])
def test_the_dense_form_meets_a_chunk_that_holds_a_token_older_than_the_window(
    length: int, window: int, tile: int
):
    met = [
        len({token // tile for token in range(begin - window)}) for begin in range(0, length, tile)
    ]
    model = ModelConfig(window=window, block_length=tile)
    assert far_chunks(model, length) == sum(met) / len(met)
    text = text_of(lambda n, x: lax.fori_loop(0, n[0].astype(int), lambda _, x: x @ x, x),
                   (1,), (16, 16))  # fmt: skip
    assert read_costs(text, 2.5).flops == 2.5 * 2 * 16**3


def test_traffic_of_a_loop_over_slices_is_that_of_the_slices():
    """Forty slices of 256 x 256 are read once each, not the whole forty times."""

    def summed(x):
        return lax.scan(lambda total, part: (total + part, None), jnp.zeros((256, 256)), x)[0]

    whole = 40 * 256 * 256 * 4
    cost = read_costs(text_of(summed, (40, 256, 256)))
    assert 2 * whole < cost.traffic < 5 * whole


TPU = """\
HloModule jit_step, is_scheduled=true

%fused (p0: bf16[8,4,128], p1: s32[]) -> bf16[1,4,128] {
  %p0 = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,4,128]{2,1,0:T(4,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,4,128}
}

%body (state: (s32[], bf16[8,4,128])) -> (s32[], bf16[8,4,128]) {
  %state = (s32[]{:T(128)}, bf16[8,4,128]{2,1,0:T(4,128)(2,1)}) parameter(0)
  %round = s32[]{:T(128)} get-tuple-element(%state), index=0
  %all = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} get-tuple-element(%state), index=1
  %part = bf16[1,4,128]{2,1,0:T(4,128)(2,1)S(1)} fusion(%all, %round), kind=kLoop, calls=%fused
  %twice = bf16[1,4,128]{2,1,0:T(4,128)(2,1)S(1)} add(%part, %part)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%round, %one)
  ROOT %after = (s32[]{:T(128)}, bf16[8,4,128]{2,1,0:T(4,128)(2,1)}) tuple(%next, %all)
}

%condition (state.1: (s32[], bf16[8,4,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,4,128]{2,1,0:T(4,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (a: f32[2,128,64], b: f32[2,64,256], c: bf16[8,4,128]) -> f32[2,128,256] {
  %a = f32[2,128,64]{2,1,0:T(8,128)} parameter(0)
  %b = f32[2,64,256]{2,1,0:T(8,128)} parameter(1)
  %c = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(2)
  %two = s32[]{:T(128)} constant(2)
  %begin = (s32[]{:T(128)}, bf16[8,4,128]{2,1,0:T(4,128)(2,1)}) tuple(%two, %c)
  %loop = (s32[]{:T(128)}, bf16[8,4,128]{2,1,0:T(4,128)(2,1)}) while(%begin), \
condition=%condition, body=%body
  %product = f32[2,128,256]{2,1,0:T(8,128)} convolution(%a, %b), \
window={size=2 stride=1 pad=1_1 lhs_dilate=2 rhs_reversal=1}, dim_labels=0bf_0io->0bf, \
operand_precision={highest,highest}
  ROOT %reduced = f32[2,128,256]{2,1,0:T(8,128)} all-reduce(%product), channel_id=1, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%sum
}
"""


def test_what_a_tpu_prints_is_read():
    """A batched product as a convolution, float32 in six passes, tiles, on-chip memory, a loop
    that begins at 2 and ends at 8, a group of devices by its axes."""
    cost = read_costs(TPU)
    # Of the 2 x 2 positions of result and window, 2 fall on elements: the batch.
    assert cost.flops == 2 * 2 * 128 * 64 * 256
    assert cost.unit_flops == 6 * cost.flops
    # Six slices of 4 x 128 numbers of 2 bytes are read, and stay on the chip; and the counter.
    slices, adds = 6 * (4 * 128 * 2 + 4), 6 * 3 * 4
    # Rows of 64 take the room of 128.
    left, right, out = 2 * 128 * 128 * 4, 2 * 64 * 256 * 4, 2 * 128 * 256 * 4
    assert cost.traffic == slices + adds + (left + right + out) + 2 * out
    assert cost.collectives == {"all-reduce": 2 * out * 3 // 4}
    assert cost.open_loops == 0


NESTED = """\
HloModule jit_step, is_scheduled=true

%sliced (p0: bf16[8,4,128], p1: s32[]) -> bf16[1,4,128] {
  %p0 = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,4,128]{2,1,0:T(4,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), \
dynamic_slice_sizes={1,4,128}
}

%updated (p2: bf16[8,4,128], p3: bf16[1,4,128], p4: s32[]) -> bf16[8,4,128] {
  %p2 = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(0)
  %p3 = bf16[1,4,128]{2,1,0:T(4,128)(2,1)} parameter(1)
  %p4 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %update = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} dynamic-update-slice(%p2, %p3, %p4, %zero.1, \
%zero.1)
}

%fused (p5: bf16[8,4,128], p6: s32[], p7: bf16[8,4,128]) -> bf16[8,4,128] {
  %p5 = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(0)
  %p6 = s32[]{:T(128)} parameter(1)
  %p7 = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(2)
  %part = bf16[1,4,128]{2,1,0:T(4,128)(2,1)} fusion(%p5, %p6), kind=kLoop, calls=%sliced
  %twice = bf16[1,4,128]{2,1,0:T(4,128)(2,1)} add(%part, %part)
  ROOT %whole = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} fusion(%p7, %twice, %p6), kind=kLoop, \
calls=%updated
}

ENTRY %main (a: bf16[8,4,128], n: s32[], b: bf16[8,4,128]) -> bf16[8,4,128] {
  %a = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %b = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} parameter(2)
  ROOT %after = bf16[8,4,128]{2,1,0:T(4,128)(2,1)} fusion(%a, %n, %b), kind=kOutput, calls=%fused
}
"""


def test_slices_and_updates_in_fusions_within_fusions_are_no_whole_arrays():
    """One of eight parts of 4 x 128 numbers of 2 bytes is read, one written; and the counter."""
    cost = read_costs(NESTED)
    assert cost.traffic == 2 * (4 * 128 * 2) + 4


@pytest.mark.parametrize(
    ("groups", "devices"),
    [("[2,4]<=[8]", 4), ("{{0,1,2},{3,4,5}}", 3), ("mesh['x'=2,'y'=5] {'x','y'}", 10)],
)
def test_every_way_of_writing_a_group_is_read(groups, devices):
    text = TPU.replace("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", groups)
    size = 2 * 128 * 256 * 4
    assert read_costs(text).collectives == {"all-reduce": 2 * size * (devices - 1) // devices}
