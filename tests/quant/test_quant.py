"""FP8 quantization by its bits: every code, scale and carrier against a NumPy model written apart from it."""

import numpy as np
import paddle
import pytest

from sonicmoe.ernie_compat import fp8_payload
from sonicmoe.ernie_compat.quantizers import quantize_activation_blockscaled_fast, quantize_native_fp8_weights
from sonicmoe.gemm import naive as gemm
from sonicmoe.quant import naive as quant
from sonicmoe.quant.formats import QuantTensor, make_recipe
from sonicmoe.quant.joined import JoinedRows, room_for_rows, room_for_token_major
from tests.support import fp8_model as model
from tests.support.paddle_runs import array

BLOCKS = [(1, 128), (128, 1), (128, 128), (1, 32), (32, 1), (32, 32), (2, 16), (1, 1)]
RECIPES = {
    "sm90": make_recipe("sm90"),
    "sm90-pow2": make_recipe("sm90", pow2=True),
    "sm100": make_recipe("sm100"),
    "sm100-iso32": make_recipe("sm100", iso32=True),
}


def codes_of(tensor) -> np.ndarray:
    return tensor.view(paddle.uint8).numpy()


def from_codes(codes):
    return paddle.to_tensor(np.ascontiguousarray(codes, dtype=np.uint8)).view(paddle.float8_e4m3fn)


def tensor(x):
    return paddle.to_tensor(np.ascontiguousarray(x, dtype=np.float32))


def assert_codes(found, expected):
    """Equal codes, where any two NaN codes are equal: the sign of a NaN means nothing."""
    nan = (expected & 0x7F) == model.NAN_CODE
    np.testing.assert_array_equal((found & 0x7F) == model.NAN_CODE, nan)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


def assert_quantized(q, x, block, pow2=False):
    expected, scale = model.quantize(x, block, pow2)
    np.testing.assert_array_equal(array(quant.scale_values(q.scale)), scale)
    assert_codes(codes_of(q.data), expected)


# ---- The format ------------------------------------------------------------------------------------------------------


def test_the_model_knows_the_format():
    """e4m3 by its landmarks, so that a mistake shared by model and code would have to be in the standard."""
    assert model.values()[-1] == 448 and model.values()[1] == 2.0**-9 and model.values()[8] == 2.0**-6
    landmarks = [(0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (-2.0, 0xC0), (448.0, 0x7E), (1e9, 0x7E), (-1e9, 0xFE)]
    landmarks += [(2.0**-9, 0x01), (2.0**-10, 0x00), (1.5 * 2.0**-9, 0x02), (17.0, 0x58), (19.0, 0x5A)]
    for value, code in [*landmarks, (np.nan, 0x7F), (np.inf, 0x7F)]:
        assert model.encode(value) == code, value
    assert np.array_equal(model.encode(model.decode(np.arange(255))[:127]), np.arange(127))


def test_the_models_two_roundings_agree():
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    middles = ((model.values()[1:] + model.values()[:-1]) / 2).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), np.linspace(-500, 500, 99_991, dtype=np.float32), middles, -middles])
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(model.nearest(x), model.decode(model.encode(x)))


def test_every_code_reads_as_its_value():
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    q = QuantTensor(from_codes(codes), paddle.ones([2, 1]), (1, 128))
    np.testing.assert_array_equal(array(quant.dequantize(q)), model.decode(codes))


def test_cast_of_every_bf16():
    patterns = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    assert_codes(codes_of(quant.cast_e4m3(tensor(patterns))), model.encode(patterns))


def test_cast_of_midpoints_and_their_neighbours():
    """Ties go to the even code; one float32 to either side goes to its own side."""
    middles = ((model.values()[1:] + model.values()[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(np.inf))]
    x = np.concatenate([*around, *(-v for v in around)])
    found = codes_of(quant.cast_e4m3(tensor(x)))
    assert_codes(found, model.encode(x))
    below, tie, above = np.split(found[: 3 * len(middles)], 3)
    assert np.array_equal(below, np.arange(126)) and np.array_equal(above, np.arange(1, 127)) and not (tie % 2).any()


def test_cast_of_random_bit_patterns():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)
    assert np.isnan(x).any() and (np.abs(x) > 448).any()
    assert_codes(codes_of(quant.cast_e4m3(tensor(x))), model.encode(x))


def test_stock_cast_is_not_what_runs():
    """Paddle's own cast makes a NaN finite. Should that ever change, the guard in the quantizer may go."""
    x = tensor([np.nan, np.inf, -np.inf, 1e30])
    assert_codes(codes_of(quant.cast_e4m3(x)), np.array([0x7F, 0x7F, 0x7F, 0x7E], np.uint8))


# ---- Blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "stack"])
def test_blocks(block, lead, scales):
    rng = np.random.default_rng(block[0] + block[1])
    x = rng.standard_normal((*lead, 128, 256)).astype(np.float32)
    # Each row and column with a magnitude of its own, so that a scale taken from another block shows.
    x *= np.float32(2.0) ** rng.integers(-20, 20, (128, 1)) * np.float32(2.0) ** rng.integers(-20, 20, 256)
    q = quant.quantize(tensor(x), block, ue8m0=scales == "ue8m0", pow2=scales == "pow2")
    assert q.scale.dtype == (paddle.uint8 if scales == "ue8m0" else paddle.float32)
    assert_quantized(q, x, block, pow2=scales != "fp32")
    expected, scale = model.quantize(x, block, scales != "fp32")
    dequantized = model.decode(expected) * model.spread(scale.astype(np.float64), block)
    np.testing.assert_array_equal(array(quant.dequantize(q)), dequantized.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_read_exactly(dtype):
    x = tensor(np.random.default_rng(1).standard_normal((4, 128))).astype(dtype)
    assert_quantized(quant.quantize(x, (1, 128)), array(x), (1, 128))


@pytest.mark.parametrize("pow2", [False, True])
def test_zero_blocks_are_zero(pow2):
    x = np.zeros((4, 256), np.float32)
    x[1, 130] = 3.0
    x[2, :] = -0.0
    q = quant.quantize(tensor(x), (1, 128), pow2=pow2)
    values = array(quant.dequantize(q))
    assert np.isfinite(array(q.scale)).all() and (array(q.scale) > 0).all()
    assert not np.delete(values.ravel(), 256 + 130).any() and values[1, 130] == pytest.approx(3.0, rel=0.07)


@pytest.mark.parametrize("scales", ["fp32", "pow2", "ue8m0"])
def test_extreme_magnitudes(scales):
    """Subnormal, tiny and huge maxima: finite scales, no overflow of x / scale, and the bits of the model."""
    # Not up to the largest float32: the e4m3 neighbour above it is 2**128, which float32 calls infinite.
    maxima = [1e-45, 2.0**-149, 1e-40, 2.0**-126, 448 * 2.0**-126, 449 * 2.0**-126, 1e-30, 1e30, 2.0**127, 3.2e38]
    x = np.zeros((len(maxima), 128), np.float32)
    x[:, 5], x[:, 77] = maxima, np.array(maxima) / -3
    q = quant.quantize(tensor(x), (1, 128), ue8m0=scales == "ue8m0", pow2=scales == "pow2")
    assert_quantized(q, x, (1, 128), pow2=scales != "fp32")
    values = array(quant.dequantize(q)).astype(np.float64)
    big = np.array(maxima) >= 2.0**-126 * 448
    np.testing.assert_allclose(values[big, 5], np.array(maxima)[big], rtol=0.0625)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_powers_of_two_are_rounded_up_and_no_further(ue8m0):
    """Scales that are powers of two stay; one float32 above goes to the next."""
    exponents = np.arange(-100, 100)
    exact = (448 * 2.0**exponents).astype(np.float32)
    for amax, step in ((exact, 0), (np.nextafter(exact, np.float32(np.inf)), 1), (exact * np.float32(0.75), 0)):
        # 0.75 * 2**e lies between two powers and goes up to 2**e; the next float32 of 448 * 2**e may divide to 2**e.
        scale = amax / np.float32(448)
        step = (scale > np.ldexp(np.float32(1), exponents)).astype(int) if step else 0
        x = np.zeros((len(amax), 32), np.float32)
        x[:, 3] = amax
        q = quant.quantize(tensor(x), (1, 32), ue8m0=ue8m0, pow2=True)
        np.testing.assert_array_equal(array(quant.scale_values(q.scale))[:, 0], 2.0 ** (exponents + step))
        assert (np.abs(array(q.data)) <= 448).all()
        if ue8m0:
            np.testing.assert_array_equal(q.scale.numpy()[:, 0], exponents + step + 127)


def test_ue8m0_bytes_read_as_their_values():
    values = array(quant.scale_values(paddle.arange(256, dtype="int32").astype("uint8")))
    np.testing.assert_array_equal(values[:255], np.ldexp(1.0, np.arange(255) - 127).astype(np.float32))
    assert np.isnan(values[255])


# ---- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_stays_in_its_place(recipe, bad):
    """It comes out as NaN where it went in, and the rest of its block keeps scale and code."""
    r = RECIPES[recipe]
    x = np.random.default_rng(2).standard_normal((3, 256)).astype(np.float32)
    places = [(0, 0), (1, 131), (1, 140), (2, 255)]
    clean, dirty = x.copy(), x.copy()
    for place in places:
        clean[place], dirty[place] = 0.0, bad
    first, second = (quant.quantize_rows(tensor(v), r) for v in (clean, dirty))
    np.testing.assert_array_equal(second.scale.numpy(), first.scale.numpy())
    assert_quantized(second, dirty, r.row_block, r.pow2)
    values = array(quant.dequantize(second))
    assert {tuple(map(int, p)) for p in np.argwhere(np.isnan(values))} == set(places)
    kept = ~np.isnan(values)
    np.testing.assert_array_equal(values[kept], array(quant.dequantize(first))[kept])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_of_nothing_but_nan(bad):
    q = quant.quantize(tensor(np.full((1, 128), bad)), (1, 128))
    assert np.isfinite(array(q.scale)).all() and np.isnan(array(quant.dequantize(q))).all()


# ---- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_in_both_orientations(recipe):
    """Each copy is the quantization of its own orientation; square blocks get there by moving bytes."""
    r, rng = RECIPES[recipe], np.random.default_rng(3)
    w1 = (rng.standard_normal((2, 256, 128)) * 2.0 ** rng.integers(-9, 9, (2, 256, 1))).astype(np.float32)
    w2 = (rng.standard_normal((2, 128, 384)) * 2.0 ** rng.integers(-9, 9, (2, 1, 384))).astype(np.float32)
    w1[1, 200, 100] = np.nan
    weights = quant.quantize_weights(tensor(w1), tensor(w2), r)
    for name, w in (("w1", w1), ("w2", w2), ("w1_t", w1.transpose(0, 2, 1)), ("w2_t", w2.transpose(0, 2, 1))):
        q = getattr(weights, name)
        assert q.block == r.weight_block
        assert_quantized(q, w, r.weight_block, r.pow2)
    if r.isotropic:
        for copy, transposed in ((weights.w1, weights.w1_t), (weights.w2, weights.w2_t)):
            np.testing.assert_array_equal(codes_of(transposed.data), codes_of(copy.data).transpose(0, 2, 1))
            np.testing.assert_array_equal(transposed.scale.numpy(), copy.scale.numpy().transpose(0, 2, 1))


@pytest.mark.parametrize("name, iso32", [("sm90", False), ("sm100", False), ("sm100", True)])
def test_weights_for_callers_who_release_their_own(name, iso32):
    rng = np.random.default_rng(4)
    w1, w2 = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 256, 128), (2, 128, 128)))
    made = quantize_native_fp8_weights(tensor(w1), tensor(w2), iso32, recipe=name)
    block, pow2 = make_recipe(name, iso32=iso32).weight_block, name == "sm100"
    for (data, scale), w in zip(made, (w1, w1.transpose(0, 2, 1), w2, w2.transpose(0, 2, 1)), strict=True):
        assert_quantized(QuantTensor(data, scale, block), w, block, pow2)


@pytest.mark.parametrize("name", ["sm90", "sm100"])
def test_activations_for_callers(name):
    x = np.random.default_rng(5).standard_normal((7, 256)).astype(np.float32)
    data, scale = quantize_activation_blockscaled_fast(tensor(x), recipe=name)
    block = make_recipe(name).row_block
    assert_quantized(QuantTensor(data, scale, block), x, block, name == "sm100")


# ---- Products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_blockwise_product(recipe):
    """Codes multiplied block by block and promoted with both scales equal the product of the dequantized operands."""
    r, rng = RECIPES[recipe], np.random.default_rng(5)
    a = (rng.standard_normal((40, 384)) * 2.0 ** rng.integers(-12, 12, (40, 384))).astype(np.float32)
    w = (rng.standard_normal((1, 256, 384)) * 2.0 ** rng.integers(-12, 12, (1, 256, 384))).astype(np.float32)
    qa, qw = quant.quantize_rows(tensor(a), r), quant.quantize(tensor(w), r.weight_block, ue8m0=r.ue8m0, pow2=r.pow2)
    found = array(gemm._multiply((qa.data.astype("float32"), quant.scale_values(qa.scale)), gemm._weight(qw, 0)))
    left, right = (array(quant.dequantize(q)).astype(np.float64) for q in (qa, qw))
    # fp32 sums: an error of some last places of the largest partial sum, which the absolute product bounds.
    bound = np.abs(left) @ np.abs(right[0]).T
    assert (np.abs(found - left @ right[0].T) <= 1e-6 * bound).all()
    assert np.abs(found).max() > 0


# ---- Carriers of scales ----------------------------------------------------------------------------------------------


def exponents(rows, columns, seed=6):
    """Exponent bytes over the whole range, with a word's top byte at and above 128: such a word is negative."""
    made = np.random.default_rng(seed).integers(0, 255, (rows, columns), dtype=np.uint8)
    made[0, 3], made[1, 3::4] = 128, 254
    return made


def test_carriers_decode_to_the_same_scales():
    data, raw = from_codes(np.random.default_rng(7).integers(0, 0x7F, (5, 256), dtype=np.uint8)), exponents(5, 8)
    words = raw.astype(np.uint32).reshape(5, 2, 4) << np.array([0, 8, 16, 24], dtype=np.uint32)
    words = words.sum(axis=-1, dtype=np.uint32).view(np.int32)
    assert (words < 0).any() and (words > 0).any()
    carriers = {
        "ue8m0_bytes": paddle.to_tensor(raw),
        "ue8m0_words": paddle.to_tensor(words),
        "ue8m0_values": paddle.to_tensor(raw.astype(np.int32)),
    }
    for layout, scale in carriers.items():
        for said in (None, layout):
            payload = fp8_payload.activation_payload(data, scale, "x", "scales", said)
            assert payload.block == (1, 32) and payload.scale.dtype == paddle.uint8
            np.testing.assert_array_equal(payload.scale.numpy(), raw, err_msg=layout)
    values = [
        array(quant.dequantize(fp8_payload.activation_payload(data, s, "x", "scales"))) for s in carriers.values()
    ]
    for other in values[1:]:
        np.testing.assert_array_equal(other, values[0])


def test_fp32_carrier():
    data = from_codes(np.random.default_rng(8).integers(0, 0x7F, (5, 256), dtype=np.uint8))
    scale = np.random.default_rng(9).random((5, 2)).astype(np.float32)
    payload = fp8_payload.activation_payload(data, tensor(scale), "x", "scales")
    assert payload.block == (1, 128)
    expected = model.decode(codes_of(data)) * scale.repeat(128, axis=1)
    np.testing.assert_array_equal(array(quant.dequantize(payload)), expected.astype(np.float32))


def test_codes_and_scales_in_one_allocation():
    """``test_joined.py`` under Paddle, whose views are others."""
    codes = np.random.default_rng(0).integers(0, 256, 4 * 256 + 4 * 256 // 32, dtype=np.uint8)
    rows = JoinedRows(4, 256, from_codes(codes))
    assert rows.data.shape == [4, 256] and rows.scale.shape == [4, 2] and rows.data.dtype == paddle.float8_e4m3fn
    assert (codes_of(rows.data).reshape(-1) == codes[:1024]).all()
    assert (rows.scale.numpy().reshape(-1).view(np.uint8) == codes[1024:]).all()
    (memory,), together = rows.taken_apart()
    assert (codes_of(together(memory).data) == codes_of(rows.data)).all()
    beside = paddle.zeros([1])
    for made, scales in ((room_for_rows(4, 256, beside), [4, 2]), (room_for_token_major(256, 128, beside), [1, 256])):
        assert made.scale.shape == scales and made.scale.dtype == paddle.float32
        assert made.places()[1] - made.places()[0] == made.data.shape[0] * made.data.shape[1]
    assert room_for_rows(0, 256, beside).places() == (0, 0)
