"""The user's folder of native code, which will be executed: it must be the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from ldm.errors import ConfigError


def default_cache() -> Path:
    """Where native code is kept; the folder can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "compiled"


def make_private(folder: Path) -> None:
    """Make the folder.

    Raises:
        ConfigError: somebody else can put code there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder):
        raise ConfigError(
            f"{folder}: others can write there, and what is compiled is executed; make it your"
            " own and run chmod 700 on it, or set XDG_CACHE_HOME"
        )


def is_private(path: Path) -> bool:
    """Whether nobody else has made it or can write to it, as far as this system tells."""
    found = path.stat()
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
