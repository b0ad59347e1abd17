"""Folders and numbers of the files that runs write; a run may be continued or shared by processes.

Processes need not speak to each other: each looks at the folder, and all come to the same numbers.
Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

from ldm.errors import ConfigError
from ldm.metadata import read_identity


def make_folder(folder: Path) -> Path:
    """Make a folder to write to.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot write to {folder} ({error.strerror})"
        raise ConfigError(f"{reason}; choose --outdir") from None
    return folder


def claim(folder: Path, prefix: str, digits: int = 4, ending: str = "") -> Path:
    """Make what has the next free number, so that no other run takes its name.

    Returns:
        An empty file where there is an ending, a folder where there is none.

    Raises:
        ConfigError: it cannot be made.
    """
    for number in count(next_number(folder, prefix)):
        path = folder / f"{prefix}{number:0{digits}}{ending}"
        try:
            path.touch(exist_ok=False) if ending else path.mkdir()
            return path
        except FileExistsError:  # another run was faster
            continue
        except OSError as error:
            reason = f"cannot write {path} ({error.strerror})"
            raise ConfigError(f"{reason}; choose --outdir") from None
    raise AssertionError  # count does not end


@contextmanager
def new_file(folder: Path, prefix: str, digits: int = 4, ending: str = ".png") -> Iterator[Path]:
    """A file of `claim` to fill; it is gone again if that fails."""
    file = claim(folder, prefix, digits, ending)
    try:
        yield file
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def next_number(folder: Path, prefix: str = "") -> int:
    """One more than the highest number of what is called `<prefix><number>` in a folder."""
    names = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*"))
    return max((int(name) for name in names if name.isdecimal()), default=-1) + 1


def first_number(folder: Path, ending: str, identities: Sequence[str]) -> tuple[int, set[int]]:
    """Where the files of a run begin that may have begun before.

    It is the least number from which on every file that is there is the run's own, at its place.
    So a run that starts again continues, another one writes elsewhere, and processes that look
    while some of the files are written find the same.

    Args:
        folder: of the files.
        ending: of their names, such as ".png"; other files are not looked at.
        identities: of the run's pictures, in the order of their numbers; see `read_identity`.

    Returns:
        The first number, and the places in `identities` whose files are there.
    """
    files = {int(file.stem): file for file in folder.glob(f"*{ending}") if file.stem.isdecimal()}
    numbers, found = sorted(files), cache(lambda number: read_identity(files[number]))
    for first in count():
        start, stop = (bisect_left(numbers, n) for n in (first, first + len(identities)))
        if all(found(n) == identities[n - first] for n in numbers[start:stop]):
            return first, {n - first for n in numbers[start:stop]}
    raise AssertionError  # count does not end


def remove_unfinished(folder: Path, numbers: Set[int]) -> None:
    """Remove what `save_picture` had written of files of these numbers when it was killed."""
    for file in folder.glob(".*"):
        number = file.name[1:].partition(".")[0]
        if number.isdecimal() and int(number) in numbers:
            file.unlink(missing_ok=True)
