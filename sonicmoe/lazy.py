"""Public names that load their module when they are first asked for."""

import importlib
import sys


def attribute(namespace: dict, submodule: str, name: str):
    """``name`` of ``submodule`` (as ``.moe``), looked for below the package whose globals ``namespace`` is, and kept
    there from now on. The package is found by these and not by its name: a caller may have moved it under another
    parent after importing it."""
    loaded = list(sys.modules.items())
    own = (key for key, module in loaded if getattr(module, "__dict__", None) is namespace)
    package = next(own, namespace["__name__"])
    value = namespace[name] = getattr(importlib.import_module(submodule, package), name)
    return value
