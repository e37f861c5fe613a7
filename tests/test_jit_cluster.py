"""Many processes and one cache: they compile once, survive each other's deaths, and say why where they cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sonicmoe import jit
from tests.support import children
from tests.workers import jit_tools as tools

STORM = children.WORKERS / "jit_storm.py"
ROUTED = [[1, 3], [1, 0, 0, 1, 2, 0]]
ANSWERS = {"one": 1, "two": 2, "routing": ROUTED}


@pytest.fixture
def csrc(tmp_path):
    for name in ("one", "two"):
        tools.write_tiny(tmp_path / "csrc", name, ANSWERS[name])
    return tmp_path / "csrc"


@pytest.fixture
def compiler(tmp_path):
    return tools.counting(tmp_path / "bin")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def at_once(cache, requests, path, start: Path, **more) -> list[list[dict]]:
    """One child for each request, all let go at the same moment."""
    commands = [tools.command(cache, *names, start=str(start), **more) for names in requests]
    env = tools.environment(path)
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    time.sleep(0.2)  # most of them wait by now; those that do not come late, which is as good a case
    start.touch()
    try:
        return [json.loads(child.communicate(timeout=150)[0].splitlines()[-1]) for child in running]
    finally:
        for child in running:
            child.kill()
            child.wait()


def test_eight_processes_compile_once(csrc, cache, compiler, tmp_path):
    found = at_once(cache, [("one",)] * 8, compiler.path, tmp_path / "start", csrc=csrc)
    assert [tools.answers(one) for one in found] == [[1]] * 8
    assert compiler.compilations() == 1
    tools.built(cache, "one")


def test_eight_processes_compile_two_extensions_once_each(csrc, cache, compiler, tmp_path):
    requests = [("one", "two"), ("two", "one")] * 4
    found = at_once(cache, requests, compiler.path, tmp_path / "start", csrc=csrc)
    assert [tools.answers(one) for one in found] == [[ANSWERS[name] for name in names] for names in requests]
    assert compiler.compilations() == 2
    tools.built(cache, "one")
    tools.built(cache, "two")


@pytest.mark.slow
def test_eight_processes_compile_the_real_extension_once(cache, compiler, tmp_path):
    found = at_once(cache, [("routing",)] * 8, compiler.path, tmp_path / "start")
    assert [tools.answers(one) for one in found] == [[ROUTED]] * 8
    assert compiler.compilations() == 1


def test_eight_processes_rebuild_a_damaged_artifact_once(csrc, cache, compiler, tmp_path):
    tools.answers(tools.ask(cache, "one", csrc=csrc, path=compiler.path))
    artifact = tools.built(cache, "one") / "one_host.so"
    artifact.write_bytes(artifact.read_bytes()[:5000])
    found = at_once(cache, [("one",)] * 8, compiler.path, tmp_path / "start", csrc=csrc)
    assert [tools.answers(one) for one in found] == [[1]] * 8
    assert compiler.compilations() == 2
    tools.built(cache, "one")


@pytest.fixture
def slow(csrc, cache, compiler, tmp_path):
    """A compiler that takes its time and leaves half an artifact meanwhile: a copy of what the real one made."""

    def make(seconds):
        tools.answers(tools.ask(tmp_path / "made", "one", csrc=csrc, path=compiler.path))
        artifact = tools.built(tmp_path / "made", "one") / "one_host.so"
        return tools.slow_copy(tmp_path / "slow", artifact, seconds)

    return make


def test_eight_processes_of_which_one_is_killed(csrc, slow, tmp_path):
    """Fifty times over. The compiler is the copying one: with a real one this would take the better part of an hour."""
    rounds, processes, seconds = 50, 8, 0.2
    compiler = slow(seconds)
    command = [STORM, tmp_path, csrc, rounds, processes, 20240711, seconds]
    done = children.check(children.run([sys.executable, *command], env=tools.environment(compiler.path), timeout=170))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rounds
    for number, outcome in enumerate(found):
        assert outcome["answers"] == ["1"] * (processes - outcome["killed"]), outcome
        assert outcome["next"] == "1", outcome
        tools.built(tmp_path / f"cache{number}", "one")  # one valid artifact, and no dead builder's folder
    # Kills of every kind did happen, and some of them in the middle of a build.
    met = [outcome for outcome in found if outcome["killed"]]
    assert {(outcome["aimed"], outcome["group"]) for outcome in met} >= {(True, True), (True, False)}
    assert rounds + 10 <= compiler.compilations() <= 2 * rounds


def test_dead_builders_leavings_go(csrc, cache, compiler, slow):
    """Killed with half an artifact in its folder; the next builder finds both that and the lock file."""
    waiting = slow(60)
    child = subprocess.Popen(
        tools.command(cache, "one", csrc=csrc), env=tools.environment(waiting.path), start_new_session=True
    )
    wait_for(lambda: list(cache.glob("ext/.one_host-*")) and waiting.compilations())
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (left,) = cache.glob("ext/.one_host-*")
    # The next builder is another compiler elsewhere on the cluster first, whose build is none of this one's business.
    assert tools.answers(tools.ask(cache, "one", csrc=csrc, path=compiler.path)) == [1]
    assert left.exists()
    quick = slow(0)
    assert tools.answers(tools.ask(cache, "one", csrc=csrc, path=quick.path)) == [1]
    assert not left.exists()


def wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_lock_time_out_names_the_holder(csrc, cache, slow):
    waiting = slow(60)
    child = subprocess.Popen(
        tools.command(cache, "one", csrc=csrc), env=tools.environment(waiting.path), start_new_session=True
    )
    try:
        wait_for(waiting.compilations)
        (found,) = tools.ask(cache, "one", csrc=csrc, path=waiting.path, timeout=0.5)
        message = tools.failure([found], "JitUnavailable")
        (lock,) = cache.glob("locks/one_host-*.lock")
        waited = f"waited 0.5 s for {lock}, held by process {child.pid} on host {socket.gethostname()}"
        assert message.startswith(waited)
        assert "jit_child.py" in message and message.endswith("end it if it hangs")
        assert 0.4 < found["seconds"] < 5
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_no_name_of_a_script_stops_a_build(tmp_path):
    """Bytes that are no UTF-8, as names from an older system are, and a line break."""
    script = """
        import os, sys
        from pathlib import Path
        from sonicmoe import jit

        lock = Path(sys.argv[1])
        sys.argv = [os.fsdecode(b"/home/\\xd3\\xc3/train.py"), "two\\nlines"]
        with jit.build_lock(lock, 1):
            try:
                with jit.build_lock(lock.with_name("other.lock"), 1):
                    pass
                with jit.build_lock(lock, 0.1):
                    pass
            except jit.JitUnavailable as reason:
                print(reason)
    """
    done = children.python(script, tmp_path / "one.lock")
    assert done.stdout.count("\n") == 1 and "\\udcd3\\udcc3/train.py two lines); end it if it hangs" in done.stdout


@pytest.mark.parametrize("left", ["process 7 (/home/用户/train.py)".encode("gbk"), b""], ids=["other bytes", "nothing"])
def test_holder_that_cannot_be_read_is_no_other_error(tmp_path, left):
    import filelock

    (tmp_path / "one.holder").write_bytes(left)
    with filelock.FileLock(tmp_path / "one.lock", thread_local=False), ThreadPoolExecutor(1) as pool:
        with pytest.raises(jit.JitUnavailable, match="waited 0.1 s for .* end it if it hangs"):
            pool.submit(jit.build_lock(tmp_path / "one.lock", 0.1).__enter__).result()


def test_waiting_for_one_extension_does_not_stop_another(csrc, cache, compiler, slow):
    """Locks are per artifact."""
    waiting = slow(60)
    child = subprocess.Popen(
        tools.command(cache, "one", csrc=csrc), env=tools.environment(waiting.path), start_new_session=True
    )
    try:
        wait_for(waiting.compilations)
        assert tools.answers(tools.ask(cache, "two", csrc=csrc, path=compiler.path, timeout=0.5)) == [2]
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


# ---- A cache that cannot be written ----------------------------------------------------------------------------------
# Root is not bound by modes, so as root these children become somebody else. That user can read the test's folder, but
# perhaps nothing of Python's, its headers for one; so a copying compiler stands in for the real one.


@pytest.fixture
def someone():
    """(folder with a folder ``own`` of a user's in it, what every child is asked with)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "own").mkdir(mode=0o700)
        for extension in ("one", "two"):
            tools.write_tiny(folder / "csrc", extension, ANSWERS[extension])
        tools.answers(tools.ask(folder / "made", "one", csrc=folder / "csrc"))
        artifact = folder / "one.so"
        artifact.write_bytes((tools.built(folder / "made", "one") / "one_host.so").read_bytes())
        more = {"csrc": folder / "csrc", "path": tools.slow_copy(folder / "bin", artifact, 0).path}
        (folder / "bin" / "log").touch()
        if tools.is_root():
            tools.seen_by_nobody(folder)
            for place in (folder / "own", folder / "bin" / "log"):
                os.chown(place, tools.NOBODY, tools.NOBODY)
            more["user"] = tools.NOBODY
        yield folder, more
        for place in (folder / "own", *(folder / "own").rglob("*")):
            place.chmod(0o700)  # or the folder cannot be removed


def close(cache: Path) -> None:
    """No writing, everywhere below."""
    for place in (cache, *cache.rglob("*")):
        place.chmod(place.stat().st_mode & ~0o222)


def test_cache_that_turns_read_only(someone):
    folder, who = someone
    cache = folder / "own" / "cache"
    assert tools.answers(tools.ask(cache, "one", **who)) == [1]
    close(cache)
    assert tools.answers(tools.ask(cache, "one", **who)) == [1]
    message = tools.failure(tools.ask(cache, "two", **who), "JitUnavailable")
    assert message == (
        f"cannot build two_host in {cache}: Permission denied; set SONIC_MOE_CACHE_DIR to a folder with room that can "
        "be written"
    )
    assert tools.answers(tools.ask(cache, "one", **who)) == [1]


def test_cache_that_cannot_even_be_made(someone):
    folder, who = someone
    close(folder / "own")
    message = tools.failure(tools.ask(folder / "own" / "cache", "one", **who), "JitUnavailable")
    assert "Permission denied; set SONIC_MOE_CACHE_DIR" in message


def test_damaged_artifact_in_a_read_only_cache(someone):
    folder, who = someone
    cache = folder / "own" / "cache"
    tools.answers(tools.ask(cache, "one", **who))
    (tools.built(cache, "one") / "one_host.so").write_bytes(b"")
    close(cache)
    message = tools.failure(tools.ask(cache, "one", **who), "JitUnavailable")
    assert "Permission denied; set SONIC_MOE_CACHE_DIR" in message


@pytest.mark.skipif(not tools.is_root(), reason="needs a second user, whom only root can become")
def test_cache_that_root_has_filled(someone):
    """An image is built by root and run by a user: root's artifacts are trusted, once others may read them."""
    folder, who = someone
    cache, root = folder / "cache", {**who, "user": 0}
    tools.answers(tools.ask(cache, "one", **root))
    assert "Permission denied" in tools.failure(tools.ask(cache, "one", **who), "JitUnavailable")
    subprocess.run(["chmod", "-R", "go+rX", cache], check=True)
    assert tools.answers(tools.ask(cache, "one", **who)) == [1]
    assert "Permission denied" in tools.failure(tools.ask(cache, "two", **who), "JitUnavailable")


@pytest.mark.skipif(not tools.is_root(), reason="needs a second user, whom only root can become")
def test_cache_that_another_user_has_filled(someone):
    folder, who = someone
    cache = folder / "own" / "cache"
    tools.answers(tools.ask(cache, "one", **who))
    message = tools.failure(tools.ask(cache, "one", **{**who, "user": 0}), "UnsafeCache")
    assert f"belongs to user {tools.NOBODY}" in message


@pytest.mark.skipif(not tools.is_root(), reason="only root can mount")
def test_read_only_mount(csrc, cache, compiler):
    """A real read-only file system, whose error is another one than that of a missing permission."""
    tools.answers(tools.ask(cache, "one", csrc=csrc, path=compiler.path))
    if subprocess.run(["mount", "--bind", cache, cache], capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
        assert tools.answers(tools.ask(cache, "one", csrc=csrc, path=compiler.path)) == [1]
        message = tools.failure(tools.ask(cache, "two", csrc=csrc, path=compiler.path), "JitUnavailable")
        assert "Read-only file system; set SONIC_MOE_CACHE_DIR" in message
    finally:
        subprocess.run(["umount", cache], check=True)


def test_our_own_artifacts_are_safe_whatever_the_umask(csrc, tmp_path, compiler):
    """Under umask 002, common where each user has a group, everything made plainly may be written by the group."""
    for umask in ("002", "000"):
        cache = tmp_path / umask / "new" / "folders" / "too"
        for _ in range(2):
            found = tools.ask(cache, "one", csrc=csrc, path=compiler.path, umask=umask)
            assert tools.answers(found) == [1]
    assert compiler.compilations() == 2
