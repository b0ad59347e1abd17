"""Importing this makes sure that `ldm` is this project's package; it says so in one line if not.

The import name is shared with CompVis's repositories, so another `ldm` may stand in the way.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]

_found = find_spec("ldm")
if _found is None:
    sys.exit(f"error: ldm is not installed in {sys.executable}; run: pip install -e {ROOT}")
if not any((Path(place) / "cli.py").is_file() for place in _found.submodule_search_locations or []):
    sys.exit(
        f"error: another package called ldm, {_found.origin}, stands in this one's way; uninstall"
        f" it, or use a virtual environment of its own, then: pip install -e {ROOT}"
    )
