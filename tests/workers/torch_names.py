"""Which of the dotted names on the command line torch lacks, and what its tensors can do: [missing, names] as JSON."""

import inspect
import json
import sys


def resolve(torch, name: str):
    """What a dotted name stands for; raises AttributeError. Beyond modules and classes an instance begins."""
    value = torch
    for part in name.split(".")[1:]:
        if not (inspect.ismodule(value) or inspect.isclass(value)):
            break
        value = getattr(value, part)
    return value


def main():
    import torch

    missing = []
    for name in sys.argv[1:]:
        try:
            resolve(torch, name)
        except AttributeError:
            missing.append(name)
    print(json.dumps([missing, dir(torch.Tensor)]))


if __name__ == "__main__":
    main()
