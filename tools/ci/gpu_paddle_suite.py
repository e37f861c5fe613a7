"""The Paddle node on a real GPU: contract, parity with torch, waits, memory, times.

    python tools/ci/gpu_paddle_suite.py --plugin DIR [--paddle-site DIR] [NAME ...]   stock Paddle on the device plugin
    python tools/ci/gpu_paddle_suite.py --device gpu [NAME ...]                       paddlepaddle-gpu
    python tools/ci/gpu_paddle_suite.py --list

DIR of --plugin holds libsonicmoe_gpu.so (tools/build_paddle_device.py); --paddle-site holds paddle where it is not
installed. Torch's part, for `parity`, `times` and `training`, runs in a process of its own: no process holds both
frameworks. Each case says how long it took. Everything made in between lies in --work, and what torch and Paddle on the
CPU left there is used again. `training` leaves training.csv; gpu_paddle/training.py draws it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = Path(__file__).resolve().parent / "gpu_paddle"
CASES = (
    "numerics",
    "edges",
    "again",
    "layers",
    "one_forward_one_backward",
    "recompute",
    "weights_that_change",
    "weights_that_move",
    "weights_that_change_in_flight",
    "weights_in_another_type",
    "adamw",
    "checkpoint",
    "two_streams",
    "no_wait",
    "training",
    "parity",
    "times",
    "memory",
)
# What a case wants of processes before it: (who it is, its command, the file that it leaves in --work).
BEFORE = {
    "parity": [("torch", ["torch_side.py", "parity", "{work}/parity.npz"], "parity.npz")],
    "times": [("torch", ["torch_side.py", "time", "{work}/time.json"], "time.json")],
    "training": [
        ("Paddle on the CPU", ["training.py", "paddle_cpu", "{work}"], "paddle_cpu.json"),
        ("torch", ["training_torch.py", "{work}"], "torch_gpu.json"),
    ],
}
DEVICE = "sonicmoe_gpu:0"


def environment(asked, paddle: bool) -> dict[str, str]:
    env, first = dict(os.environ), [str(ROOT), str(PARTS.parent)]
    if paddle and asked.paddle_site:
        first.append(str(asked.paddle_site.resolve()))
    env["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [env.get("PYTHONPATH")])])
    env.pop("CUSTOM_DEVICE_ROOT", None)
    if paddle and asked.device != "gpu":
        env["CUSTOM_DEVICE_ROOT"] = str(asked.plugin.resolve())
    env.setdefault("GLOG_minloglevel", "2")
    return env


def why_not(asked) -> str | None:
    """What keeps this device from being tried; None if nothing does."""
    question = "import paddle; print(paddle.__version__, paddle.is_compiled_with_cuda())"
    command = [sys.executable, "-W", "ignore", "-c", question]
    told = subprocess.run(command, env=environment(asked, True), capture_output=True, text=True)
    if told.returncode:
        return f"paddle does not load: {told.stderr.strip().splitlines()[-1]}"
    version, with_cuda = told.stdout.split()[-2:]
    if asked.device == "gpu" and with_cuda != "True":
        return f"paddle {version} is built without CUDA; --device gpu needs paddlepaddle-gpu"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--device", default=DEVICE, help=f"gpu, or a place of the plugin ({DEVICE})")
    parser.add_argument("--plugin", type=Path)
    parser.add_argument("--paddle-site", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(CASES))
        return 0
    unknown = [name for name in asked.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if asked.device != "gpu" and asked.plugin is None:
        parser.error("--plugin: where libsonicmoe_gpu.so lies, or --device gpu")
    reason = why_not(asked)
    if reason is not None:
        print(f"skipped: {reason}")
        return 0 if asked.device == "gpu" else 1
    names, begin = asked.names or list(CASES), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        work = asked.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            for who, (script, *rest), file in BEFORE.get(name, []):
                if (work / file).exists():
                    continue
                command = [sys.executable, "-W", "ignore", str(PARTS / script), *(a.format(work=work) for a in rest)]
                env = environment(asked, who != "torch")
                env.pop("CUSTOM_DEVICE_ROOT", None)
                subprocess.run(command, env=env, check=True)
                print(f"{who} has done its part of {name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        device = "gpu:0" if asked.device == "gpu" else asked.device
        command = [sys.executable, "-W", "ignore", str(PARTS / "cases.py"), device, str(work), *names]
        failed = subprocess.run(command, env=environment(asked, True)).returncode
    print(f"{'FAILED' if failed else 'all ok'}: {len(names)} cases, {time.perf_counter() - begin:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(main())
