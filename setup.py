"""Packaging of sonicmoe."""

import re
import site
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version():
    """Read the version from the source text: importing the package here would need its dependencies."""
    text = (HERE / "sonicmoe" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('sonicmoe/__init__.py must hold a line of the form __version__ = "1.2.3"')
    return found.group(1)


def has_gpu_paddle():
    """Whether the environment that we are being built for holds paddlepaddle-gpu.

    pip builds in isolation: sys.path then shows only the build tools, while the interpreter, and so
    sysconfig's folders, are still those of the environment that gets the package. Look in both.
    """
    paths = sysconfig.get_paths()
    where = [paths["purelib"], paths["platlib"], site.getusersitepackages()]
    for path in (None, where):
        found = metadata.distributions() if path is None else metadata.distributions(path=path)
        for dist in found:
            name = dist.metadata["Name"] or ""
            if re.sub(r"[-_.]+", "-", name).lower() == "paddlepaddle-gpu":
                return True
    return False


# paddlepaddle and paddlepaddle-gpu install the same folder `paddle`. A requirement on the first would put the
# CPU wheel on top of a GPU build and leave a mixture that runs on no GPU, and a requirement cannot say "either of
# these". So it is left out where the GPU build is already there.
# The limit: this is decided when the package is BUILT. `pip install .`, `pip install -e .` and an install from the
# sdist build on the machine itself and get it right (build front ends that make an environment of their own see no
# GPU build; use pip, or turn their isolation off). A wheel carries the answer of the machine that made it: wheels
# for others are to be made where no paddlepaddle-gpu is, and go onto a GPU machine with `pip install --no-deps`.
# Installing paddlepaddle-gpu only after sonicmoe means uninstalling paddlepaddle first.
PADDLE = [] if has_gpu_paddle() else ["paddlepaddle>=3.3"]

DEMO = ["matplotlib>=3.8", "tqdm>=4.66"]

setup(
    name="sonicmoe",
    version=version(),
    description="A Mixture-of-Experts layer for Paddle and torch: one engine, BF16 and block-scaled FP8",
    author="The sonicmoe authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # csrc/ lies at the top of the repository, beside the package, and lands inside the installed one: the JIT
    # compiles from there on the user's machine. A checkout keeps it at the top, an editable install included.
    packages=[*find_packages(include=["sonicmoe", "sonicmoe.*"]), "sonicmoe.csrc"],
    package_dir={"sonicmoe.csrc": "csrc"},
    package_data={"sonicmoe.csrc": ["README.md", "**/*.cu", "**/*.cuh", "**/*.cpp", "**/*.h"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=[*PADDLE, "numpy", "filelock>=3.10", "pybind11"],  # filelock: the first with a mode for its files
    extras_require={
        # The two exact pins are compilers whose Python interfaces change from release to release.
        # quack imports torch and Triton where it compiles, and asks for the first alone. torch before 2.10 hands its
        # tensors to TVM-FFI through torch-c-dlpack-ext; without it each machine would have to compile a stand-in first.
        "gpu": [
            "triton",
            "nvidia-cutlass-dsl==4.8.1",
            "quack-kernels==0.6.5",
            "apache-tvm-ffi>=0.1.6,<0.2",
            "torch-c-dlpack-ext",
        ],
        "torch": ["torch>=2.7"],
        "demo": DEMO,
        "dev": ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", *DEMO],
    },
)
