"""At which numbers of tokens does this torch's cuBLAS leave tokens out of dlogits^T @ x? Needs a GPU.

    python tools/check_cublas.py [--hidden 3072] [--dtype bfloat16]

The layer does not use that product (sonicmoe/routing/router_weight.py); a model's other linear layers may.
"""

import argparse

import torch

EXPERTS = (8, 16, 32, 64, 128, 256)
COUNTS = (1, 3, 7, 33, 129, 257, 513, 1025, 2047, 2049, 2561, 3001, 3073, 3585, 3999, 4095, 4097, 4099, 4101, 4105)
COUNTS += (5001, 5121, 6145, 7168, 7169, 7171, 7173, 7175, 7177, 7185, 7201, 8191, 8193, 8195, 9001, 12289, 16383)
COUNTS += (16385, 20481, 32769, 32771, 65537)
# Rounding the result costs 0.2%; a token left out of 65537 costs 0.4%.
BOUND = 0.003


def missing(n_tokens: int, n_experts: int, hidden: int, dtype) -> tuple[float, float]:
    """(relative error of the product, share of the last token's part that the error is)."""
    dlogits, x = (torch.randn(n_tokens, width, device="cuda").to(dtype) for width in (n_experts, hidden))
    wanted, last = (part[0].double().t() @ part[1].double() for part in ((dlogits, x), (dlogits[-1:], x[-1:])))
    difference = (dlogits.t() @ x).double() - wanted
    return float(difference.norm() / wanted.norm()), float((difference * last).sum() / last.square().sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072, metavar="H")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    torch.manual_seed(0)
    where = f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    print(f"{where}, H={args.hidden}, {args.dtype}, {len(COUNTS)} counts")
    for n_experts in EXPERTS:
        found = {n: missing(n, n_experts, args.hidden, getattr(torch, args.dtype)) for n in COUNTS}
        wrong = {n: part for n, part in found.items() if not part[0] < BOUND}
        print(
            f"E={n_experts}: {len(wrong)} wrong",
            *(f"T={n} {e:.2%} ({p:+.2f})" for n, (e, p) in wrong.items()),
            sep="; ",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
