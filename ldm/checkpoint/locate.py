"""From what a user types to a model's folder or file. Imports no torch: a wrong name is refused
at once, and so is what a file's header tells.
"""

from __future__ import annotations

import json
from pathlib import Path

from ldm.checkpoint.names import count
from ldm.errors import CheckpointError, ConfigError, suggest

PRETRAINED = Path(__file__).parents[1] / "pretrained"
SINGLE_FILES = (".safetensors", ".ckpt")
MAX_LEVELS = 16  # of resolution in a network
MAX_HEADER = 100_000_000  # bytes; the format allows no more


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(index.parent.name for index in PRETRAINED.glob("*/model_index.json"))


def locate_model(
    name: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder or the single file of a model.

    A path, a bundled model's name, or an `owner/name` on the hub.

    Args:
        name: what the user typed. A bundled model's name always means that model: write
            `./flowers` for a folder that is called so.
        variant: of the weight files to fetch from the hub, such as `fp16`. A U-Net's raw weights
            beside their average are one too, `non_ema`, and are fetched only when asked for.
        revision: branch, tag or commit, for a model on the hub.
        local_files_only: use only what the hub's cache holds already.

    Raises:
        ConfigError: no such model; the line names the nearest one.
        CheckpointError: the hub does not have it, or cannot be reached.
    """
    if str(name) in bundled_models():
        return PRETRAINED / str(name)
    try:
        folder = Path(name).expanduser()
        is_dir, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError):  # a name that is too long, `~` of nobody
        raise _unknown(str(name)) from None
    if is_dir:
        return folder
    if is_file:
        if folder.suffix in SINGLE_FILES:
            return folder
        raise ConfigError(
            f"model {name} is a file, but no {' or '.join(SINGLE_FILES)}; give one of those, or a"
            " model folder in the diffusers layout"
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _download(str(name), variant, revision, local_files_only)
    raise _unknown(str(name))


def downsample_factor(model: Path) -> int:
    """Picture pixels to one latent pixel along a side.

    Read off a folder's `vae/config.json`, or off the names in a single file. A .ckpt would have to
    be unpickled for that: for one it is 8, which that of every published Stable Diffusion is.
    """
    if model.suffix == ".ckpt" and model.is_file():
        return 8
    if model.is_file():
        names = safetensors_header(model)[0]
        levels = count(r"first_stage_model\.encoder\.down\.(\d+)\.", names)
        return 2 ** min(max(levels - 1, 0), MAX_LEVELS)
    file = model / "vae" / "config.json"
    try:
        levels = len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"])
    except FileNotFoundError:
        raise CheckpointError(f"no file {file}; is {model} a whole model folder?") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); write or fetch it again") from None
    if not 0 < levels <= MAX_LEVELS:
        raise CheckpointError(f"{file} is damaged ({levels} block_out_channels); fetch it again")
    return 2 ** (levels - 1)


def safetensors_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The names and shapes of a safetensors file's tensors, and its metadata.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        check_kind(file)
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            if size > file.stat().st_size:
                raise ValueError("it is shorter than it says")
            header = json.loads(stream.read(size))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no text")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); write or fetch it again") from None


def check_kind(file: Path) -> None:
    """Refuse a file whose first bytes are of another kind than its ending says.

    Raises:
        CheckpointError: the line says what the file is.
    """
    with file.open("rb") as stream:
        head = stream.read(64)
    safetensors, pickle = head[8:9] == b"{", head.startswith((b"PK\3\4", b"\x80\2"))
    if head.startswith(b"version https://git-lfs"):
        kind = "only a pointer of git-lfs; fetch the file itself with `git lfs pull`"
    elif head.lstrip().startswith(b"<"):
        kind = "a web page; download the file itself"
    elif file.suffix == ".safetensors" and pickle and not safetensors:
        kind = "a pickle inside; rename it to .ckpt or .pt"
    elif file.suffix != ".safetensors" and safetensors and not pickle:
        kind = "a safetensors file inside; rename it to .safetensors"
    else:
        return
    raise CheckpointError(f"{file} is {kind}")


def _unknown(name: str) -> ConfigError:
    names = bundled_models()
    hint = suggest(name, names) if names else "give the path of a model folder"
    return ConfigError(f"no model '{name[:200]}', neither a folder nor bundled; {hint}")


def _download(name: str, variant: str | None, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    # Not the single files, half-precision copies and safety checkers that lie beside a model.
    patterns = ["model_index.json", "scheduler/*", "tokenizer/*", "*/config.json"]
    patterns.append("single_file_extras.safetensors")
    end = f".{variant}" if variant else ""
    for stem in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        patterns += [f"{stem}{end}.safetensors", f"{stem}{end}-*-of-*.safetensors"]
        patterns.append(f"{stem}.safetensors.index{end}.json")
    try:
        folder = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=patterns
        )
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"no folder '{name}', and the hub's cache does not hold a model of that name;"
            " check the path, or go online once"
        ) from None
    except HFValidationError:  # no name that the hub could have
        raise _unknown(name) from None
    except HfHubHTTPError as error:
        which = f"of that name and revision '{revision}'" if revision else "of that name"
        raise CheckpointError(
            f"no folder '{name}', and the hub gives no model {which} (HTTP"
            f" {error.response.status_code}); check the path, or log in where it is private"
        ) from None
    return Path(folder)
