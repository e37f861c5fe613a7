"""Makes .venv what the tests and the demo need, or finds that it already is.

    ensure_env.py            Paddle, sonicmoe (editable) and its dev tools
    ensure_env.py --torch    and a real torch in .venv/torch-site, out of reach of .venv's own Python, and beside it
                             .venv/triton-site, for the kernels in Triton's interpreter and its compiler, and
                             .venv/gemm-site, for the generator of the GEMMs

Only the standard library is used: this runs before anything is installed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TORCH_SITE = VENV / "torch-site"
TRITON_SITE = VENV / "triton-site"
GEMM_SITE = VENV / "gemm-site"
# For the paths of child processes; each with a stamp of its own, and built beside those before it.
SITES = (TORCH_SITE, TRITON_SITE, GEMM_SITE)
CONSTRAINTS = ROOT / "tools" / "ci" / "constraints.txt"
# In a site of its own, because the interpreter of this Triton hands arrays of one element to NumPy as scalars, which
# NumPy 2.4 no longer takes: it needs an older NumPy than everything else.
TRITON_PINS = ["triton==3.6.0", "numpy==2.3.5"]
# The generator as setup.py's extra `gpu` pins it, and of all that its packages ask for what compiling and loading a
# kernel takes: 110 MB instead of gigabytes of CUDA. Of its two compilers, the one that pip picks for the extra.
GEMM_PINS = [
    "quack-kernels==0.6.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu12==4.8.1",
    "apache-tvm-ffi==0.1.15.post2",
    "cuda-bindings==13.4.4",
    "cuda-pathfinder==1.9.0",
]
PIP = ["-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "install", "--progress-bar", "off"]


def say(text):
    print(f"env: {text}", flush=True)


@contextmanager
def locked():
    """One builder at a time; the others wait, and then find the work done."""
    with open(ROOT / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run_step(what, command, lock, env=None):
    """Run one command with its output in the log; a failure ends the set-up with the log's last lines."""
    log = VENV / "setup.log"
    began = time.monotonic()
    with open(log, "a") as out:
        out.write(f"\n$ {' '.join(map(str, command))}\n")
        out.flush()
        # The child inherits the lock, so that one outliving this script still keeps other builders away.
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, pass_fds=(lock,)
        )
    if done.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if "is ignored: it is" not in line]
        print("\n".join(lines[-30:]), file=sys.stderr)
        sys.exit(f"env: failed: {what} (everything it printed is in {log.relative_to(ROOT)})")
    say(f"{what:<52} {time.monotonic() - began:6.1f} s")


def expected_key():
    """Changes with everything that decides what gets installed."""
    digest = hashlib.sha256()
    for path in (ROOT / "setup.py", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes() + b"\0")
    # The version is in the installed metadata. The place is in the scripts and in the editable install: an
    # environment that was copied along with the tree would run the code of the tree it came from.
    init = (ROOT / "sonicmoe" / "__init__.py").read_text(encoding="utf-8")
    digest.update("".join(line for line in init.splitlines() if line.startswith("__version__")).encode())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


def python_version(python):
    """The version of an interpreter that may be broken or absent; then None."""
    try:
        ask = "import platform; print(platform.python_version())"
        done = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def first_missing(site, dists):
    """The first installed file that is gone, by the installer's own records."""
    for dist in dists:
        try:
            record = (site / dist / "RECORD").read_text(encoding="utf-8")
        except OSError:
            return dist
        for line in record.splitlines():
            name = line.rsplit(",", 2)[0].strip('"')
            # Byte code comes and goes; scripts of a --target install are recorded where they do not lie.
            if name.endswith(".pyc") or (site in SITES and name.startswith("..")):
                continue
            if not os.path.exists(os.path.join(site, name)):
                return name
    return None


def installed(site):
    return sorted(path.name for path in site.glob("*.dist-info"))


def venv_site():
    found = sorted((VENV / "lib").glob("python3.*/site-packages"))
    return found[0] if found else VENV / "lib"


def why_unfit(stamp, site, version):
    """None if the stamp is there, of today, and tells the truth; otherwise the reason to build anew."""
    if not stamp.exists():
        return "never finished" if site.exists() else "not there yet"
    try:
        written = json.loads(stamp.read_text())
        key, built_by, dists = written["key"], written["python"], written["dists"]
    except (ValueError, KeyError, TypeError):
        return "its stamp is unreadable"
    if key != expected_key():
        return "setup.py, the pins or its place changed"
    if version is None or built_by != version:
        return f"built for Python {built_by}, which is not what it has now"
    missing = first_missing(site, dists)
    return f"{missing} is missing from it" if missing else None


def write_stamp(stamp, site, version):
    stamp.write_text(json.dumps({"key": expected_key(), "python": version, "dists": installed(site)}))


def wanted_version():
    """A Python that the caller named is the one to use; one that we found ourselves yields to an existing build."""
    return python_version(sys.executable) if os.environ.get("PYTHON") else None


def core_problem():
    version = python_version(PYTHON)
    wanted = wanted_version()
    problem = why_unfit(VENV / "stamp.json", venv_site(), version)
    if problem is None and wanted not in (None, version):
        return f"built for Python {version}, and PYTHON says {wanted}"
    if problem is None and any(name.startswith("torch-") for name in installed(venv_site())):
        return "a real torch got into it, which the tests of the torch proxy must not see"
    return problem


def ensure_core(lock):
    problem = core_problem()
    if problem is None:
        return False
    say(f"building .venv ({problem})")
    VENV.mkdir(exist_ok=True)
    # The stamp goes first, and the new one comes last: whatever interrupts us, a half-built tree has none.
    (VENV / "stamp.json").unlink(missing_ok=True)
    for path in VENV.iterdir():
        if path in SITES:
            continue  # big, and judged by stamps of their own
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    version = python_version(sys.executable)
    run_step(f"virtual environment, Python {version}", [sys.executable, "-m", "venv", VENV], lock)
    pins = ["-c", CONSTRAINTS]
    run_step("pip and setuptools", [PYTHON, *PIP, "--upgrade", *pins, "pip", "setuptools", "wheel"], lock)
    # Without isolation the build uses the setuptools pinned above instead of fetching whichever is newest.
    editable = ["--no-build-isolation", "-e", f"{ROOT}[dev]"]
    run_step("Paddle, test tools and sonicmoe itself", [PYTHON, *PIP, *pins, *editable], lock)
    write_stamp(VENV / "stamp.json", venv_site(), version)
    problem = core_problem()
    if problem is not None:
        sys.exit(f"env: .venv is still unfit after building it: {problem}")
    return True


def ensure_site(site, what, packages, check, lock):
    """A folder of packages for the path of child processes."""
    version = python_version(PYTHON)
    stamp = site / "stamp.json"
    problem = why_unfit(stamp, site, version)
    if problem is None:
        return False
    say(f"building .venv/{site.name} ({problem})")
    stamp.unlink(missing_ok=True)
    if site.exists():
        shutil.rmtree(site)
    run_step(what, [PYTHON, *PIP, "--target", site, *packages], lock)
    # cutlass lies deeper, where a .pth file points to in an ordinary installation.
    path = (site, site / "nvidia_cutlass_dsl" / "dsl_packages", *SITES[: SITES.index(site)])
    beside = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    run_step(f"{what}: imports beside .venv's packages", [PYTHON, "-c", check], lock, env=beside)
    write_stamp(stamp, site, version)
    return True


def ensure_torch(lock):
    built = ensure_site(TORCH_SITE, "torch", ["-c", CONSTRAINTS, "torch"], "import numpy, torch", lock)
    # Without what they ask for: Triton wants no other package, NumPy neither.
    packages = ["--no-deps", *TRITON_PINS]
    check = (
        "import numpy, torch, triton; assert [f'{m.__name__}=={m.__version__}' for m in (triton, numpy)] == "
        + repr(TRITON_PINS)
    )
    built = ensure_site(TRITON_SITE, "triton", packages, check, lock) or built
    check = "import quack, tvm_ffi; from cutlass.cute.runtime import load_module"
    return ensure_site(GEMM_SITE, "generator of the GEMMs", ["--no-deps", *GEMM_PINS], check, lock) or built


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="also set up the sites beside it: torch, Triton, GEMMs")
    args = parser.parse_args()
    # With .venv activated, "python3" is the one inside it: step out before pulling it down.
    base = getattr(sys, "_base_executable", sys.executable)
    if sys.prefix != sys.base_prefix and base != sys.executable:
        os.execv(base, [base, __file__, *sys.argv[1:]])
    with locked() as lock:
        built = ensure_core(lock)
        if args.torch:
            built = ensure_torch(lock) or built
    if not built:
        say(".venv is up to date")


if __name__ == "__main__":
    main()
