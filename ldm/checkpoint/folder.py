"""The diffusers folder layout, read and written: our native format.

A model folder holds `model_index.json` and a folder a component: `unet/`, `vae/`, `text_encoder/`,
`tokenizer/`, `scheduler/`. Parameter names inside are ours and diffusers' alike; this file
translates the configurations and refuses, by name, an option that our models do not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ldm.checkpoint.io import (
    atomic_file,
    atomic_folder,
    load_weights,
    read_json,
    read_tensors,
    without_weights,
    write_json,
    write_tensors,
)
from ldm.checkpoint.locate import MAX_LEVELS
from ldm.checkpoint.names import UNET_PREFIX, below, unet_to_ours, unet_to_theirs
from ldm.checkpoint.tokenizer import read_tokenizer, write_tokenizer
from ldm.config import TIMESTEP_SPACINGS, AutoencoderConfig, ScheduleConfig, UNetConfig, Variance
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import CheckpointError, ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import ClipTextConfig, ClipTextModel, ClipTokenizer
from ldm.models.text_encoder import ClipTower, TextEncoder
from ldm.models.unet import UNet

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")

WEIGHTS = "diffusion_pytorch_model"
RAW_VARIANT = "non_ema"  # diffusers' name of the weights whose moving average is the main file
EXTRAS = "single_file_extras.safetensors"
DIFFUSERS_VERSION = "0.35.0"  # the layout written here is read by this version and every later one

# Options of diffusers' models at the only value that ours have, which is also the default there.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
VAE_FIXED = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}


# What a file may ask for before any weight has been compared with it.
AT_MOST = {"layers_per_block": 64, "transformer_layers_per_block": 64, "num_hidden_layers": 64}
MAX_NUMBER = 10**6


class ModelParts(NamedTuple):
    """What a model is made of, wherever it was read from.

    Attributes:
        unet: predicts what the schedule's `prediction_type` says.
        vae: latents to pictures.
        text_encoder: prompts to context.
        schedule: the noise schedule.
        defaults: settings that suit this model.
        left_over: tensors by their names in a single file that no part above uses, kept so that a
            model is written as it was read; see `ldm.checkpoint.single_file`.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    schedule: NoiseSchedule
    defaults: Mapping[str, Any]
    left_over: Mapping[str, Tensor] = {}


def load_folder(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    ema: bool | None = True,
) -> ModelParts:
    """Read a model folder.

    Args:
        folder: holds `model_index.json` and a folder a component.
        dtype: convert the weights; as stored when None. `left_over` is always as stored.
        variant: `fp16` reads the `.fp16.safetensors` files.
        ema: True takes the U-Net's main weights; False the raw ones beside them (`non_ema`); None
            the main ones, with the raw ones in `left_over`, as far as there are any.

    Raises:
        CheckpointError: the model is incomplete, damaged, or of a kind that ldm has not.
    """
    defaults = load_defaults(folder)  # a folder without its index is half-written
    extras, raw = folder / EXTRAS, _weights_file(folder / "unet", RAW_VARIANT)
    left = read_tensors(extras) if extras.is_file() else {}
    if ema is not None:
        left = {name: tensor for name, tensor in left.items() if not name.startswith("model_ema.")}
    elif raw.is_file():
        weights = read_tensors(raw)
        theirs = unet_to_theirs(weights)
        left |= {UNET_PREFIX + theirs[name]: weight for name, weight in weights.items()}
    of_unet = RAW_VARIANT if ema is False else variant
    return ModelParts(
        defaults=defaults,
        schedule=load_schedule(folder / "scheduler"),
        unet=load_unet(folder / "unet", dtype=dtype, variant=of_unet),
        vae=load_vae(folder / "vae", dtype=dtype, variant=variant),
        text_encoder=load_text_encoder(folder, dtype=dtype, variant=variant),
        left_over=left,
    )


def save_folder(parts: ModelParts, folder: Path) -> None:
    """Write a model folder: each component's folder whole or not at all, and the index last.

    Until then there is none, so that a mixture of two models does not open. Files of others that
    stand in the folder stay.
    """
    (folder / "model_index.json").unlink(missing_ok=True)
    raw = below(UNET_PREFIX, parts.left_over)
    with atomic_folder(folder / "unet") as part:
        save_unet(parts.unet, part)
        if raw:
            ours = unet_to_ours(raw)
            weights = {ours[name]: weight for name, weight in raw.items()}
            write_tensors(_weights_file(part, RAW_VARIANT), weights)
    with atomic_folder(folder / "vae") as part:
        save_vae(parts.vae, part)
    with atomic_folder(folder / "scheduler") as part:
        save_schedule(parts.schedule, part)
    with (
        atomic_folder(folder / "text_encoder") as part,
        atomic_folder(folder / "tokenizer") as words,
    ):
        save_text_encoder(parts.text_encoder, part, words)
    (folder / EXTRAS).unlink(missing_ok=True)  # of a model that stood here before
    if extras := {k: v for k, v in parts.left_over.items() if not k.startswith(UNET_PREFIX)}:
        with atomic_file(folder / EXTRAS) as file:
            write_tensors(file, extras)
    save_index(folder, parts.defaults, _scheduler(parts.schedule))


def save_unet(unet: UNet, folder: Path, *, variant: str | None = None) -> None:
    """Write `config.json` and the weights, in the dtype they have."""
    config = asdict(unet.config)
    attention, heads = config.pop("cross_attention"), unet.config.heads
    del config["num_attention_heads"]
    config |= UNET_FIXED | {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "down_block_types": [_block("Down", cross) for cross in attention],
        "up_block_types": [_block("Up", cross) for cross in reversed(attention)],
        # diffusers calls the number of heads `attention_head_dim`, for ever, by an old mistake.
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
    }
    write_json(folder / "config.json", config)
    write_tensors(_weights_file(folder, variant), unet.state_dict())


def load_unet(
    folder: Path, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> UNet:
    """Read a U-Net, in evaluation mode.

    Args:
        folder: the component's folder.
        dtype: convert the weights; as stored when None.
        variant: `fp16` reads `diffusion_pytorch_model.fp16.safetensors`.

    Raises:
        CheckpointError: a file is missing or damaged, an option is unknown to our U-Net, or the
            weights do not fit the configuration.
    """
    stored = read_json(folder / "config.json")
    _refuse_other(stored, UNET_FIXED, folder)
    down = stored.get("down_block_types") or [_block("Down", cross) for cross in (1, 1, 1, 0)]
    up = stored.get("up_block_types") or [_block("Up", cross) for cross in (0, 1, 1, 1)]
    if not isinstance(down, list) or not isinstance(up, list):
        raise CheckpointError(f"{folder}: down_block_types and up_block_types must be lists")
    attention = tuple(kind == _block("Down", True) for kind in down)
    if [_block("Down", cross) for cross in attention] != list(down) or [
        _block("Up", cross) for cross in reversed(attention)
    ] != list(up):
        raise CheckpointError(f"{folder}: this U-Net has blocks that ldm does not: {down}, {up}")
    heads = stored.pop("num_attention_heads", None) or stored.get("attention_head_dim", 8)
    stored.pop("attention_head_dim", None)
    stored |= {"cross_attention": attention, "num_attention_heads": heads}
    config = read_config(UNetConfig, stored, folder)
    return _load(lambda: UNet(config), folder, dtype, variant)


def save_vae(vae: AutoencoderKL, folder: Path, *, variant: str | None = None) -> None:
    """Write `config.json` and the weights, in the dtype they have."""
    config = asdict(vae.config) | VAE_FIXED | _vae_blocks(len(vae.config.block_out_channels))
    config |= {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "shift_factor": vae.config.shift_factor or None,
    }
    write_json(folder / "config.json", config)
    write_tensors(_weights_file(folder, variant), vae.state_dict())


def load_vae(
    folder: Path, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> AutoencoderKL:
    """Read an autoencoder, in evaluation mode; arguments and errors as for `load_unet`."""
    stored = read_json(folder / "config.json")
    config = read_config(AutoencoderConfig, stored, folder)
    _refuse_other(stored, VAE_FIXED | _vae_blocks(len(config.block_out_channels)), folder)
    return _load(lambda: AutoencoderKL(config), folder, dtype, variant, _modern_attention)


def save_schedule(schedule: NoiseSchedule, folder: Path) -> None:
    """Write `scheduler_config.json` for diffusers' DDIMScheduler, or DDPMScheduler (`_scheduler`).

    diffusers has no schedule by signal rates, so that one travels as a table of betas; our own
    names for it stand beside the table under `_ldm`.
    """
    config, ours = asdict(schedule.config), {}
    rates = {key: config.pop(key) for key in ("min_signal_rate", "max_signal_rate")}
    if config["beta_schedule"] == "cosine_signal_rates":
        ours |= {"beta_schedule": "cosine_signal_rates", **rates}
        config["beta_schedule"] = "linear"
        if config["trained_betas"] is None:
            ours["trained_betas"] = None
            config["trained_betas"] = schedule.betas.tolist()
    if config["timestep_spacing"] not in TIMESTEP_SPACINGS:  # DDIM there cannot choose sigmas
        ours["timestep_spacing"] = config["timestep_spacing"]
        config["timestep_spacing"] = "leading"
    if config["variance_type"] != "learned_range":  # an option that DDIM there does not have
        ours["variance_type"] = config.pop("variance_type")
    config |= {"_class_name": _scheduler(schedule), "_diffusers_version": DIFFUSERS_VERSION}
    config["_ldm"] = ours
    write_json(folder / "scheduler_config.json", config)


def load_schedule(folder: Path) -> NoiseSchedule:
    """Read a noise schedule, whichever of diffusers' schedulers the folder names.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for what our schedules do not have.
    """
    stored = read_json(folder / "scheduler_config.json")
    ours = stored.get("_ldm")
    if ours is None:
        # diffusers' StableDiffusionPipeline draws with these two, whatever such a file says
        ours = {"steps_offset": 1, "clip_sample": False}
        stored = _diffusers_defaults(str(stored.get("_class_name"))) | stored
        for spacing in ("karras", "exponential", "beta"):
            if stored.get(f"use_{spacing}_sigmas"):
                ours["timestep_spacing"] = spacing
        if stored.get("variance_type") not in get_args(Variance):  # some of DDPM's are not ours
            stored["variance_type"] = None
    if not isinstance(ours, dict):
        raise CheckpointError(f"{folder / 'scheduler_config.json'} is damaged (_ldm is no object)")
    config = read_config(ScheduleConfig, stored | ours, folder)
    try:
        return NoiseSchedule(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _scheduler(schedule: NoiseSchedule) -> str:
    """The scheduler of diffusers that draws with such a model; one alone learns variances."""
    learned = schedule.config.variance_type == "learned_range"
    return "DDPMScheduler" if learned else "DDIMScheduler"


def _diffusers_defaults(scheduler: str) -> dict[str, Any]:
    """What a diffusers scheduler of this class takes for a key that its file leaves out."""
    leading = scheduler in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
    return {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "timestep_spacing": "leading" if leading else "linspace",
        "set_alpha_to_one": scheduler == "DDIMScheduler",
    }


def save_index(
    folder: Path, defaults: Mapping[str, Any] | None = None, scheduler: str = "DDIMScheduler"
) -> None:
    """Write `model_index.json`: which library and class reads each component.

    Args:
        folder: the model folder.
        defaults: settings that suit this model, such as its guidance scale; only ldm reads them.
        scheduler: its class in diffusers.
    """
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "_ldm": {"defaults": dict(defaults or {})},
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    with atomic_file(folder / "model_index.json") as file:
        write_json(file, index)


def load_defaults(folder: Path) -> dict[str, Any]:
    """The settings that `save_index` recorded; empty for models of other tools."""
    file = folder / "model_index.json"
    ours = read_json(file).get("_ldm", {})
    defaults = ours.get("defaults", {}) if isinstance(ours, dict) else None
    if not isinstance(defaults, dict):
        raise CheckpointError(f"{file} is damaged (its _ldm holds no object of defaults)")
    return defaults


def load_text_encoder(
    folder: Path, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> TextEncoder:
    """Read `text_encoder/` and `tokenizer/` of a model folder; never downloads.

    Args:
        folder: the model folder.
        dtype: convert the weights; as stored when None.
        variant: `fp16` reads model.fp16.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit its config.json.
    """
    for part, names in (
        ("text_encoder", ("config.json",)),
        ("tokenizer", ("tokenizer.json", "vocab.json")),
    ):
        if not any((folder / part / name).is_file() for name in names):
            wanted = " or ".join(names)
            raise CheckpointError(
                f"no file {folder / part / wanted}; is {folder} a whole model folder?"
            )
    stored = read_json(folder / "text_encoder" / "config.json")
    where = folder / "text_encoder"
    _refuse_other(stored, {"model_type": "clip_text_model"}, where)
    config = read_config(ClipTextConfig, stored, where)
    tokenizer = read_tokenizer(folder / "tokenizer", config.max_position_embeddings)
    tensors = _read_weights(where, "model", variant)
    # transformers 5 writes no prefix; the positions were a tensor before it
    weights = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    weights.pop("embeddings.position_ids", None)
    return make_text_encoder(config, weights, tokenizer, where, dtype)


def make_text_encoder(
    config: ClipTextConfig,
    weights: Mapping[str, Tensor],
    tokenizer: ClipTokenizer,
    where: Path,
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """A text encoder of exactly these weights, by transformers' names without a prefix.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape, or the tokenizer has
            words that the text encoder has not.
    """
    if (words := tokenizer.bpe.get_vocab_size()) > config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer's word {tokenizer.bpe.id_to_token(words - 1)!r} is none of the"
            f" text encoder's {config.vocab_size}"
        )
    with without_weights():
        model = ClipTextModel(config)
    load_weights(model, weights, where, dtype=dtype)
    return TextEncoder(ClipTower(model, tokenizer))


def save_text_encoder(text_encoder: TextEncoder, folder: Path, tokenizer_folder: Path) -> None:
    """Write the two folders of a text encoder, in a layout that all versions of transformers read.

    Raises:
        ConfigError: it has embeddings, which the layout has no place for.
        CheckpointError: the tower is open_clip's, which has no such layout.
    """
    tower = storable_tower(text_encoder)
    # transformers 5 left the prefix out of its own files; it reads both, other tools only this
    weights = {f"text_model.{k}": v.cpu() for k, v in tower.model.state_dict().items()}
    config = asdict(tower.model.config) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": str(tower.table.weight.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", weights)
    write_tokenizer(tower.tokenizer, tokenizer_folder)


def storable_tower(text_encoder: TextEncoder) -> ClipTower:
    """The tower that can be written to a file.

    Raises:
        ConfigError: it has embeddings, which a model's files have no place for.
        CheckpointError: it is open_clip's own.
    """
    if text_encoder.embeddings:
        raise ConfigError(
            f"text encoder: {', '.join(text_encoder.embeddings)} cannot be saved with the model,"
            " for they are files of their own; call remove_embeddings() first"
        )
    if not isinstance(text_encoder.tower, ClipTower):
        raise CheckpointError(
            "an open_clip text encoder has no file format of its own; open the model's text_encoder"
            " folder and save that"
        )
    return text_encoder.tower


def _modern_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the autoencoder's attention has had since diffusers 0.17, of those before."""
    modern = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    rule = re.compile(r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {rule.sub(lambda m: m[1] + modern[m[2]], name): t for name, t in tensors.items()}


def _load(
    build: Callable[[], Model],
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Model:
    with without_weights():
        model = build()
    load_weights(model, rename(_read_weights(folder, WEIGHTS, variant)), folder, dtype=dtype)
    return model.eval()


def _read_weights(folder: Path, stem: str, variant: str | None) -> dict[str, Tensor]:
    """All tensors of a component, from its one file or from its shards."""
    name = stem + (f".{variant}" if variant else "")
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if (folder / f"{name}.safetensors").is_file() or not index.is_file():
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"{folder} has its weights only as .bin, which is pickle; fetch the model's"
                " safetensors, or write them with its own tool (safe_serialization=True)"
            )
        others = {file.name.split(".")[1] for file in folder.glob(f"{stem}.*.safetensors")}
        if not variant and others and not (folder / f"{name}.safetensors").is_file():
            hint = " or ".join(f"--variant {other}" for other in sorted(others))
            raise CheckpointError(f"{folder} has its weights only as a variant; give {hint}")
        return read_tensors(folder / f"{name}.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
        raise CheckpointError(f"{index} is damaged (its weight_map names no files beside it)")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= read_tensors(folder / shard)
    return tensors


def _weights_file(folder: Path, variant: str | None) -> Path:
    return folder / f"{WEIGHTS}{f'.{variant}' if variant else ''}.safetensors"


def read_config(kind: type[Config], stored: Mapping[str, Any], where: Path | str) -> Config:
    """A configuration out of a file, whose other keys are ignored; null means the default.

    Raises:
        CheckpointError: a value is of another type, too large, or refused by the configuration.
    """
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if (value := stored.get(field.name)) is None:
            continue
        most = AT_MOST.get(field.name, MAX_NUMBER)
        if not _fits(value, get_type_hints(kind)[field.name], most):
            raise CheckpointError(
                f"{where}: {field.name} is {str(value)[:80]!r}; ldm needs {field.type} there,"
                f" of numbers up to {most} and lists up to {MAX_LEVELS}"
            )
        values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _fits(value: Any, hint: Any, most: int) -> bool:
    """Whether a value is of a type, and small."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each, most) for each in inner)
    if origin is tuple:
        longest = MAX_NUMBER if inner[0] is float else MAX_LEVELS  # a table, or one number a level
        many = isinstance(value, list | tuple) and len(value) <= longest
        return many and all(_fits(each, inner[0], most) for each in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= most
    if hint is int:
        return type(value) is int and abs(value) <= most
    return type(value) is (str if origin is Literal else hint)


def _refuse_other(stored: Mapping[str, Any], fixed: Mapping[str, Any], folder: Path) -> None:
    for name, value in fixed.items():
        if stored.get(name, value) != value:
            raise CheckpointError(
                f"{folder}: {name} is {stored[name]!r} in config.json; ldm has only {value!r}"
            )


def _vae_blocks(levels: int) -> dict[str, list[str]]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _block(direction: str, cross: object) -> str:
    return f"CrossAttn{direction}Block2D" if cross else f"{direction}Block2D"
