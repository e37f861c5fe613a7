"""Who could have written what lies in the cache: every way in is refused, with the path and what to do about it."""

import os
import re
import shutil
from pathlib import Path

import pytest

from sonicmoe import cache_safety, jit
from sonicmoe.cache_safety import JitUnavailable, UnsafeCache, make_private, require_private
from tests.workers import jit_tools as tools

STRANGER = tools.NOBODY


@pytest.fixture
def home(tmp_path):
    """A folder that is ours alone, whatever the umask is and wherever the test's own folder lies."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    try:
        require_private(folder)
    except UnsafeCache as reason:
        pytest.skip(f"temporary folders are not private here: {reason}")
    return folder


def folder(path: Path, mode: int = 0o700) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


def give_away(monkeypatch, *places: Path) -> None:
    """To another user; only root can, and for others we become the stranger to our own files."""
    if tools.is_root():
        for place in places:
            os.chown(place, STRANGER, STRANGER, follow_symlinks=False)
        return
    real, given = os.lstat, {os.fspath(place) for place in places}

    def lstat(path, *args, **kwargs):
        found = list(real(path, *args, **kwargs))
        if os.fspath(path) in given:
            found[4] = STRANGER
        return os.stat_result(found)

    monkeypatch.setattr(cache_safety.os, "lstat", lstat)


def refusal(path, place, problem, remedy) -> None:
    with pytest.raises(UnsafeCache) as error:
        require_private(path)
    message = str(error.value)
    assert message.startswith(f"SONIC_MOE_CACHE_DIR: {place} {problem}"), message
    assert f"compiled code in {path} would be run" in message and remedy in message
    assert message.endswith("or set the flag to another folder") and "\n" not in message


def test_private_folder_and_file_pass(home):
    cache = folder(home / "cache")
    file = cache / "x.so"
    file.touch()
    for mode in (0o600, 0o644, 0o755):
        file.chmod(mode)
        require_private(file)
    for mode in (0o700, 0o750, 0o755):
        cache.chmod(mode)
        require_private(file)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o775, 0o777, 0o770])
def test_folder_that_others_may_write_is_refused(home, mode):
    cache = folder(home / "cache", mode)
    refusal(cache, cache, f"can be written by others (mode {mode:o})", f"chmod go-w {cache}")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o775])
def test_file_that_others_may_write_is_refused(home, mode):
    file = folder(home / "cache") / "x.so"
    file.touch()
    file.chmod(mode)
    refusal(file, file, f"can be written by others (mode {mode:o})", f"chmod go-w {file}")


def test_ancestor_that_others_may_write_is_refused(home):
    """Whoever may write a folder may put another in the place of the one below."""
    above = folder(home / "above", 0o770)
    cache = folder(folder(above / "middle") / "cache")
    refusal(cache, above, "can be written by others (mode 770)", f"chmod go-w {above}")


def test_sticky_ancestor_passes_but_is_no_cache(home):
    """As /tmp: others may add names there, and replace their own only. A cache's names must be ours."""
    shared = folder(home / "shared", 0o1777)
    require_private(folder(shared / "cache"))
    refusal(shared, shared, "can be written by others (mode 1777)", f"chmod go-w {shared}")


def test_sticky_file_is_no_sticky_folder(home):
    file = home / "x.so"
    file.touch()
    file.chmod(0o1666)
    refusal(file, file, "can be written by others (mode 1666)", f"chmod go-w {file}")


@pytest.mark.parametrize("which", ["cache", "above"])
def test_folder_of_another_user_is_refused(home, monkeypatch, which):
    above = folder(home / "above", 0o755)
    cache = folder(above / "cache", 0o755)
    place = {"cache": cache, "above": above}[which]
    give_away(monkeypatch, place)
    refusal(cache, place, f"belongs to user {STRANGER}", "use a folder of your own")


def test_file_of_another_user_is_refused(home, monkeypatch):
    file = home / "x.so"
    file.touch()
    give_away(monkeypatch, file)
    refusal(file, file, f"belongs to user {STRANGER}", "use a folder of your own")


def test_only_root_and_we_are_trusted(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [user for user in (0, 1, 999, 1000, 1001, 65534) if cache_safety._trusted(user)] == [0, 1000]


# ---- Symbolic links --------------------------------------------------------------------------------------------------


def link(path: Path, target) -> Path:
    path.symlink_to(target)
    return path


def test_link_to_a_private_folder_passes(home):
    cache = folder(home / "cache")
    require_private(link(home / "link", cache))
    require_private(link(home / "relative", "cache"))
    require_private(link(home / "chain", link(home / "between", "../home/cache")))
    folder(cache / "ext")
    require_private(home / "chain" / "ext")


def test_link_does_not_hide_its_target(home):
    unsafe = folder(home / "unsafe", 0o777)
    above = link(home / "link", unsafe)
    refusal(above, unsafe, "can be written by others (mode 777)", f"chmod go-w {unsafe}")
    inside = folder(unsafe / "cache")
    refusal(above / "cache", unsafe, "can be written by others (mode 777)", f"chmod go-w {unsafe}")
    refusal(link(home / "direct", inside), unsafe, "can be written by others (mode 777)", f"chmod go-w {unsafe}")


def test_link_to_a_sticky_folder_is_no_cache(home):
    shared = folder(home / "shared", 0o1777)
    refusal(link(home / "link", shared), shared, "can be written by others (mode 1777)", f"chmod go-w {shared}")


def test_link_that_others_may_replace_is_refused(home):
    """Its target is ours alone, but whoever may write the link's folder decides where it leads tomorrow."""
    cache, open_to_all = folder(home / "cache"), folder(home / "open", 0o777)
    refusal(link(open_to_all / "link", cache), open_to_all, "can be written by others", f"chmod go-w {open_to_all}")


def test_link_of_another_user_is_refused(home, monkeypatch):
    """In /tmp, say, where everybody may make one."""
    cache, shared = folder(home / "cache"), folder(home / "shared", 0o1777)
    theirs = link(shared / "link", cache)
    require_private(theirs)
    give_away(monkeypatch, theirs)
    refusal(theirs, theirs, f"belongs to user {STRANGER}", "use a folder of your own")
    refusal(link(home / "ours", theirs), theirs, f"belongs to user {STRANGER}", "use a folder of your own")


def test_links_in_a_circle_end(home):
    link(home / "a", "b")
    with pytest.raises(OSError):
        require_private(link(home / "b", "a") / "cache")


# ---- Making one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_new_folders_are_ours_alone(home, umask):
    """Those on the way as well, which mkdir would make with the umask's mode."""
    before = os.umask(umask)
    try:
        make_private(home / "some" / "new" / "cache", "ext", "locks")
    finally:
        os.umask(before)
    for name in ("some", "some/new", "some/new/cache", "some/new/cache/ext", "some/new/cache/locks"):
        assert (home / name).stat().st_mode & 0o777 == 0o700, name


def test_what_is_there_is_refused_and_not_repaired(home):
    cache = folder(home / "cache", 0o777)
    with pytest.raises(UnsafeCache, match=re.escape(f"chmod go-w {cache}")):
        make_private(cache, "ext")
    assert cache.stat().st_mode & 0o777 == 0o777 and list(cache.iterdir()) == []
    cache.chmod(0o700)
    folder(cache / "ext", 0o770)
    with pytest.raises(UnsafeCache, match=re.escape(f"chmod go-w {cache / 'ext'}")):
        make_private(cache, "ext")


# ---- The JIT asks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory):
    base = tmp_path_factory.mktemp("prebuilt")
    tools.write_tiny(base / "csrc")
    tools.real_compiler()
    tools.answers(tools.ask(base / "cache", "one", csrc=base / "csrc"))
    return base


@pytest.fixture
def load(prebuilt, home, monkeypatch):
    """(cache, load): a copy of a cache that holds an artifact, and a fresh look at it."""
    monkeypatch.setattr(jit, "source_folder", lambda: prebuilt / "csrc")
    monkeypatch.setattr(jit, "_loaded", {})
    shutil.copytree(prebuilt / "cache", home / "cache")

    def load(cache=home / "cache"):
        return jit.load(jit.Extension("one", ("one.cpp",)), cache).answer()

    return home / "cache", load


PLACES = {
    "cache": lambda cache: cache,
    "ext": lambda cache: cache / "ext",
    "folder": lambda cache: tools.built(cache, "one"),
    "artifact": lambda cache: tools.built(cache, "one") / "one_host.so",
    "manifest": lambda cache: tools.built(cache, "one") / "manifest.json",
    "above": lambda cache: cache.parent,
}


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("which", PLACES)
def test_nothing_that_others_may_write_is_loaded(load, which, mode):
    cache, load = load
    place = PLACES[which](cache)
    before = place.stat().st_mode & 0o7777
    place.chmod(before | mode)
    # Each time: this is no failure to remember, and the user may have repaired it meanwhile.
    for _ in range(2):
        with pytest.raises(UnsafeCache, match=re.escape(f"{place} can be written by others")):
            load()
    place.chmod(before)
    assert load() == 1


@pytest.mark.parametrize("which", PLACES)
def test_nothing_of_another_user_is_loaded(load, monkeypatch, which):
    cache, load = load
    place = PLACES[which](cache)
    give_away(monkeypatch, place)
    with pytest.raises(UnsafeCache, match=re.escape(f"{place} belongs to user {STRANGER}")):
        load()


def test_artifact_behind_a_link_is_judged_where_it_lies(load, home):
    cache, load = load
    artifact = PLACES["artifact"](cache)
    open_to_all = folder(home / "open", 0o777)
    artifact.rename(open_to_all / "x.so")
    artifact.symlink_to(open_to_all / "x.so")
    with pytest.raises(UnsafeCache, match=re.escape(f"{open_to_all} can be written by others")):
        load()


def test_nothing_is_built_where_others_may_write(load, home, monkeypatch):
    _, load = load
    monkeypatch.setattr(jit, "_compile", lambda *args: pytest.fail("it compiled"))
    shared = folder(home / "shared", 0o777)
    for cache in (shared, shared / "cache"):
        with pytest.raises(UnsafeCache, match=re.escape(f"{shared} can be written by others")):
            load(cache)


def test_cache_behind_a_link_serves(load, home):
    cache, load = load
    assert load(link(home / "link", cache)) == 1


def test_unsafe_is_no_reason_to_fall_back():
    """Backends fall back on JitUnavailable; a cache that somebody may have prepared must stop the run."""
    assert not issubclass(UnsafeCache, JitUnavailable) and issubclass(UnsafeCache, PermissionError)
