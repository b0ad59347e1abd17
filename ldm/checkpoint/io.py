"""Files that cannot hurt: weights are read without pickle, folders are written whole or not at all.

A folder is written under a temporary name beside its place, flushed to disk, and renamed. A
manifest of SHA-256 sums, written last, lets `verify` say which file a damaged folder got wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError

MANIFEST = "manifest.json"


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(file, device=device)
    except FileNotFoundError:
        raise CheckpointError(f"no file {file}; the folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); write or fetch it again") from None


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in safetensors format; the metadata is what transformers expects to find."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no file {file}; is {file.parent} a model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not readable as JSON (it holds no object)")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], where: Path | str, *, assign: bool = True
) -> None:
    """Give a module exactly these weights.

    Args:
        module: on any device; with `assign`, on the meta device too.
        tensors: by the module's own names.
        where: the file, for the error line.
        assign: make the tensors the module's parameters; else copy their numbers.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; the line lists them.
    """
    wanted = module.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"{where} does not fit its configuration: {shown}")
    module.load_state_dict(dict(tensors), assign=assign)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; on leaving it stands complete at `folder`, or nothing does.

    Every file and every directory entry is flushed to disk before the one rename that makes the
    folder visible; an older folder of that name steps aside only then. An exception leaves
    things as they were, and what a kill leaves is put right by `recover`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder.parent, escape(folder.name))
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = folder.with_name(f".{folder.name}.{unique}.tmp")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _flush_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(folder.parent, escape(folder.name))


def recover(parent: Path, name: str = "*") -> None:
    """Clear what a kill inside `atomic_folder` has left, and give a folder its place back.

    Args:
        parent: where the folders stand.
        name: pattern of the folders to look for; all of them by default.
    """
    for old in parent.glob(f".{name}.[0-9]*-*.old"):
        place = parent / old.name[1:].rsplit(".", 2)[0]
        if place.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames
            old.rename(place)
    for temporary in parent.glob(f".{name}.[0-9]*-*.tmp"):
        writer = int(temporary.name.rsplit(".", 2)[1].split("-")[0])
        if writer == os.getpid() or not _alive(writer):  # another process may be filling it
            shutil.rmtree(temporary)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        return True
    return True


def write_manifest(folder: Path) -> None:
    """Record the SHA-256 of every file below a folder in its `manifest.json`; call it last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(
        folder / MANIFEST, {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    )


def verify(folder: Path) -> None:
    """Check a folder against its manifest.

    Raises:
        CheckpointError: there is no manifest, or a file is missing or has other bytes.
    """
    for name, digest in read_json(folder / MANIFEST).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}; use an older checkpoint")
        if sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} has changed or is torn; use an older checkpoint"
            )


def to_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same tensors, the floating-point ones in another dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def _flush(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(directory, name), "rb") as stream:
                os.fsync(stream.fileno())
        _flush_directory(Path(directory))


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
