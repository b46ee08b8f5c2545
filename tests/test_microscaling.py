"""Formats with block scales, held against ml_dtypes and float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from optkit.graph import verify
from optkit.microscaling import (
    BLOCK_FORMATS,
    block_scales,
    define,
    quantize,
    steps_of,
    tensor_scale,
    to_e2m1,
    to_e8m0,
)
from optkit.reference import ReferenceSession

E8M0 = ml_dtypes.float8_e8m0fnu
NVFP4, MXFP8 = BLOCK_FORMATS["nvfp4"], BLOCK_FORMATS["mxfp8"]
CALLS = {
    "nvfp4": "q, s = optkit.Nvfp4Quantize(x, t) y = optkit.Nvfp4Dequantize<axis = -1>(q, s, t)",
    "mxfp8": "q, s = optkit.Mxfp8Quantize(x) y = optkit.Mxfp8Dequantize<axis = -1>(q, s)",
}
# Of all sizes that float32 has, with blocks of zeros and of one number.
SIZES = np.exp2(np.arange(-120, 120, 5.0)).astype(np.float32)


def drawn(depth=64, rows=48, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 2, depth)).astype(np.float32)


def back(numbers, scales, fmt, axis, scale=None):
    steps = scales.astype(np.float64) if fmt.nested else np.exp2(scales.astype(np.float64) - 127)
    steps = steps * (1.0 if scale is None else float(scale))
    return numbers.astype(np.float64) * np.repeat(steps, fmt.size, axis)


@given(arrays(np.float32, 16, elements=st.floats(-6, 6, width=32)))
def test_numbers_of_four_bits_are_rounded_as_the_format_says(x):
    np.testing.assert_array_equal(to_e2m1(x), x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_halfway_between_two_numbers_of_four_bits_the_even_code_is_taken_and_beyond_the_last_the_last():
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7, np.inf], np.float32)
    even = np.array([0, 1, 1, 2, 2, 4, 4, 6, 6, 6])
    np.testing.assert_array_equal(to_e2m1(halves), even)
    np.testing.assert_array_equal(to_e2m1(-halves), -even)


def test_powers_of_two_are_the_smallest_that_are_not_below():
    powers = np.exp2(np.arange(-126, 127.0)).astype(np.float32)
    for x in (powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers[1:], np.float32(0))):
        found = to_e8m0(x).view(E8M0).astype(np.float64)
        assert (found >= x).all() and (found / 2 < x).all()
    np.testing.assert_array_equal(to_e8m0(powers).view(E8M0).astype(np.float32), powers)
    assert to_e8m0(np.zeros(1, np.float32)) == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_nvfp4_is_what_float64_and_other_peoples_types_make_of_it(axis):
    x = np.moveaxis(drawn()[:, 0] * np.exp2(np.arange(48) % 12 - 6)[:, None].astype(np.float32), 1, axis)
    scale = tensor_scale(float(np.abs(x).max()))
    numbers, scales = quantize(x, NVFP4, axis, scale)
    parts = np.moveaxis(x.astype(np.float64), axis, 1).reshape(48, -1, 16)
    # A block's largest number over 6, in E4M3 after the scale of the tensor.
    wanted = (np.abs(parts).max(2) / 6 / float(scale)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.moveaxis(scales, axis, 1), wanted)
    assert scales.astype(np.float32).max() == 448
    steps = wanted.astype(np.float64)[..., None] * float(scale)
    # float32 and float64 may fall to either side where a quotient is halfway between two numbers.
    near = [(parts / steps * k).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn) for k in (1 - 1e-6, 1 + 1e-6)]
    found = np.moveaxis(numbers, axis, 1).reshape(parts.shape).astype(np.float64)
    assert ((found == near[0].astype(np.float64)) | (found == near[1].astype(np.float64))).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_mxfp8_is_what_float64_and_other_peoples_types_make_of_it(axis):
    x = np.moveaxis(drawn()[:, 0] * SIZES[:, None], 1, axis)
    numbers, scales = quantize(x, MXFP8, axis)
    parts = np.moveaxis(x.astype(np.float64), axis, 1).reshape(48, -1, 32)
    steps = np.moveaxis(scales, axis, 1).view(E8M0).astype(np.float64)
    top = np.abs(parts).max(2)
    # No number is cut off, and half the scale would cut one off.
    assert (top / steps <= 448).all() and (top / (steps / 2) > 448).all()
    wanted = (parts / steps[..., None]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.moveaxis(numbers, axis, 1).reshape(parts.shape), wanted)


def test_what_comes_back_is_half_a_step_away_at_most():
    x = drawn()[:, 0]
    scale = tensor_scale(float(np.abs(x).max()))
    # The last step of E2M1 is 2 of 6. The scale, in E4M3, is rounded by 1/16 of itself, below or above.
    top = np.repeat(np.abs(x.reshape(len(x), -1, 16)).max(2), 16, 1)
    assert (np.abs(x - back(*quantize(x, NVFP4, 1, scale), NVFP4, 1, scale)) <= top / 6 * (1 + 1 / 16)).all()
    # Steps of E4M3 are 1/8 of a power of two; below 2**-6 they are 2**-9, of 448.
    found = back(*quantize(x, MXFP8, 1), MXFP8, 1)
    top = np.repeat(np.abs(x.reshape(len(x), -1, 32)).max(2), 32, 1)
    assert (np.abs(x - found) <= np.maximum(np.abs(x) / 16, top * 2.0**-9 / 448 * 2)).all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_the_function_computes_the_same_numbers_to_the_bit(name, kind):
    fmt, scale = BLOCK_FORMATS[name], tensor_scale(20.0)
    stored = "float8e4m3fn" if fmt.nested else "uint8"
    text = (
        '<ir_version: 10, opset_import: ["" : 21, "optkit" : 1]>\n'
        f"g ({kind}[N, 2, 64] x) => (float8e4m3fn[N, 2, 64] q, {stored}[N, 2, M] s, float[N, 2, 64] y) "
        f"<float t = {{{float(scale)!r}}}> {{ {CALLS[name]} }}"
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    define(model)
    verify(model)
    x = (
        drawn()
        * (SIZES if kind == "float" and not fmt.nested else np.exp2(np.arange(48) % 20 - 14.0))[:, None, None]
    )
    x = x.astype(np.float32 if kind == "float" else np.float16)
    x[0], x[1, :, 1:] = 0, 0
    found = ReferenceSession(model).run({"x": x})
    numbers, scales = quantize(x.astype(np.float32), fmt, -1, scale if fmt.nested else None)
    np.testing.assert_array_equal(found["q"].view(np.uint8), numbers.view(np.uint8))
    np.testing.assert_array_equal(found["s"].view(np.uint8), scales.view(np.uint8))
    wanted = back(numbers, scales, fmt, 2, scale if fmt.nested else None)
    np.testing.assert_allclose(found["y"], wanted, rtol=2.0**-22)
    assert not found["y"][0].any()


@pytest.mark.parametrize("largest", [0.0, 1e-42, 1e-30, 3e38])
def test_tensors_of_any_size_come_back(largest):
    x = np.linspace(-largest, largest, 32, dtype=np.float32)
    scale = tensor_scale(float(np.abs(x).max()))
    found = back(*quantize(x, NVFP4, 0, scale), NVFP4, 0, scale)
    # Of what the smallest normal float32 has no steps for, nothing is left.
    assert np.isfinite(found).all() and (np.abs(found - x) <= max(largest / 5, 1e-38)).all()


def test_of_several_scales_each_block_gets_the_one_with_the_least_error():
    x = drawn()[:, 0]
    scale = tensor_scale(float(np.abs(x).max()))

    def error(*shares):
        scales = block_scales(x, NVFP4, 1, scale, shares)
        steps = steps_of(scales, NVFP4, 1, scale)
        return np.square(to_e2m1(x / steps) * steps - x).reshape(len(x), -1, 16).sum(2)

    shares = (1.0, 0.8, 1.5)
    np.testing.assert_allclose(error(*shares), np.min([error(s) for s in shares], axis=0), rtol=1e-5)
    assert (error(*shares) < error(1.0)).any()
