"""Hides an installed torch from this process, as where Paddle alone is installed: TVM-FFI takes one along if it finds
it. What Paddle's proxy answers for `import torch` comes before this.
"""

import sys


class _NoTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torch_c_dlpack_ext"):
            raise ModuleNotFoundError(f"No module named {name!r}: hidden by {__file__}", name=name)
        return None


sys.meta_path.insert(0, _NoTorch)
