"""The device plugin for stock Paddle over its stand-ins for CUDA and NCCL, built once a session."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.support import children

BUILD = children.ROOT / "tools" / "build_paddle_device.py"


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler to build the device plugin with")
    spec = importlib.util.find_spec("paddle")
    if not Path(spec.origin).with_name("include").is_dir():
        pytest.skip("this paddle has no headers to build the device plugin against")
    folder = tmp_path_factory.mktemp("plugin")
    children.python(BUILD, folder, "--stand-in", timeout=300)
    return folder


def variables(plugin: Path, ranks: int, folder: Path) -> dict[str, str]:
    """For ``ranks`` processes with a device each. Messages between them are files under ``folder``."""
    devices = dict(CUSTOM_DEVICE_ROOT=plugin, SONICMOE_STAND_IN_DEVICES=max(ranks, 2), TMPDIR=folder)
    return {name: str(value) for name, value in devices.items()}
