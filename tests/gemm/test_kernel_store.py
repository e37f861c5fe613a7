"""Compiled GEMMs in their cache: made once by whoever comes first, whole or not at all, and ours alone.

A stub stands for the generator, so none of it need be installed. Each asking process is a fresh child.
"""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sonicmoe.cache_safety import JitUnavailable
from sonicmoe.gemm import gemm_kernel, kernel_store
from sonicmoe.gemm.gemm_kernel import GemmKernel, Tile
from tests.workers import gemm_store_child, jit_tools
from tests.workers.gemm_store_tools import VERSIONS, Store, write_site

SET = ("up", "up_z", "rows", "down_backward", "wgrad")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache", write_site(tmp_path / "site"), tmp_path / "log")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that holds the set; tests copy it."""
    folder = tmp_path_factory.mktemp("filled")
    store = Store(folder / "cache", write_site(folder / "site"), folder / "log")
    store.loads(*SET)
    return store.cache


def wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# ---- Made once -------------------------------------------------------------------------------------------------------


def test_a_set_is_compiled_in_parallel_and_found_in_the_order_asked(store):
    store.loads(*SET)
    assert store.made() == sorted(SET)
    assert len(store.logged("started")) == min(len(SET), len(os.sched_getaffinity(0)))
    assert len(list(store.folder().iterdir())) == 2 * len(SET)


def test_a_second_process_starts_no_compiler(store):
    store.loads(*SET)
    started = store.logged("started")
    store.loads(*reversed(SET))
    assert store.logged("started") == started


def test_only_what_is_missing_is_compiled(store):
    store.loads("up", "rows")
    store.loads(*SET)
    assert store.made() == sorted(SET)


def test_a_kernel_wanted_twice_is_compiled_once(store):
    assert store.ask("up", "rows", "up") == [{"answer": ["up", "rows", "up"], "present": 3}]
    assert store.made() == ["rows", "up"]


def test_threads_of_one_process_compile_once(store):
    assert store.ask(*SET, threads=6) == [{"answer": list(SET), "present": len(SET)}] * 6
    assert store.made() == sorted(SET)


def test_what_was_begun_ahead_is_waited_for(store):
    assert store.ask(*SET, ahead=SET) == [{"answer": list(SET), "present": len(SET)}]
    assert store.made() == sorted(SET)


def test_what_was_built_ahead_is_found(store):
    store.ask(ahead=["up", "rows"])
    assert store.made() == ["rows", "up"]
    store.loads("up", "rows")
    assert store.made() == ["rows", "up"]


def test_six_processes_on_an_empty_cache_compile_once(store, tmp_path):
    found = store.at_once([SET] * 6, tmp_path / "start", does={"seconds": 0.1})
    assert found == [[{"answer": list(SET), "present": len(SET)}]] * 6
    assert store.made() == sorted(SET)
    store.folder()


def test_processes_that_want_different_kernels_compile_each_once(store, tmp_path):
    requests = [("up", "rows"), ("rows", "wgrad"), ("wgrad", "up"), ("down_backward",)]
    found = store.at_once(requests, tmp_path / "start", does={"seconds": 0.1})
    assert [one["answer"] for (one,) in found] == [list(ops) for ops in requests]
    assert store.made() == sorted({op for ops in requests for op in ops})


# ---- An object that is not what was compiled -------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (".so", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "empty": (".so", lambda path: path.write_bytes(b"")),
    "one bit flipped": (".so", flip),
    "no object": (".so", lambda path: path.unlink()),
    "no record": (".json", lambda path: path.unlink()),
    "empty record": (".json", lambda path: path.write_text("")),
    "half a record": (".json", lambda path: path.write_text('{"sha256": "12')),
    "record of bytes": (".json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "record without hash": (".json", lambda path: path.write_text("{}")),
    "record is a list": (".json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize(("suffix", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_made_anew(store, filled, suffix, damage):
    shutil.copytree(filled, store.cache)
    damage(store.file("rows", suffix))
    for _ in range(2):
        store.loads(*SET)
    assert store.made() == ["rows"]
    assert len(list(store.folder().iterdir())) == 2 * len(SET)


# ---- A compiler that fails or dies -----------------------------------------------------------------------------------


def test_failure_names_the_kernel_and_the_compilers_last_words(store):
    message = store.refuses(*SET, does={"fail_at": "down_backward"})
    kernel = "down_backward 128x192 (swiglu, bfloat16, sm_90a)"
    assert message == f"compiling GEMM kernels failed at {kernel}: ValueError: no such tile"
    assert "down_backward" not in store.made()
    before = store.made()
    store.loads(*SET)  # what the other compilers made is kept
    assert sorted(store.made()) == sorted(SET) and set(before) < set(SET)


def test_killed_compiler_is_said_and_the_next_attempt_finds_a_clean_place(store):
    message = store.refuses(*SET, does={"kill_at": "wgrad"})
    assert message.endswith("its compiler was ended by SIGKILL") and "at wgrad 128x192" in message
    store.folder()
    store.loads(*SET)
    assert store.made() == sorted(SET)


def test_compiler_that_ends_well_without_an_object_is_said(store):
    assert "at rows 128x192" in store.refuses("rows", does={"skip": "rows"})


@pytest.mark.parametrize("alone", [False, True], ids=["with its compilers", "alone"])
def test_killed_builder_blocks_and_poisons_nothing(store, alone):
    """Alone, as the kernel does when memory runs out: its compilers then go on in a folder that is no longer there."""
    child = store.start(*SET, does={"seconds": 1.0})
    wait_for(lambda: store.logged("began"))
    (os.kill if alone else os.killpg)(child.pid, signal.SIGKILL)
    child.wait()
    assert list((store.cache / "gemm").glob("*/.scratch-*/*.half"))
    store.loads(*SET)
    time.sleep(1.2 if alone else 0)  # the orphans come to the end of what they were at
    before = {path: path.stat().st_mtime_ns for path in store.folder().iterdir()}
    store.loads(*SET)
    assert {path: path.stat().st_mtime_ns for path in store.folder().iterdir()} == before
    assert len(before) == 2 * len(SET)


def test_who_waits_for_a_builder_that_dies_takes_over(store):
    child = store.start(*SET, does={"seconds": 30})
    wait_for(lambda: store.logged("began"))
    waiting = store.start(*SET)
    time.sleep(0.3)
    assert waiting.poll() is None and not store.made()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    said, _ = waiting.communicate(timeout=60)
    assert json.loads(said.splitlines()[-1])[0]["answer"] == list(SET)
    assert store.made() == sorted(SET)


# ---- What the key is made of -----------------------------------------------------------------------------------------

BASE = GemmKernel("up", Tile(128, 192), activation="swiglu")
OTHER = {
    "op": "rows", "tile": Tile(64, 96), "storage": "float16", "activation": "geglu", "clamp": 7.0, "transposed": True,
    "out": "float32", "accumulate": True, "arch": "sm_100a",
}  # fmt: skip
OTHER_TILE = {"m": 256, "n": 128, "cluster_m": 1, "cluster_n": 2, "pingpong": True, "k": 128}


def test_each_fact_about_a_kernel_is_in_its_key():
    """A fact that is added to the class needs another value here; a size of the tokens would be a fact too many."""
    assert set(OTHER) == {field.name for field in fields(GemmKernel)}
    assert set(OTHER_TILE) == {field.name for field in fields(Tile)}
    kernels = [BASE, *(replace(BASE, **{name: value}) for name, value in OTHER.items())]
    kernels += [replace(BASE, tile=replace(BASE.tile, **{name: value})) for name, value in OTHER_TILE.items()]
    kernels += [replace(BASE, clamp=0.5), replace(BASE, clamp=0.25)]
    assert len({kernel.key() for kernel in kernels}) == len(kernels)
    assert replace(BASE).key() == BASE.key()


@pytest.mark.parametrize("tool", [*VERSIONS, "nvidia-cutlass-dsl-libs-cu13"])
def test_another_version_of_a_tool_is_another_folder(store, tmp_path, tool):
    store.loads("up")
    newer = write_site(tmp_path / "newer", VERSIONS | {tool: "99.0"})
    Store(store.cache, newer, store.log).loads("up")
    assert store.made() == ["up", "up"] and len(list((store.cache / "gemm").iterdir())) == 2
    store.loads("up")
    assert store.made() == ["up", "up"]


@pytest.fixture
def where(monkeypatch, tmp_path):
    """() -> the folder for objects, found anew."""
    monkeypatch.setattr(kernel_store, "_tool_versions", lambda: ("1", "2", "3"))
    monkeypatch.setattr(kernel_store, "_tool_key", kernel_store._tools_as_they_are)
    return lambda: kernel_store._folder(tmp_path)


def test_another_cpu_is_another_folder(where, monkeypatch):
    """The generator compiles the code around a kernel for the very CPU that it runs on."""
    assert "avx" in kernel_store._host() or "asimd" in kernel_store._host()
    first = where()
    monkeypatch.setattr(kernel_store, "_host", lambda: "x86_64 sse2")
    assert where() != first


def test_another_compiling_program_is_another_folder(where, monkeypatch, tmp_path):
    first = where()
    other = tmp_path / "quack_compile.py"
    other.write_bytes(kernel_store._CHILD.read_bytes() + b"\n")
    monkeypatch.setattr(kernel_store, "_CHILD", other)
    assert where() != first


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """This process's own store with the stub for a generator: (the stub, a cache)."""
    child = tmp_path / "compile.py"
    child.write_bytes(gemm_store_child.STUB.read_bytes())
    monkeypatch.setattr(kernel_store, "_CHILD", child)
    monkeypatch.setattr(kernel_store, "_tool_versions", lambda: ("1", "2", "3"))
    monkeypatch.setattr(kernel_store, "_tool_key", functools.cache(kernel_store._tools_as_they_are))
    monkeypatch.setenv("STUB_GEMM_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("STUB_GEMM_DOES", "{}")
    return child, tmp_path / "cache"


def test_tools_replaced_under_a_process_leave_nothing(stubbed):
    """An upgrade, or another branch: what a child makes from then on is not what this process would keep it as."""
    child, cache = stubbed
    kernel_store.build_ahead([BASE], cache)
    child.write_bytes(child.read_bytes() + b"\n")
    with pytest.raises(JitUnavailable, match="was replaced while this process ran; start again$"):
        kernel_store.build_ahead([BASE, replace(BASE, op="rows")], cache)
    (folder,) = (cache / "gemm").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"{BASE.key()}.json", f"{BASE.key()}.so"]


def test_disk_that_is_full_at_the_end_gets_its_room_back(stubbed, monkeypatch):
    """What was compiled is the most that a build writes, and nobody could use it."""

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as without_room:
        without_room.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            kernel_store.build_ahead([BASE], stubbed[1])
    (folder,) = (stubbed[1] / "gemm").iterdir()
    assert list(folder.iterdir()) == []


def test_tiles_that_cannot_be_made_are_told_apart():
    """One case for each rule of the generator."""
    impossible = [
        ("rows", Tile(128, 128, cluster_m=4), "1 or 2"),
        ("up", Tile(128, 128, 1, 2), "shared across a cluster"),
        ("up_z", Tile(128, 208, pingpong=True), "208 columns"),
        ("up", Tile(128, 144), "groups of 32"),
        ("wgrad", Tile(192, 160), "come in 64 columns"),
        ("rows", Tile(128, 256, pingpong=True), "at most 208"),
        ("rows", Tile(160, 128), "64, 128, 192 or 256"),
        ("rows", Tile(256, 256), "at most 208"),
    ]
    for op, tile, words in impossible:
        assert words in (gemm_kernel.unsupported(op, tile) or ""), (op, tile)
    for op in gemm_kernel.OPS:
        assert gemm_kernel.unsupported(op, Tile(128, 128)) is None


# ---- Tools that are not there ----------------------------------------------------------------------------------------


def test_missing_generator_is_said(store, tmp_path):
    bare = write_site(tmp_path / "bare", {"nvidia-cutlass-dsl": "4.8.1"})
    message = Store(store.cache, bare, store.log).refuses("up")
    assert message == "quack-kernels is not installed; pip install 'sonicmoe[gpu]'"


def test_missing_loader_is_said(store):
    (store.site / "tvm_ffi.py").unlink()
    assert "pip install 'sonicmoe[gpu]'" in store.refuses("up")


@pytest.mark.parametrize(
    "why, remedy",
    [
        ("GLIBC_9.9 not found", "remove {}"),
        ("failed to map segment", "set SONIC_MOE_CACHE_DIR to a folder that is not"),
    ],
)
def test_library_that_does_not_load_is_said(store, why, remedy):
    (store.site / "tvm_ffi.py").write_text(f"def load_module(path): raise RuntimeError('Check failed:\\n{why}')")
    message = store.refuses("up")
    path = store.file("up", ".so")
    assert message.startswith(f"{path} does not load: Check failed: {why}; {remedy.format(path)}")


def test_runtime_that_does_not_load_is_said(store):
    (runtime,) = store.site.rglob("cu12/lib/libcute_dsl_runtime.so")
    runtime.write_bytes(b"of another machine")
    message = store.refuses("up")
    assert message.startswith(f"{runtime} does not load: ") and message.endswith("pip install 'sonicmoe[gpu]' anew")


def test_missing_runtime_is_said(store):
    (record,) = store.site.glob("nvidia_cutlass_dsl_libs_cu12-*/RECORD")
    record.write_text(record.read_text().splitlines()[0] + "\n")  # the stub for another machine is left
    message = store.refuses("up")
    assert message.startswith("libcute_dsl_runtime.so is in neither") and message.endswith("'sonicmoe[gpu]'")


# ---- A cache that is not ours alone, or cannot be written ------------------------------------------------------------


@pytest.mark.parametrize("what", ["cache", "folder of the tools", "object", "record"])
def test_what_others_may_write_is_refused(store, filled, what):
    shutil.copytree(filled, store.cache)
    places = {
        "cache": store.cache,
        "folder of the tools": store.folder(),
        "object": store.file("rows", ".so"),
        "record": store.file("rows", ".json"),
    }
    place = places[what]
    place.chmod(place.stat().st_mode | 0o022)
    message = store.refuses(*SET, kind="UnsafeCache")
    assert f"{place} can be written by others" in message and f"chmod go-w {place}" in message
    assert not store.made()


def test_nothing_is_compiled_into_a_cache_that_others_may_write(store):
    store.cache.mkdir()
    store.cache.chmod(0o777)
    store.refuses("up", kind="UnsafeCache")
    assert not store.logged("started") and not (store.cache / "gemm").exists()


def test_our_own_objects_are_safe_whatever_the_umask(store):
    for _ in range(2):
        store.loads(*SET, umask="000")
    assert store.made() == sorted(SET)


@pytest.fixture
def someone(filled):
    """A store whose cache belongs to a user whom modes bind: root becomes somebody else for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        store = Store(folder / "cache", write_site(folder / "site"), folder / "log")
        shutil.copytree(filled, store.cache)
        if jit_tools.is_root():
            jit_tools.seen_by_nobody(folder)
            store.more["user"] = jit_tools.NOBODY
            for place in (store.cache, *store.cache.rglob("*")):
                os.chown(place, jit_tools.NOBODY, jit_tools.NOBODY)
        yield store
        for place in (store.cache, *store.cache.rglob("*")):
            place.chmod(0o700)  # or the folder cannot be removed


def close(cache: Path) -> None:
    """No writing, everywhere below."""
    for place in (cache, *cache.rglob("*")):
        place.chmod(place.stat().st_mode & ~0o222)


def test_read_only_cache_serves_what_it_holds(someone):
    close(someone.cache)
    someone.loads(*SET)


def test_read_only_cache_that_lacks_a_kernel_is_said(someone):
    someone.file("rows", ".so").unlink()
    close(someone.cache)
    assert someone.refuses(*SET) == (
        f"cannot keep GEMM kernels in {someone.cache}: Permission denied; set SONIC_MOE_CACHE_DIR to a folder with "
        "room that can be written"
    )
    assert not someone.logged("started")


@pytest.mark.skipif(not jit_tools.is_root(), reason="needs a second user, whom only root can become")
def test_cache_that_another_user_has_filled(someone):
    message = someone.refuses(*SET, kind="UnsafeCache", user=0)
    assert f"belongs to user {jit_tools.NOBODY}" in message


@pytest.mark.skipif(not jit_tools.is_root(), reason="only root can mount")
def test_read_only_mount(store, filled):
    """A real read-only file system, whose error is another one than that of a missing permission."""
    shutil.copytree(filled, store.cache)
    store.file("rows", ".so").unlink()
    if subprocess.run(["mount", "--bind", store.cache, store.cache], capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", store.cache], check=True)
        store.loads("up", "wgrad")
        assert "Read-only file system; set SONIC_MOE_CACHE_DIR" in store.refuses(*SET)
    finally:
        subprocess.run(["umount", store.cache], check=True)


@pytest.mark.parametrize("function", ["os.mkdir", "io.open"])
def test_full_disk_is_said(store, filled, function):
    shutil.copytree(filled, store.cache)
    store.file("rows", ".so").unlink()
    message = store.refuses(*SET, fail=[function, "ENOSPC"])
    assert f"cannot keep GEMM kernels in {store.cache}: No space left on device; set SONIC_MOE_CACHE_DIR" in message
    store.loads(*SET)  # once there is room
    assert store.made() == ["rows"]
