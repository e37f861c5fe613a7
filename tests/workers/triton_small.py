"""One group of checks of tests/support/{small,router,layout}_kernels.py and quantizers.py in Triton's interpreter, as
JSON: {check: what differed}."""

import json
import sys


def main(group: str):
    from tests.support import layout_kernels, quantizers, router_kernels, small_kernels

    checks = small_kernels.CHECKS | router_kernels.CHECKS | quantizers.CHECKS | layout_kernels.CHECKS
    print(json.dumps({check.__name__: check("cpu") for check in checks[group]}))


if __name__ == "__main__":
    main(sys.argv[1])
