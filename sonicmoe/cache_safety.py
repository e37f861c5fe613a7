"""Whether a cache folder is ours alone. What lies there is run as code, so a folder that another user could have
written is refused, not repaired."""

import os
import stat
from pathlib import Path


class JitUnavailable(RuntimeError):
    """A compiled backend cannot be had here; the message says why and what to do. Another backend can serve."""


class UnsafeCache(PermissionError):
    """Another user could have put code into the cache. Nothing serves until that is settled."""


def _trusted(owner: int) -> bool:
    return owner in (0, os.geteuid())


def require_private(path) -> None:
    """Raise unless only this user and root could have written ``path`` or put it where it is."""
    path = Path(os.path.realpath(path))
    for place in (path, *path.parents):
        found = os.stat(place)
        # In a sticky folder (/tmp) others may add names, but not replace ours.
        sticky = place is not path and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if not _trusted(found.st_uid):
            problem, remedy = f"belongs to user {found.st_uid}", "use a folder of your own"
        elif found.st_mode & 0o022 and not sticky:
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
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private(root)
    for name in names:
        (root / name).mkdir(mode=0o700, exist_ok=True)
        require_private(root / name)
