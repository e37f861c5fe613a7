"""Tolerances belong to the number format: one table, with a floor for each tensor.

Errors are norms of the difference over the norm of the reference, and cosines: never absolute, so that a wrong
answer at magnitude 1e-4 is as visible as one at 300.
"""

import numpy as np

BF16 = {"out": 0.01, "dx": 0.01, "ds": 0.01, "dw1": 0.01, "dw2": 0.01}
FP8_RELATIVE = 0.076
FP8_COSINE = 0.997


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


def assert_bf16(result, reference, names=None, where="") -> None:
    for name in names or reference.NAMES:
        error = relative_error(getattr(result, name), getattr(reference, name))
        assert error < BF16[name], f"{where} {name}: relative error {error:.2e}, floor {BF16[name]}"


def assert_fp8(result, reference, names=None, where="", relative=FP8_RELATIVE, cos=FP8_COSINE) -> None:
    for name in names or reference.NAMES:
        value, expected = getattr(result, name), getattr(reference, name)
        error, similarity = relative_error(value, expected), cosine(value, expected)
        assert error < relative, f"{where} {name}: relative error {error:.2e}, floor {relative}"
        assert similarity >= cos, f"{where} {name}: cosine {similarity:.5f}, floor {cos}"
