"""What importing does, seen from child processes: nothing but to define names."""

import pytest

from tests.support import children

# What runs on a machine without any framework: a login node, a build machine, a launcher.
FRAMEWORK_FREE = (
    "sonicmoe",
    "sonicmoe.capabilities",
    "sonicmoe.checks",
    "sonicmoe.cli.env",
    "sonicmoe.config",
    "sonicmoe.enums",
    "sonicmoe.quant.formats",
    "sonicmoe.wgrad_deferral",
)
# A flag is read at the call and not at import, so a bad one must not keep anybody from importing.
BAD_FLAG = {"SONIC_MOE_FP8_MODE": "nonsense"}

IMPORT_ALONE = """
    import importlib, json, sys, time
    from tests.workers.process_state import changed, snapshot

    before, modules, began = snapshot(), set(sys.modules), time.process_time()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    seconds = time.process_time() - began
    fresh = {name.partition(".")[0] for name in set(sys.modules) - modules}
    foreign = sorted(fresh - set(sys.stdlib_module_names) - {"sonicmoe"})
    print(json.dumps({"changed": changed(before), "foreign": foreign, "seconds": seconds}))
"""


@pytest.mark.parametrize("module", FRAMEWORK_FREE)
def test_import_is_quiet_and_needs_nothing(module):
    # -S: no site-packages at all, so this is also the machine where nothing is installed.
    found = children.answer(IMPORT_ALONE, module, options=["-S"], env=children.clean_env(**BAD_FLAG))
    assert found["changed"] == {}
    assert found["foreign"] == []


def test_import_of_the_package_loads_nothing_that_is_installed():
    """Beside an installed Paddle: neither it nor NumPy comes in, so the import is over at once."""
    asked = "import importlib.util as u; assert u.find_spec('paddle') and u.find_spec('numpy')\n"
    children.python(asked)  # otherwise this test would show nothing
    found = children.answer(IMPORT_ALONE, *FRAMEWORK_FREE, env=children.clean_env(**BAD_FLAG))
    assert found["changed"] == {}
    assert found["foreign"] == []
    # CPU time, so that a busy machine does not count. It takes 0.05 s; Paddle alone would take more than 1 s.
    assert found["seconds"] < 0.5


def test_public_names_without_paddle():
    """Asking for what needs Paddle says that Paddle is missing; a name that nobody has is another error."""
    script = """
        import json, sonicmoe
        found = {}
        for name in ("SonicMoEMlpNode", "run_sonic_moe", "nonsense"):
            try:
                getattr(sonicmoe, name)
            except (ImportError, AttributeError) as error:
                found[name] = [type(error).__name__, str(error)]
        found["config"] = repr(sonicmoe.SonicMoEConfig(fp8_mode="perf"))
        print(json.dumps(found))
    """
    found = children.answer(script, options=["-S"])
    for name in ("SonicMoEMlpNode", "run_sonic_moe"):
        assert found[name] == ["ModuleNotFoundError", "No module named 'paddle'"]
    assert found["nonsense"][0] == "AttributeError" and "'nonsense'" in found["nonsense"][1]
    assert found["config"] == "SonicMoEConfig(fp8_mode='perf')"


def test_environment_report_without_any_framework():
    done = children.check(children.run([children.sys.executable, "-S", "-m", "sonicmoe.cli.env", "--json"]))
    packages = {row["module"]: row["found"] for row in children.json.loads(done.stdout)["packages"]}
    assert packages["paddle"] is False and packages["torch"] is False
    assert done.stderr == ""


def test_environment_report_loads_no_framework():
    script = """
        import json, runpy, sys
        sys.argv = ["env"]
        try:
            runpy.run_module("sonicmoe.cli.env", run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & {"paddle", "torch", "numpy"})))
    """
    assert children.answer(script) == []


PADDLE_FIRST = """
    import json, sys
    import paddle
    from tests.workers.process_state import changed, paddle_state, snapshot

    before, ours, modules = snapshot(), paddle_state(), set(sys.modules)
    finders = list(sys.meta_path)
    import sonicmoe.ernie_compat

    after = paddle_state()
    fresh = {name.partition(".")[0] for name in set(sys.modules) - modules}
    print(json.dumps({
        "changed": changed(before),
        "paddle": {name: [ours[name], after[name]] for name in ours if ours[name] != after[name]},
        "finders": [type(finder).__name__ for finder in sys.meta_path if finder not in finders],
        "kept": [finder for finder in sys.meta_path if finder in finders] == finders,
        "foreign": sorted(fresh - set(sys.stdlib_module_names) - {"sonicmoe"}),
    }))
"""


def test_import_of_the_paddle_glue_adds_one_finder_and_nothing_else():
    found = children.answer(PADDLE_FIRST, env=children.clean_env(**BAD_FLAG))
    assert found["finders"] == ["TorchProxyMetaFinder"] and found["kept"]
    assert set(found["changed"]) == {"sys.meta_path"}, found["changed"]
    assert found["paddle"] == {}
    assert found["foreign"] == []


def test_environment_is_what_paddle_leaves():
    """Where our import is the first to bring Paddle in, the environment is that of a bare ``import paddle``."""
    script = """
        import importlib, json, os, sys
        from tests.workers.process_state import c_environment
        importlib.import_module(sys.argv[1])
        print(json.dumps([dict(os.environ), c_environment()]))
    """
    bare, glue = ({}, {})
    for module, found in (("paddle", bare), ("sonicmoe.ernie_compat", glue)):
        found["os"], found["C"] = children.answer(script, module)
        for kind in found.values():
            kind.pop("SONICMOE_TEST_CHILD")  # another for each child
    assert glue == bare


def test_no_warning_and_no_output_from_import_or_use():
    script = """
        import json, os, sys, tempfile, warnings
        import paddle

        sys.stdout.flush()
        kept = os.dup(1)
        log = tempfile.TemporaryFile()
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)  # what C++ code logs as well
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from sonicmoe import SonicMoEConfig
            from tests.support import paddle_runs, problems

            for recipe in ("sm90", "sm100"):
                for fp8 in (False, True):
                    problem = problems.make_problem(n_tokens=8)
                    config = SonicMoEConfig(use_fp8=fp8, fp8_recipe=recipe)
                    paddle_runs.run_node(problem, config=config)
                    with config.activate():
                        paddle_runs.run_fleet(problem, fp8=fp8)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept, 1)
        log.seek(0)
        found = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught]
        print(json.dumps({"warnings": found, "output": log.read().decode()}))
    """
    found = children.answer(script)
    # Where no C++ compiler is, the choice of a slower implementation is announced, once.
    announced = [line for line in found["warnings"] if "sonicmoe: routing metadata runs as 'naive'" in line]
    assert len(announced) <= 1 and found["warnings"] == announced
    assert found["output"] == ""


def test_torch_is_asked_for_only_under_the_proxy():
    """A finder behind Paddle's sees each ``import torch`` that the proxy did not answer. There is none."""
    script = """
        import importlib.abc, json, sys, traceback
        import paddle

        class Witness(importlib.abc.MetaPathFinder):
            asked = []

            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "torch":
                    self.asked.append([name, [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()]])
                return None

        sys.meta_path.insert(0, Witness())
        import sonicmoe
        before = sorted(name for name in sys.modules if name.partition(".")[0] == "torch")
        import sonicmoe.ernie_compat
        try:
            import torch
            missed = True
        except ImportError:
            missed = not any(name == "torch" for name, _ in Witness.asked)
        ours = [stack for _, stack in Witness.asked if any("/sonicmoe/" in line for line in stack)]
        print(json.dumps({"before": before, "ours": ours, "witness is blind": missed}))
    """
    found = children.answer(script)
    assert found == {"before": [], "ours": [], "witness is blind": False}
