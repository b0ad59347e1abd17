"""From what a user types to a model folder. Imports no torch: a wrong name is refused at once."""

from __future__ import annotations

import json
from pathlib import Path

from ldm.errors import CheckpointError, ConfigError, suggest

PRETRAINED = Path(__file__).parents[1] / "pretrained"


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
    """The folder of a model: a path, a bundled model's name, or an `owner/name` on the hub.

    Args:
        name: what the user typed. A bundled model's name always means that model: write
            `./flowers` for a folder that is called so.
        variant: of the weight files to fetch from the hub, such as `fp16`.
        revision: branch, tag or commit, for a model on the hub.
        local_files_only: use only what the hub's cache holds already.

    Raises:
        ConfigError: no such model; the line names the nearest one.
        CheckpointError: the hub does not have it, or cannot be reached.
    """
    if str(name) in bundled_models():
        return PRETRAINED / str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ConfigError(f"model {name} is a file; give a model folder in the diffusers layout")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _download(str(name), variant, revision, local_files_only)
    raise _unknown(str(name))


def downsample_factor(model: Path) -> int:
    """Picture pixels to one latent pixel along a side, read off the folder's `vae/config.json`."""
    file = model / "vae" / "config.json"
    try:
        levels = len(json.loads(file.read_text(encoding="utf-8"))["block_out_channels"])
    except FileNotFoundError:
        raise CheckpointError(f"no file {file}; is {model} a whole model folder?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); write or fetch it again") from None
    if not levels:
        raise CheckpointError(f"{file} is damaged (no block_out_channels); fetch it again")
    return 2 ** (levels - 1)


def _unknown(name: str) -> ConfigError:
    names = bundled_models()
    hint = suggest(name, names) if names else "give the path of a model folder"
    return ConfigError(f"no model '{name}', neither a folder nor bundled; {hint}")


def _download(name: str, variant: str | None, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    # Not the single files, half-precision copies and safety checkers that lie beside a model.
    end = f".{variant}.safetensors" if variant else ".safetensors"
    patterns = ["model_index.json", "scheduler/*", "tokenizer/*", "*/config.json"]
    patterns += [f"{part}/diffusion_pytorch_model{end}" for part in ("unet", "vae")]
    patterns += [f"text_encoder/model{end}"]
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
