"""Paddle over several GPUs with the device plugin and NCCL: collectives, and the layer with its experts spread out.

    python tools/ci/gpu_paddle_ranks.py --plugin DIR [--nccl FILE] [--paddle-site DIR] [--ranks N] [NAME ...]

--nccl is NCCL's library where the dynamic linker does not know libnccl.so.2. Rank 0's results come one line a case as
they are there; on a failure the end of each rank's log. --limit ends it all.

exact        each collective against NumPy, exactly
movement     dispatch and combine on Paddle's tape, exactly
speed        how fast an all-to-all is
bf16         ExpertParallelMoE forward and backward beside one rank with all experts, and the same bits four times
fp8_payload  the same, with tokens and the gradients of outputs travelling as FP8
fp8          the same, with experts that compute in FP8
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import uuid

import multicard_smoke as smoke

PARTS = pathlib.Path(__file__).resolve().parent / "gpu_paddle"
CASES = ("exact", "movement", "speed", "bf16", "fp8_payload", "fp8")
PASSED = ("SONICMOE_", "XDG_", "QUACK_", "CUTE_")


def environment(asked, mark: str) -> dict[str, str]:
    env = smoke.environment(mark)
    env |= {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    path = [str(smoke.ROOT), str(PARTS.parent), *([str(asked.paddle_site.resolve())] if asked.paddle_site else [])]
    env["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [env.get("PYTHONPATH")])])
    env["CUSTOM_DEVICE_ROOT"] = str(asked.plugin.resolve())
    if asked.nccl:
        env["SONICMOE_NCCL"] = str(asked.nccl.resolve())
    return {"GLOG_minloglevel": "2", **env}


class Heard:
    """Prints what rank 0 says, while it says it."""

    def __init__(self, log: pathlib.Path):
        self.log, self.shown = log, 0

    def print_more(self) -> None:
        if self.log.exists():
            lines = [line for line in self.log.read_text(errors="replace").splitlines(True) if line.endswith("\n")]
            said = [line.rstrip() for line in lines if line.startswith("ok ")]
            print(*said[self.shown :], sep="\n", end="\n" if said[self.shown :] else "", flush=True)
            self.shown = len(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--plugin", type=pathlib.Path, required=True)
    parser.add_argument("--nccl", type=pathlib.Path)
    parser.add_argument("--paddle-site", type=pathlib.Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all of it")
    parser.add_argument("--backend", default="auto", help="naive: without kernels, as on a device that is none")
    parser.add_argument("--tiny", action="store_true", help="smaller, for a CPU that stands in for GPUs")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    mark, began = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        logs = folder / "logs"
        command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--nproc_per_node"]
        command += [str(asked.ranks), "--host", "127.0.0.1", "--log_dir", str(logs), str(PARTS / "ranks.py")]
        command += ["--backend", asked.backend, "--limit", str(asked.limit), *(["--tiny"] if asked.tiny else [])]
        command += [name, *(asked.names or CASES)]
        heard = Heard(logs / "workerlog.0")
        with (folder / "launcher.log").open("w") as log:
            child = subprocess.Popen(
                command, cwd=smoke.ROOT, env=environment(asked, mark), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                wrong = smoke.watch(child, folder, asked.ranks, asked.limit, heard.print_more)
            finally:
                smoke.end_all(mark)
                child.wait()
        heard.print_more()
        seconds = time.monotonic() - began
        if wrong is not None:
            smoke.show_logs(logs)
            print("--- launcher", *(folder / "launcher.log").read_text().splitlines()[-smoke.SHOWN_LINES :], sep="\n")
            print(f"{asked.ranks} ranks: FAILED after {seconds:.0f} s: {wrong}")
            return 1
    print(f"{asked.ranks} ranks: all ok: {len(asked.names or CASES)} cases, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
