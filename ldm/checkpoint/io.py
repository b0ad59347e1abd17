"""Files that cannot hurt: nothing in a file is executed; files and folders are written whole.

Weights are safetensors; the pickles of old checkpoints are read as data alone. A file or a folder
is written under a temporary name beside its place, flushed to disk, and renamed. A manifest of
SHA-256 sums, written last, lets `verify` say which file a damaged folder got wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import zipfile
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


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in safetensors format; `metadata` joins what transformers expects to find."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {k: v.contiguous() for k, v in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})


class Inert:
    """Stands for every class of a pickle that is no tensor: it takes anything and does nothing."""

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


# The classes that old trainers stored beside the weights. Any other is refused.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|pathlib|typing)\..*"
    r"|builtins\.(dict|list|int|float|str|bool)|collections\.defaultdict"
)
PICKLE_LIMIT = 2**26  # bytes of a checkpoint's structure; Stable Diffusion's is under one MiB


def read_pickle(file: Path) -> Any:
    """What `torch.save` wrote: tensors in dicts and lists, `Inert` for what else is stored there.

    Nothing is executed: torch reads it with `weights_only`, and of the names in the file that torch
    does not know, those of `INERT` become `Inert` and any other is a refusal.

    Raises:
        CheckpointError: the file is missing, damaged, compressed, larger inside than outside, or
            asks for code.
    """
    if not file.is_file():
        raise CheckpointError(f"no file {file}")
    stand_ins: list[Any] = []
    try:
        if zipped := zipfile.is_zipfile(file):
            _check_archive(file)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if bad := sorted(name for name in names if not INERT.fullmatch(name)):
                raise CheckpointError(
                    f"{file} asks for {', '.join(bad)}, which no weights need; nothing of it was"
                    " run: do not open this file with other tools"
                )
            stand_ins = [(_empty if "defaultdict" in name else Inert, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as weights: {reason[:200]}") from None


def _check_archive(file: Path) -> None:
    """Refuse what takes more memory than its size on disk tells."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{file} is a compressed archive, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise CheckpointError(f"{file} claims to hold more than its own size; it is not opened")
    if any(e.file_size > PICKLE_LIMIT for e in entries if e.filename.endswith("data.pkl")):
        raise CheckpointError(f"{file} has a pickle of over {PICKLE_LIMIT >> 20} MiB; not opened")


def read_ckpt(file: Path) -> dict[str, Tensor]:
    """The tensors of an old checkpoint, of its `state_dict` if it has one; see `read_pickle`.

    Raises:
        CheckpointError: as for `read_pickle`, or the file holds no tensors.
    """
    content = read_pickle(file)
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if isinstance(content, dict):
        tensors = {k: v.detach() for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(f"{file} holds no dictionary of tensors; it is no model")


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
    temporary = _temporary(folder)
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


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name to write to; on leaving, the file stands complete at its place, or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    recover(file.parent, escape(file.name))
    temporary = _temporary(file)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
        _flush_directory(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def recover(parent: Path, name: str = "*") -> None:
    """Clear what a kill in `atomic_folder` or `atomic_file` left; give folders their place back.

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
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


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


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors: names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()
