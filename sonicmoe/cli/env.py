"""Print the flags in force and what the machine offers: ``python -m sonicmoe.cli.env``.

No framework is imported and no device initialised, so this is safe on a login node and beside a running job.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..config import FLAGS, read_environment

# Module -> the distributions that may have brought it.
PACKAGES = {
    "paddle": ("paddlepaddle-gpu", "paddlepaddle"),
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton"),
    "cutlass": ("nvidia-cutlass-dsl",),
    "quack": ("quack-kernels",),
    "tvm_ffi": ("apache-tvm-ffi",),
}

# The driver creates it at load, so it is there even where nvidia-smi is not (slim containers).
DEVICE_NODE = Path("/dev/nvidia0")
SMI_TIMEOUT_S = 10


def flag_rows() -> list[dict[str, Any]]:
    """One row a flag, in the table's order. Raises ValueError where the environment holds a bad value."""
    found = read_environment()
    return [
        {
            "name": flag.env,
            "field": flag.field,
            "value": _as_text(found.get(flag.env, flag.default_value())),
            "source": "environment" if flag.env in found else "default",
            "kind": flag.kind,
            "allowed": flag.domain.text,
            "default": _as_text(flag.default),
            "meaning": flag.meaning,
        }
        for flag in FLAGS
    ]


def package_rows() -> list[dict[str, Any]]:
    return [
        {"module": module, "found": importlib.util.find_spec(module) is not None, "version": _version(distributions)}
        for module, distributions in PACKAGES.items()
    ]


def gpu_report() -> dict[str, Any]:
    """Whether a GPU is there, as far as the driver's own tool or its device node can tell."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        trouble = "nvidia-smi is not on PATH"
    else:
        query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            trouble = f"nvidia-smi did not answer: {error}"
        else:
            gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            if done.returncode == 0 and gpus:
                return {"found": True, "detail": gpus}
            trouble = f"nvidia-smi lists no GPU (exit status {done.returncode})"
    if DEVICE_NODE.exists():
        return {"found": True, "detail": [f"{DEVICE_NODE} exists, though {trouble}"]}
    return {"found": False, "detail": [f"{trouble}, and there is no {DEVICE_NODE}"]}


def markdown_table() -> str:
    """The README's table. It describes the flags and not this environment, so it is the same everywhere."""
    rows = [("Flag", "Kind", "Allowed", "Default", "Meaning"), ("---",) * 5]
    for flag in FLAGS:
        default = _as_text(flag.default)
        shown = "unset" if default is None else f"`{default}`"
        rows.append((f"`{flag.env}`", flag.kind, flag.domain.text, shown, _sentence(flag.meaning)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _as_text(value: Any) -> str | None:
    """A value as one would write it into the environment; None stands for unset."""
    if value is None:
        return None
    return str(int(value)) if isinstance(value, bool) else str(value)


def _sentence(meaning: str) -> str:
    return meaning[0].upper() + meaning[1:]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def report(flags: list[dict[str, Any]], packages: list[dict[str, Any]], gpu: dict[str, Any]) -> str:
    table = [("flag", "kind", "value", "source", "meaning")]
    for row in flags:
        value = "unset" if row["value"] is None else row["value"]
        table.append((row["name"], row["kind"], value, row["source"], _sentence(row["meaning"])))
    modules = [("package", "found", "version")]
    for row in packages:
        version = (row["version"] or "unknown") if row["found"] else ""
        modules.append((row["module"], "yes" if row["found"] else "no", version))
    gpus = [f"GPU: {'found' if gpu['found'] else 'none found'}", *(f"  {line}" for line in gpu["detail"])]
    return "\n".join([*_columns(table), "", *_columns(modules), "", *gpus])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sonicmoe.cli.env",
        description="Print every environment flag with its value and where it came from, "
        "then the optional packages and GPUs of this machine.",
        epilog="Exit status: 0, or 2 where a flag holds a bad value or an unknown SONIC_MOE_ flag is set.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same as JSON: flags, packages, gpu")
    form.add_argument("--markdown", action="store_true", help="print the README's table of flags, whatever is set")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown_table())
        return 0
    try:
        flags = flag_rows()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    packages, gpu = package_rows(), gpu_report()
    if options.json:
        print(json.dumps({"flags": flags, "packages": packages, "gpu": gpu}, indent=2))
    else:
        print(report(flags, packages, gpu))
    return 0


if __name__ == "__main__":
    # End quietly when the reader of a pipe has seen enough, as in `... | head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
