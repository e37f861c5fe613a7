"""The Paddle suite's cases with the node's weight copies made by Triton kernels, in Triton's interpreter, on the device
that stands in for a GPU: its memory is the host's. All else is the naive engine.

    paddle_device_interpreted.py [--backend naive] DEVICE WORK [NAME ...]
"""

import runpy
import warnings
from pathlib import Path

from triton.runtime import interpreter

CASES = Path(__file__).resolve().parents[2] / "tools" / "ci" / "gpu_paddle" / "cases.py"


def main():
    # The interpreter copies torch's tensors to the host and back. These are there, and are not torch's.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *_: None
    import sonicmoe.ernie_compat  # noqa: F401  from here on `import torch` is Paddle's proxy inside the package
    from sonicmoe.quant import native_copies

    native_copies.NativeCopies.can_hold = staticmethod(lambda like, recipe, backend: like.place.is_custom_place())
    epoch = native_copies.NativeCopies.epoch

    def strict_epoch(self):
        """What NumPy warns of here, a number out of an array with a dimension, newer ones refuse."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            return epoch(self)

    native_copies.NativeCopies.epoch = strict_epoch
    runpy.run_path(str(CASES), run_name="__main__")


if __name__ == "__main__":
    main()
