"""Tolerances belong to the number format: one table, with a floor for each tensor.

Errors are norms of the difference over the norm of the reference, and cosines: never absolute, so that a wrong
answer at magnitude 1e-4 is as visible as one at 300.
"""

import numpy as np

BF16 = {"out": 0.01, "dx": 0.01, "ds": 0.01, "dw1": 0.01, "dw2": 0.01}
# Storage with more mantissa has less excuse: 3 bits more than bf16, and fp32's own rounding.
FP16 = {name: 0.002 for name in BF16}
FP32 = {name: 1e-5 for name in BF16}
FP8_RELATIVE = 0.076
FP8_COSINE = 0.997

# One rounding of Gaussian values to e4m3 costs 2.57% (1x128 float32 scales), 2.64% (128x128) or 2.65% (power-of-two
# scales, whatever the block: they do not put the largest value of a block on 448 exactly). Roundings add in squares.
# To first order out sums 6 of them, dx and dW1 7, ds and dW2 under FP8 wgrad 8: sqrt(8) * 2.65% = 7.51%, and the
# curvature of the gate adds up to four percent of that. So ds and dW2 do not reach 7.6% with power-of-two scales.
FP8_SM90 = dict.fromkeys(BF16, FP8_RELATIVE)
FP8_POW2 = FP8_SM90 | {"ds": 0.079, "dw2": 0.079}
# What the roundings after those of x and w1 add, in squares: no tensor has more than five, sqrt(5) * 2.65% = 5.9%.
FP8_BEYOND_INHERENT = 0.06


def fp8_floors(recipe: str) -> dict[str, float]:
    return FP8_SM90 if recipe == "sm90" else FP8_POW2


def fp8_cosine_floor(relative: float) -> float:
    """0.997 for the contract's tensors. An error that is no change of length lowers the cosine by half its square."""
    return FP8_COSINE if relative == FP8_RELATIVE else 1 - relative**2 / 2


def sampled(floor: float, count: int) -> float:
    """A floor for an error measured on ``count`` values: three standard deviations of such a measurement above it."""
    return floor * (1 + 3 / np.sqrt(2 * count))


def relative_error(value, reference) -> float:
    """|value - reference| / |reference|; 0 for two zeros, infinite for a wrong zero, NaN if anything is NaN."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (value.shape, reference.shape)
    scale, error = np.linalg.norm(reference), np.linalg.norm(value - reference)
    if scale == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / scale)


def cosine(value, reference) -> float:
    value, reference = np.asarray(value, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    norms = np.linalg.norm(value) * np.linalg.norm(reference)
    return 1.0 if norms == 0 and not value.any() and not reference.any() else float(value @ reference / norms)


def assert_within(result, reference, floors, names=None, where="") -> None:
    for name in names or reference.NAMES:
        error = relative_error(getattr(result, name), getattr(reference, name))
        assert error < floors[name], f"{where} {name}: relative error {error:.2e}, floor {floors[name]}"


def assert_bf16(result, reference, names=None, where="") -> None:
    assert_within(result, reference, BF16, names, where)


def assert_equal_results(result, expected, names=None, where="") -> None:
    """Equal numbers in every place, NaN equal to NaN."""
    for name in names or expected.NAMES:
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name), err_msg=f"{where} {name}")


def assert_fp8(result, reference, names=None, where="", relative=FP8_RELATIVE, cos=FP8_COSINE) -> None:
    for name in names or reference.NAMES:
        value, expected = getattr(result, name), getattr(reference, name)
        error, similarity = relative_error(value, expected), cosine(value, expected)
        assert error < relative, f"{where} {name}: relative error {error:.2e}, floor {relative}"
        assert similarity >= cos, f"{where} {name}: cosine {similarity:.5f}, floor {cos}"
