"""Files that cannot hurt: nothing in a file is executed; files and folders are written whole.

Weights are safetensors; the pickles of old checkpoints are read as data alone. A file or a folder
is written under a temporary name beside its place, flushed to disk, and renamed. A manifest of
SHA-256 sums, written last, lets `verify` say which file a damaged folder got wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import shutil
import struct
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.locate import check_kind
from ldm.errors import CheckpointError
from ldm.memory import put_aside

MANIFEST = "manifest.json"


def read_tensors(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        check_kind(file)
        return load_file(file, device=device)
    except FileNotFoundError:
        raise CheckpointError(f"no file {file}; the folder is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); write or fetch it again") from None


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in safetensors format; `metadata` joins what transformers expects to find.

    Raises:
        CheckpointError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()  # the format has no two names for one storage
        storages.add(storage)
        own[name] = tensor
    try:
        save_file(own, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise CheckpointError(
            f"cannot write into {file.parent} ({_one_line(error)}); is the disk full?"
        ) from None


class Inert:
    """Stands for every class of a pickle that is no tensor: it takes anything and does nothing."""

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


# The classes that old trainers stored beside the weights.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|pathlib|typing)\..*"
    r"|builtins\.(dict|list|int|float|str|bool)|collections\.defaultdict"
)
# What plain weights are made of. torch knows more, of which some takes memory at a word.
PLAIN = re.compile(
    r"torch\.(\w+Storage|Size|device|b?float\d+\w*|u?int\d+|bool|nn\.parameter\.Parameter"
    r"|nn\.modules\.container\.ParameterDict"
    r"|_utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state))"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex)"
)
PICKLE_LIMIT = 2**23  # bytes of a checkpoint's structure; Stable Diffusion's is under one MiB


def read_pickle(file: Path) -> Any:
    """What `torch.save` wrote: tensors in dicts and lists, `Inert` for what else is stored there.

    Nothing is executed: torch reads it with `weights_only`, and of the names in the file, those
    of `INERT` become `Inert`, and any that is not of `PLAIN` either is a refusal.

    Raises:
        CheckpointError: the file is missing, damaged, compressed, larger inside than outside, or
            asks for code; or a tensor in it is no plain one.
    """
    if not file.is_file():
        raise CheckpointError(f"no file {file}")
    check_kind(file)
    try:
        with file.open("rb") as stream:
            zipped = stream.read(4) == b"PK\3\4"  # as torch asks, whatever else the file may be
            names = _globals(_zipped_pickle(stream) if zipped else _legacy_pickles(stream))
        unknown = {name for name in names if not PLAIN.fullmatch(name)}
        if bad := sorted(name for name in unknown if not INERT.fullmatch(name)):
            raise CheckpointError(
                f"{file} asks for {', '.join(bad[:8])}, which plain weights do not need;"
                " nothing of it was run, and other tools should not open this file either"
            )
        inert = [(_empty if "defaultdict" in name else Inert, name) for name in unknown]
        with torch.serialization.safe_globals([*inert, nn.ParameterDict]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(f"{file} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything, and torch's advice is unsafe
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as weights ({reason}): it is cut short, damaged, or nothing"
            " that torch.save writes; fetch it again"
        ) from None
    _check_tensors(content, file)
    return content


class _Refused(Exception):
    """What is wrong with a file, without its name."""


def _zipped_pickle(stream: BinaryIO) -> BinaryIO:
    """The pickle in an archive of torch.save, of which every reader sees the same entries."""
    size = stream.seek(0, os.SEEK_END)
    # the end: the record of zip64 (56 bytes), where that is (20), and the older record (22)
    stream.seek(max(size - 98, 0))
    tail = stream.read()
    length, start = struct.unpack("<II", tail[-10:-2])
    place, whole = size - 22, tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0"
    if tail[-42:-38] == b"PK\6\7":
        length, start = struct.unpack("<QQ", tail[40:56])
        place = size - 98
        whole &= tail[:4] == b"PK\6\6" and tail[64:72] == place.to_bytes(8, "little")
    if not whole or start + length != place:
        raise _Refused("is cut short, or has something behind its end; fetch it again")
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = {entry.orig_filename.lower() for entry in entries}
        pickles = [e for e in entries if e.orig_filename.lower().endswith("data.pkl")]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("is a compressed archive, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > size:
            raise _Refused("claims to hold more than its own size; it is not opened")
        if len(pickles) != 1 or len(names) < len(entries):
            raise _Refused("is an archive that torch.save did not write; it is not opened")
        if pickles[0].file_size > PICKLE_LIMIT:
            raise _Refused(f"has a pickle of over {PICKLE_LIMIT >> 20} MiB; it is not opened")
        return io.BytesIO(archive.read(pickles[0]))


def _legacy_pickles(stream: BinaryIO) -> BinaryIO:
    """The beginning of a file from before torch 1.6: five pickles, and then the numbers."""
    stream.seek(0)
    return io.BytesIO(stream.read(PICKLE_LIMIT))


def _globals(pickles: BinaryIO) -> set[str]:
    """Every name that pickles, one behind the other, ask to be called."""
    names: set[str] = set()
    for _ in range(5):
        for code, argument, _ in pickletools.genops(pickles):
            if code.name == "GLOBAL":
                names.add(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
        if pickles.tell() == len(pickles.getbuffer()):  # type: ignore[attr-defined]
            break
    return names


def _check_tensors(content: Any, file: Path) -> None:
    """Refuse a tensor that is no plain one, or larger than its numbers in the file."""
    size, seen = file.stat().st_size, set[int]()
    todo: list[tuple[Any, Any]] = [("", content)]
    while todo:
        key, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu"
            if not plain or value.is_quantized or value.is_complex():
                raise CheckpointError(f"{file}: {key} is no plain tensor of real numbers")
            if not value.nbytes <= value.untyped_storage().nbytes() <= size:
                raise CheckpointError(f"{file}: {key} claims more numbers than the file holds")
        elif isinstance(value, nn.ParameterDict):
            todo.append((key, vars(value)))
        elif isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, list | tuple):
            todo += [(key, item) for item in value]


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not readable as JSON (it holds no object)")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


class _LeftUnfilled(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made in it have no numbers: `load_weights` gives them theirs, without a copy.

    Neither memory nor time goes into numbers about to be replaced; on the meta device alone, some
    initialisations import torch's compiler, which takes longer than all the rest.
    """
    with torch.device("meta"), _LeftUnfilled():
        yield


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: Path | str,
    *,
    assign: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module exactly these weights.

    Args:
        module: on any device; with `assign`, one made `without_weights`, too.
        tensors: by the module's own names.
        where: the file, for the error line.
        assign: make the tensors the module's parameters; else copy their numbers.
        dtype: convert the floating-point ones, when all have passed; as stored when None.

    Raises:
        CheckpointError: keys are missing, unexpected, of another shape or no floating-point
            numbers where those belong; the line lists them.
    """
    wanted = module.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    wrong += [
        f"{name} is of {tensors[name].dtype}"
        for name in wanted
        if name in tensors and tensors[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"{where} does not fit its configuration: {shown}")
    module.load_state_dict(to_dtype(tensors, dtype), assign=assign)


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
    folder = folder.resolve()  # what a link points to, not the link, is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder.parent, folder.name)
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
        recover(folder.parent, folder.name)


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name to write to; on leaving, the file stands complete at its place, or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    recover(file.parent, file.name)
    temporary = _temporary(file)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
        _flush_directory(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def recover(parent: Path, name: str | None = None, *, alone: bool = False) -> None:
    """Clear what a kill in `atomic_folder` or `atomic_file` left; give folders their place back.

    Args:
        parent: where the folders stand.
        name: of the folder or file to look for; all of them by default.
        alone: nobody else writes there, so that a dead writer is known for dead where another
            process has its number by now, as in every new container.
    """
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        match = LEFT_BEHIND.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        writer, place = int(match["writer"]), parent / match["name"]
        if not alone and writer != os.getpid() and _alive(writer):  # it may be filling it
            continue
        if match["kind"] == "old" and not os.path.lexists(place):  # killed between the two renames
            path.rename(place)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill leaves it whole, or for `recover` to clear."""
    shutil.rmtree(folder.rename(_temporary(folder)))


# as `_temporary` makes them
LEFT_BEHIND = re.compile(
    r"\.(?P<name>.+)\.(?P<writer>[0-9]{1,9})-[0-9a-f]{8}\.(?P<kind>tmp|old)", re.DOTALL
)


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
    """The same tensors, the floating-point ones in another dtype.

    What has been read from a mapped file need not stay in memory beside it.
    """
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if found[name] is not tensor:
            put_aside(tensor)
    return found


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
