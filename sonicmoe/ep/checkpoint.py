"""Checkpoints that any number of ranks reads, whatever number wrote them.

    checkpoint.save(folder, layer.comm, files, shared, experts, layer.held)
    shared, experts = checkpoint.load(folder, files, layer.held)

``shared`` is what all ranks have alike; rank 0 writes it. ``experts`` has, by name, one value for each expert that the
rank holds: weights, and the optimizer's state of them. Every rank writes one file with its own experts, and a reader
opens those files that hold an expert of his.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INDEX = "index.json"
_SHARED = "shared"


@dataclass(frozen=True)
class Files:
    """How one framework writes an object to a file and reads it."""

    write: Any  # (object, path) -> None
    read: Any  # (path) -> object


def torch_files() -> Files:
    import torch

    # To the CPU: the GPU that a rank wrote from may not be there for the reader, or be another rank's.
    read = lambda path: torch.load(path, weights_only=True, map_location="cpu")  # noqa: E731
    return Files(lambda what, path: torch.save(what, path), read)


def paddle_files() -> Files:
    import paddle

    return Files(lambda what, path: paddle.save(what, str(path)), lambda path: paddle.load(str(path)))


def save(folder, comm, files: Files, shared: dict, experts: dict, held: range) -> None:
    """All ranks call it together. The index comes last and through another name: a folder that has one is whole."""
    folder = Path(folder)
    for name, values in experts.items():
        if len(values) != len(held):
            raise ValueError(f"experts[{name!r}]: got {len(values)} values, need one for each of {len(held)} experts")
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)
    comm.barrier()
    mine = {expert: {name: values[place] for name, values in experts.items()} for place, expert in enumerate(held)}
    files.write(mine, folder / _part(comm.rank, comm.size))
    if comm.rank == 0:
        files.write(shared, folder / _SHARED)
    comm.barrier()
    if comm.rank == 0:
        index = {_part(rank, comm.size): [rank * len(held), (rank + 1) * len(held)] for rank in range(comm.size)}
        partial = folder / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index))
        os.replace(partial, folder / _INDEX)
    comm.barrier()


def _part(rank: int, size: int) -> str:
    return f"experts-{rank}-of-{size}"


def load(folder, files: Files, held: range) -> tuple[dict, dict]:
    """(shared, {name: [one for each expert of ``held``]}). Each rank reads for itself."""
    folder = Path(folder)
    try:
        index = json.loads((folder / _INDEX).read_text())
    except FileNotFoundError:
        raise ValueError(f"folder: {folder} has no {_INDEX}; no checkpoint, or one that was never finished") from None
    n_saved = max(stop for _, stop in index.values())
    if held.stop > n_saved:
        raise ValueError(f"held: got experts up to {held.stop - 1}, but {folder} has {n_saved} experts")
    found = {}
    for part, (start, stop) in index.items():
        if start < held.stop and held.start < stop:
            found |= files.read(folder / part)
    names = found[held.start].keys() if len(held) else ()
    for expert in held:
        if found[expert].keys() != names:
            one, other = sorted(names), sorted(found[expert])
            raise ValueError(f"folder: {folder} has {other} for expert {expert}, but {one} for expert {held.start}")
    return files.read(folder / _SHARED), {name: [found[expert][name] for expert in held] for name in names}
