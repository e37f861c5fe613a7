"""Whether a cache folder is ours alone. What lies there is run as code, so a folder that another user could have
written is refused, not repaired."""

import os
import stat
from pathlib import Path


class JitUnavailable(RuntimeError):
    """A compiled backend cannot be had here; the message says why and what to do. Another backend can serve."""


class UnsafeCache(PermissionError):
    """Another user could have put code into the cache. Nothing serves until that is settled."""


def unloadable(library, error, remove) -> str:
    """What to say of a whole library that the system's loader refuses. A mount may forbid running what lies there."""
    said = " ".join(str(error).split())
    if "failed to map segment" in said:
        return f"{library} does not load: {said}; set SONIC_MOE_CACHE_DIR to a folder that is not mounted noexec"
    return f"{library} does not load: {said}; remove {remove}"


def _trusted(owner: int) -> bool:
    return owner in (0, os.geteuid())


def _places(path) -> set[Path]:
    """``path``, all folders above it, and the same of every symbolic link among them: whoever may replace one of these
    decides what lies at ``path``."""
    places, ways = set(), [Path(path).absolute(), Path(os.path.realpath(path))]
    while ways:
        way = ways.pop()
        for place in (way, *way.parents):
            if place not in places:
                places.add(place)
                if place.is_symlink():
                    ways.append(place.parent / os.readlink(place))
    return places


def require_private(path) -> None:
    """Raise unless only this user and root could have written ``path`` or put it where it is."""
    final = Path(os.path.realpath(path))
    for place in sorted(_places(path)):
        found = os.lstat(place)
        link = stat.S_ISLNK(found.st_mode)  # its mode says nothing, its owner may change where it leads
        # In a sticky folder (/tmp) others may add names, but not replace ours.
        sticky = place != final and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if not _trusted(found.st_uid):
            problem, remedy = f"belongs to user {found.st_uid}", "use a folder of your own"
        elif found.st_mode & 0o022 and not sticky and not link:
            problem, remedy = f"can be written by others (mode {found.st_mode & 0o7777:o})", f"chmod go-w {place}"
        else:
            continue
        raise UnsafeCache(
            f"SONIC_MOE_CACHE_DIR: {place} {problem}, and compiled code in {path} would be run: {remedy}, or set the "
            "flag to another folder"
        )


def make_private(root, *names: str) -> None:
    """Create ``root`` and folders in it for this user alone, and check them all."""
    root = Path(root)
    # One by one: mkdir's own ``parents`` takes the umask's mode, and under umask 002 we would refuse what we made.
    for folder in [place for place in (*reversed(root.parents), root) if not place.exists()]:
        folder.mkdir(mode=0o700, exist_ok=True)
    require_private(root)
    for name in names:
        (root / name).mkdir(mode=0o700, exist_ok=True)
        require_private(root / name)
