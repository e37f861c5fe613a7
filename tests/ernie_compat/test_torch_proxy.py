"""Inside the package `torch` is Paddle, and for everybody else it stays what it was: seen from child processes."""

import functools

import pytest

from tests.support import children

PROBE = children.WORKERS / "proxy_probe.py"

# In which order a user may come by: enable means the user's own call of paddle.enable_compat.
ORDERS = {
    "never enabled": ("import sonicmoe", "import ernie_compat"),
    "scope, sonicmoe": ("enable scope", "import sonicmoe", "import ernie_compat"),
    "sonicmoe, scope": ("import sonicmoe", "enable scope", "import ernie_compat"),
    "scope afterwards": ("import ernie_compat", "enable elsewhere"),
    "for another package": ("enable elsewhere", "import ernie_compat"),
    "global, sonicmoe": ("enable global", "import sonicmoe", "import ernie_compat"),
    "sonicmoe, global": ("import sonicmoe", "enable global", "import ernie_compat"),
    "ensured again": ("import ernie_compat", "ensure", "ensure"),
}


@functools.cache
def probe(*steps, site=None, path=()):
    """What proxy_probe.py reports after the steps, with the real torch of ``site`` on its path if given."""
    pythonpath = [children.ROOT, *path, *([site] if site else [])]
    env = children.clean_env(pythonpath, **({"PROBE_TORCH_SITE": site} if site else {}))
    found = children.answer(PROBE, children.json.dumps(steps), env=env)
    # On Paddle, all of them; and they are there, so that this is no statement about nothing.
    if not found["errors"]:
        names = {name.removeprefix("vendor_ops.") for name in found["ours"]}
        assert {"sonicmoe.launch", "sonicmoe.gemm.naive", "sonicmoe.quant.naive", "sonicmoe.routing.naive"} <= names
        assert set(found["ours"].values()) == {"paddle"}, found["ours"]
    return found


def users_torch(order, site=None):
    """Whoever turned the proxy on globally gets Paddle everywhere; nobody else meets it."""
    return "paddle" if "global" in order else "torch" if site else None


@pytest.mark.parametrize("order", ORDERS)
def test_without_torch(order):
    found = probe(*ORDERS[order], "run node")
    assert found["errors"] == []
    assert found["user's torch"] == users_torch(order)


@pytest.mark.torch
@pytest.mark.parametrize("order", ORDERS)
def test_beside_an_installed_torch(order):
    site = children.torch_site()
    found = probe(*ORDERS[order], "run node", site=site)
    assert found["errors"] == []
    assert found["real torch"] == []
    # Asked for after that list was made: it shows that the torch was in reach all the time.
    assert found["user's torch"] == users_torch(order, site)


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "scope afterwards"])
def test_one_finder(order):
    """Paddle's call inserts its finder anew each time, and ``disable_compat`` removes one: a second one would stay."""
    assert probe(*ORDERS[order], "run node")["finders"] == 1


@pytest.mark.parametrize(
    "hidden", [("hide enable_compat",), ("hide enable_torch_proxy",), ("hide silent",)], ids=lambda steps: steps[0]
)
def test_either_name_of_the_switch(hidden):
    found = probe(*hidden, "import ernie_compat", "run node")
    assert found["errors"] == []
    assert found["finders"] == 1


def test_paddle_without_the_switch():
    found = probe("hide enable_compat", "hide enable_torch_proxy", "import ernie_compat", "import ernie_compat")
    assert [step for step, _ in found["errors"]] == ["import ernie_compat"] * 2
    for _, text in found["errors"]:
        assert text.startswith("ImportError: sonicmoe: paddle 3.")
        assert "neither paddle.enable_compat nor paddle.compat.enable_torch_proxy" in text
        assert "need paddlepaddle 3.3 or newer" in text
    assert found["finders"] == 0


@pytest.fixture
def renamed(tmp_path):
    """A folder where the package goes by the name of vendor_ops.sonicmoe, as a framework ships it."""
    parent = tmp_path / "vendor_ops"
    parent.mkdir()
    (parent / "__init__.py").touch()
    (parent / "sonicmoe").symlink_to(children.ROOT / "sonicmoe", target_is_directory=True)
    return tmp_path


@pytest.mark.parametrize("also", [(), ("import ernie_compat", "run node")], ids=["alone", "beside sonicmoe"])
def test_under_another_parent(renamed, also):
    found = probe(*also, "import renamed", "run renamed", path=(renamed,))
    assert found["errors"] == []
    assert {name.partition(".")[0] for name in found["ours"]} == {"vendor_ops", *(["sonicmoe"] if also else [])}
    assert found["finders"] == 1


@pytest.mark.torch
@pytest.mark.parametrize("parent", ["sonicmoe", "vendor_ops"])
def test_torch_imported_before_by_the_user(parent, renamed):
    """It stays the user's own, the same module, and works; ours runs on Paddle next to it."""
    name = "ernie_compat" if parent == "sonicmoe" else "renamed"
    run = "run node" if parent == "sonicmoe" else "run renamed"
    found = probe("user torch", f"import {name}", run, site=children.torch_site(), path=(renamed,))
    assert found["errors"] == []
    assert found["user's torch"] == "torch" and found["same torch as before"]


@pytest.mark.torch
@pytest.mark.parametrize("first", [True, False], ids=["imported before", "imported after"])
def test_torch_works_for_the_users_own_code(first):
    before = ["user torch"] if first else []
    found = probe(*before, "import ernie_compat", "use torch", "run node", "use torch", site=children.torch_site())
    assert found["errors"] == []
    assert found["user's torch"] == "torch" and found["same torch as before"]


@pytest.mark.torch
def test_other_packages_keep_the_real_torch(tmp_path):
    """A package outside the scope, imported after us, by code that we call or by its own."""
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "__init__.py").write_text("import torch\nimport torch.nn as nn\n")
    (tmp_path / "sonicmoe_tools.py").write_text("import torch\n")  # a name that only begins like ours
    script = """
        import json, sonicmoe.ernie_compat, paddle, somebody, sonicmoe_tools
        found = [somebody.torch, somebody.nn, sonicmoe_tools.torch]
        print(json.dumps([module.__file__ for module in found]))
    """
    site = children.torch_site()
    found = children.answer(script, env=children.clean_env([children.ROOT, tmp_path, site]))
    assert all(file.startswith(str(site)) for file in found), found


@pytest.mark.torch
@pytest.mark.parametrize("loaded", ["engine", "quantizer"])
def test_the_engine_is_on_torch_already(loaded):
    """One process runs one framework: a clear error, each time, and the engine stays what it is."""
    steps = (f"import {loaded}", "import ernie_compat", "import ernie_compat")
    found = probe(*steps, site=children.torch_site())
    assert [step for step, _ in found["errors"]] == ["import ernie_compat"] * 2
    for _, text in found["errors"]:
        assert text.startswith("ImportError: sonicmoe: ")
        assert "on real torch" in text and "process" in text
    module = {"engine": "sonicmoe.launch", "quantizer": "sonicmoe.quant.naive"}[loaded]
    assert found["ours"][module] == "torch"
    assert found["user's torch"] == "torch"
