"""Names that users import: activations and kernel backends."""

from enum import Enum


class ActivationType(Enum):
    """What stands between the two expert projections.

    The GLU members split the up-projection into gate and up halves and multiply
    ``f(gate) * up``; the others apply ``f`` to a single projection of width I.
    GELU is the tanh approximation everywhere.
    """

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"

    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"

    @classmethod
    def parse(cls, value):
        """Accept a member or its name (``"swiglu"``), as callers pass both."""
        if isinstance(value, cls):
            return value
        # A second copy of this package (a renamed parent) has its own enum: compare by value.
        text = value.value if isinstance(value, Enum) else value
        allowed = [member.value for member in cls]
        if isinstance(text, str) and text.lower() in allowed:
            return cls(text.lower())
        raise ValueError(f"activation_type: got {value!r}, need one of {allowed}")


class KernelBackendMoE(Enum):
    """Which implementation the torch ``MoE`` layer runs."""

    scattermoe = "scattermoe"
    torch = "torch"
    sonicmoe = "sonicmoe"


def is_glu(activation_type: ActivationType) -> bool:
    return activation_type in (ActivationType.SWIGLU, ActivationType.GEGLU, ActivationType.REGLU)
