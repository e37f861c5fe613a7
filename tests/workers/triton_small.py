"""One group of checks of tests/support/small_kernels.py in Triton's interpreter: {check: what differed} as JSON."""

import json
import sys


def main(group: str):
    from tests.support import small_kernels

    print(json.dumps({check.__name__: check("cpu") for check in small_kernels.CHECKS[group]}))


if __name__ == "__main__":
    main(sys.argv[1])
