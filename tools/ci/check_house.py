"""The rules of the house that ruff has no words for.

    check_house.py [ROOT]     prints path:line: what is wrong, and exits 1 if anything is

Each rule takes the root of a checkout and returns its findings; RULES at the end names them.
"""

import ast
import os
import re
import sys
from pathlib import Path

PACKAGE = "sonicmoe"
MAX_LINES = 500
SOURCE_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}
# A second version of a thing beside the first: git remembers the old one, the tree holds one.
LEFTOVER_NAME = re.compile(r"_(v\d+|old|new|legacy)$", re.IGNORECASE)

# What may import what: a part sees its own layer and those before it. A part that is not listed is an error, so
# that a newcomer gets its place on purpose.
LAYERS = (
    (
        "enums",
        "checks",
        "config",
        "capabilities",
        "cache_safety",
        "lazy",
        "cuda_driver",
        "plugin_tensor",
        "wgrad_deferral",
        "jit",
        "launch",
        "triton_launch",
    ),
    ("routing", "quant", "activation", "gemm"),
    ("expert_mlp",),
    ("ernie_compat", "functional", "moe", "ep", "fused_moe", "quack_utils", "jit_warmup", "cli"),
    ("__init__",),
)
LAYER_OF = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Never runs under Paddle, and says so there.
TORCH_LAYER = ("functional/", "moe.py", "ep/torch_", "ep/deepep.py")
# Where frameworks are asked for devices and streams.
ASKS_FOR_DEVICES = ("launch.py", "checks.py", "plugin_tensor.py", "cuda_driver.py")
STREAM_HANDLES = {"cuda_stream", "raw_stream", "stream_base"}
# Method -> why it must not be called on a tensor. tests/test_torch_parity.py looks whether it is still so.
TRAPS = {
    "numel": "Paddle gives a tensor, and on a GPU a wait; use math.prod(x.shape)",
    "element_size": "some Paddle gives a tensor; look the size up by dtype",
    "item": "it waits for the device; keep the number on the host, or use int() where a wait is meant",
    "split": "Paddle takes the number of parts, torch their size; slice instead",
    "as_strided": "Paddle counts the offset in bytes, torch in elements; slice instead",
    "nelement": "Paddle lacks it; use math.prod(x.shape)",
    "storage": "Paddle lacks it",
    "untyped_storage": "Paddle lacks it",
}


def sources(root):
    """All source files below root, hidden folders and build outputs aside, in a fixed order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and name not in SKIPPED_FOLDERS and not name.endswith(".egg-info")
        )
        for name in sorted(files):
            if Path(name).suffix in SOURCE_SUFFIXES:
                yield Path(folder, name)


def modules(root, below=""):
    """(path, syntax tree) of each Python file that parses; ruff reports the others."""
    for path in sources(Path(root, below)):
        if path.suffix == ".py":
            try:
                yield path, ast.parse(path.read_text(encoding="utf-8"))
            except SyntaxError:
                continue


def finding(root, path, line, text):
    return f"{path.relative_to(root)}:{line}: {text}"


def file_length(root):
    found = []
    for path in sources(root):
        lines = len(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if lines > MAX_LINES:
            found.append(finding(root, path, lines, f"{lines} lines, more than {MAX_LINES}: split it by what it does"))
    return found


def no_global_statement(root):
    return [
        finding(root, path, node.lineno, f"`global {', '.join(node.names)}`: state belongs to a node or a call")
        for path, tree in modules(root, PACKAGE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]


def defined_names(tree):
    """(line, name) of functions and classes at any depth, and of what modules and classes assign.

    Locals are free: `w_old` and `w_new` are good names inside an update.
    """
    scopes = [tree]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.ClassDef):
            scopes.append(node)
    for scope in scopes:
        for statement in scope.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                            yield name.lineno, name.id


def no_leftover_names(root):
    found = []
    advice = "a successor replaces what it succeeds and takes its name"
    folders = set()
    for path in sources(root):
        if LEFTOVER_NAME.search(path.stem):
            found.append(finding(root, path, 1, f"file name {path.name}: {advice}"))
        for folder in path.relative_to(root).parents:
            if LEFTOVER_NAME.search(folder.name) and folder not in folders:
                folders.add(folder)
                found.append(finding(root, root / folder, 1, f"folder name {folder.name}: {advice}"))
    for path, tree in modules(root):
        for line, name in defined_names(tree):
            if LEFTOVER_NAME.search(name):
                found.append(finding(root, path, line, f"name {name}: {advice}"))
    return found


def called_name(node):
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def no_absolute_self_import(root):
    """The package is also loaded under another parent; its own absolute name would load a second copy there."""
    found = []
    for path, tree in modules(root, PACKAGE):
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
                names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            for name in names:
                if isinstance(name, str) and name.split(".")[0] == PACKAGE:
                    found.append(finding(root, path, node.lineno, f"absolute import of {name}: make it relative"))
    return found


def imported_parts(node, package, parts):
    """The parts of the package that one relative import reaches; `None` stands for outside of it.

    `package` is the path of the importing module's package below sonicmoe, () for its top.
    """
    up = node.level - 1
    if up > len(package):
        return [None]
    target = [*package[: len(package) - up], *(node.module or "").split(".")]
    target = [name for name in target if name]
    if target:
        return target[:1]
    # `from . import name` at the top: a part of that name, or something that __init__.py defines. Its dunders
    # (__version__) are plain constants that exist before any part is loaded.
    names = [alias.name for alias in node.names]
    return [name if name in parts else "__init__" for name in names if not name.startswith("__")]


def one_way_imports(root):
    base = root / PACKAGE
    relative = [path.relative_to(base) for path, _ in modules(root, PACKAGE)]
    parts = {path.parts[0].removesuffix(".py") for path in relative}
    found = []
    edges = {}
    for path in relative:
        own = path.parts[0].removesuffix(".py")
        if own not in LAYER_OF:
            found.append(finding(root, base / path, 1, f"{own} has no layer yet: give it one in {Path(__file__).name}"))
    for path, tree in modules(root, PACKAGE):
        inside = path.relative_to(base)
        own = inside.parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if not (isinstance(node, ast.ImportFrom) and node.level > 0):
                continue
            for part in imported_parts(node, inside.parts[:-1], parts):
                if part is None:
                    found.append(finding(root, path, node.lineno, f"this import leaves {PACKAGE}"))
                elif part == own or own not in LAYER_OF or part not in LAYER_OF:
                    continue
                elif LAYER_OF[part] > LAYER_OF[own]:
                    found.append(finding(root, path, node.lineno, f"upward import: {own} must not know {part}"))
                else:
                    edges.setdefault((own, part), finding(root, path, node.lineno, f"{own} imports {part}"))
    return found + circles(edges)


def circles(edges):
    """Parts of one layer may use each other one way only."""

    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            here = todo.pop()
            fresh = {target for source, target in edges if source == here} - seen
            seen |= fresh
            todo += fresh
        return seen

    return [
        f"{where}, and {target} leads back to {source}"
        for (source, target), where in edges.items()
        if source in reachable(target)
    ]


def aliases(tree, framework):
    """{local name: dotted name} of everything that a module imports of a framework."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == framework:
                    found[alias.asname or framework] = alias.name if alias.asname else framework
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] == framework:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def engine_modules(root):
    """(path below the package, path, tree) of the modules that may meet tensors of either framework."""
    for path, tree in modules(root, PACKAGE):
        inside = path.relative_to(root / PACKAGE).as_posix()
        if not inside.startswith(TORCH_LAYER):
            yield inside, path, tree


def attributes(tree):
    """(node, what stands before the dot if it is a name) of each attribute that is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node, getattr(node.value, "id", None)


def no_trap(root):
    found = []
    for _, path, tree in engine_modules(root):
        triton = aliases(tree, "triton")
        if not (aliases(tree, "torch") or aliases(tree, "paddle")):
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TRAPS):
                continue
            name, first = node.func.attr, node.args[0] if node.args else None
            text = name == "split" and (first is None or isinstance(getattr(first, "value", None), str))
            if not (text or getattr(node.func.value, "id", None) in triton):  # str.split, tl.split
                found.append(finding(root, path, node.lineno, f".{name}(): {TRAPS[name]}"))
    return found


def no_device_of_a_tensor(root):
    advice = "it raises under Paddle where a plugin drives the GPU; use launch.beside or checks.place_name"
    return [
        finding(root, path, node.lineno, f".device: {advice}")
        for inside, path, tree in engine_modules(root)
        if inside not in ASKS_FOR_DEVICES
        for node, owner in attributes(tree)
        if node.attr == "device" and owner not in {"self", "plan", *aliases(tree, "torch"), *aliases(tree, "paddle")}
    ]


def streams_are_asked_for_once(root):
    """Frameworks hand out objects, kernels take addresses; the id of an object has passed for an address before."""
    found = []
    for inside, path, tree in engine_modules(root):
        if inside in ASKS_FOR_DEVICES:
            continue
        of_framework = {*aliases(tree, "torch"), *aliases(tree, "paddle")}
        for node, _ in attributes(tree):
            start = node.value
            while isinstance(start, ast.Attribute):
                start = start.value
            asks = node.attr == "current_stream" and getattr(start, "id", None) in of_framework
            if node.attr in STREAM_HANDLES or asks:
                found.append(finding(root, path, node.lineno, f".{node.attr}: use launch.current_stream or raw_stream"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("id", "int") and node.args:
                if "stream" in (getattr(node.args[0], "id", "") or getattr(node.args[0], "attr", "")):
                    found.append(
                        finding(root, path, node.lineno, f"{node.func.id}() of a stream: use launch.raw_stream")
                    )
    return found


def dtypes_are_equal_not_identical(root):
    """Paddle makes dtype objects anew, and has names that torch's do not equal."""
    found = []
    for _, path, tree in engine_modules(root):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            if not any(isinstance(side, ast.Attribute) and side.attr == "dtype" for side in sides):
                continue
            none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
            text = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in sides)
            identity = any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            if text or (identity and not none):
                how = "with a string" if text else "by identity"
                found.append(finding(root, path, node.lineno, f"a dtype compared {how}: use == or checks.dtype_name"))
    return found


RULES = {
    "file length": file_length,
    "no global statement": no_global_statement,
    "no leftover names": no_leftover_names,
    "relative imports": no_absolute_self_import,
    "one-way imports": one_way_imports,
    "calls that Paddle means otherwise": no_trap,
    "devices of tensors": no_device_of_a_tensor,
    "streams": streams_are_asked_for_once,
    "identity of dtypes": dtypes_are_equal_not_identical,
}


def check(root):
    """{rule: findings} for a checkout."""
    return {name: rule(Path(root)) for name, rule in RULES.items()}


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    findings = [line for lines in check(root).values() for line in lines]
    print("\n".join(findings) if findings else f"house rules: {len(RULES)} kept")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
