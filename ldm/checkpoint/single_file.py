"""Single files of CompVis and Stability AI (SD 1.x, 2.x), `.safetensors` and `.ckpt`, in and out.

The architecture is read off the shapes: groups of 32 channels; 8 heads where the context is 768
wide (SD 1.x), heads of width 64 where it is 1024 wide (SD 2.x). What the U-Net predicts is not in
the weights. It is what the caller says, or a YAML that the caller names, or the file's metadata
(ours or ModelSpec's), or a marker that trainers leave (`v_pred`, `ztsnr`), or the YAML beside the
file; else epsilon for SD 1.x, as its own releases are, with a warning, for some fine-tunings are
not; and a refusal for any other model. Files that ldm writes carry their configurations in the
metadata, so that models of any shape come back.

Nothing is lost. What no part of ours uses (tables of the noise schedule, `position_ids`, SD 2.x's
last text layer and projection) stays in `ModelParts.left_over`, and so do a U-Net's raw weights
beside their moving average (EMA), which is the one to draw with. A key that is neither used nor on
the list `UNUSED` is a refusal.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.folder import (
    MAX_NUMBER,
    ModelParts,
    make_text_encoder,
    read_config,
    storable_tower,
)
from ldm.checkpoint.io import (
    atomic_file,
    load_weights,
    read_ckpt,
    read_tensors,
    without_weights,
    write_tensors,
)
from ldm.checkpoint.locate import safetensors_header
from ldm.checkpoint.names import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    below,
    count,
    ema_name,
    open_clip_to_ours,
    open_clip_to_theirs,
    unet_to_ours,
    unet_to_theirs,
    vae_to_ours,
    vae_to_theirs,
)
from ldm.checkpoint.tokenizer import END, clip_tokenizer
from ldm.config import AutoencoderConfig, Prediction, ScheduleConfig, UNetConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import CheckpointError, ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import ClipTextConfig, ClipTokenizer
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet

logger = logging.getLogger(__name__)

# What a file may hold beside the weights: kept, but not computed with.
UNUSED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt|log|posterior)_\w+|lvlb_weights|logvar|scale_factor"
    r"|global_step|v_pred|ztsnr|model_ema\..+|first_stage_model\.(loss|model_ema)\..+"
    r"|cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|cond_stage_model\.((transformer|model)\.)?(text_projection(\.weight)?|logit_scale)"
)
# What a name betrays of a file that is not for us.
OTHER_KINDS = {
    r"conditioner\.": "an SDXL model",
    r".*\bjoint_blocks\.": "an SD 3 model",
    r".*\bdouble_blocks\.": "a Flux model",
    r".*\blabel_emb\.": "a class-conditional, unCLIP or upscaling model",
    r"control_model\.|.*zero_convs\.": "a ControlNet",
    r"depth_model\.": "a depth-to-image model",
    r"lora_|.*\.lora[_.]|.*\.(hada|lokr)_": "a LoRA, which load_lora_weights opens",
    r"emb_params$|string_to_": "a textual inversion, which load_textual_inversion opens",
    r"(down_blocks|(en|de)coder\.mid_block|(text_model\.)?encoder\.layers)\.": (
        "one component of a model folder"
    ),
    r"((en|de)coder|quant_conv)\.": "an autoencoder alone",
}
MODELSPEC = {  # what its prediction_type and architecture say of the prediction type
    "epsilon": "epsilon",
    "v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
PARAMETERIZATION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # CompVis's words: ours
HF = "cond_stage_model.transformer."
CROSS_ATTENTION = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def load_single_file(
    file: str | Path,
    *,
    prediction_type: Prediction | None = None,
    config: str | Path | None = None,
    ema: bool | None = None,
    dtype: torch.dtype | None = None,
) -> ModelParts:
    """Read a model from one file.

    Args:
        file: `.safetensors`, or `.ckpt`, of which nothing is executed.
        prediction_type: what the U-Net predicts, where the file does not say.
        config: a YAML in CompVis's layout; when not given, the one beside the file, of its name, if
            it is one.
        ema: of a file that has both, True takes the moving average, False the raw weights, and the
            others are dropped; None takes the average and keeps the raw weights in `left_over`.
        dtype: convert the weights; each as stored when None. `left_over` is always as stored.

    Raises:
        CheckpointError: the file is damaged, holds another kind of model, has keys missing,
            unexpected or of another shape, or does not say enough.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"no file {file}")
    if file.suffix == ".safetensors":
        shapes, metadata = safetensors_header(file)
        tensors = None  # read when the header has passed
    else:
        tensors, metadata = read_ckpt(file), {}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_names(shapes, file)
    width = (shapes.get(UNET_PREFIX + CROSS_ATTENTION) or (0,))[-1]
    options = _yaml(Path(config or file.with_suffix(".yaml")), needed=config is not None)
    stored = _stored(metadata, file)
    said = {
        "argument": prediction_type,
        "config": config and options["prediction_type"],
        "ldm": stored["schedule"].prediction_type if stored else None,
        "ModelSpec": MODELSPEC.get(metadata.get("modelspec.prediction_type", "")),
        "its architecture": MODELSPEC.get(metadata.get("modelspec.architecture", "")),
        "its marker": "v_prediction" if "v_pred" in shapes else None,
        "neighbour": options.get("prediction_type"),
    }
    prediction = next(filter(None, said.values()), None)
    if prediction is None and width == 768:
        logger.warning(
            "%s does not say what its U-Net predicts; taken for epsilon, as SD 1.x", file
        )
        prediction = "epsilon"
    if prediction is None:
        raise CheckpointError(
            f"{file} does not say what its U-Net predicts; give --prediction_type (prediction_type="
            " in Python): epsilon for SD 2.x at 512 pixels, v_prediction for SD 2.x at 768"
        )
    tensors = read_tensors(file) if tensors is None else tensors
    try:
        configs = stored or {"schedule": _schedule_config(tensors, options, file)}
        configs["schedule"] = replace(configs["schedule"], prediction_type=prediction)
        return _assemble(tensors, configs, options, width, ema, dtype, file)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} lacks what its architecture is read off: {error}") from None


def save_single_file(parts: ModelParts, file: str | Path) -> None:
    """Write a model to one `.safetensors` file, by the names of CompVis and Stability AI.

    A text encoder with plain GELU, as in SD 2.x, is written as open_clip's. Tools take the state
    before that one's last layer, which model folders do not have: without one in `left_over`, the
    last layer that there is stands there twice. Its weights are never computed with.

    Raises:
        ConfigError: the text encoder has embeddings, or a vocabulary that single files cannot hold.
        CheckpointError: the text encoder is open_clip's own.
    """
    file, left = Path(file), parts.left_over
    tower = storable_tower(parts.text_encoder)
    text, words = tower.model.config, tower.tokenizer
    _check_vocabulary(words, text)
    weights = parts.unet.state_dict()
    averaged = any(name.startswith(UNET_PREFIX) for name in left)
    tensors = {
        ema_name(theirs) if averaged else UNET_PREFIX + theirs: weights[ours]
        for ours, theirs in unet_to_theirs(weights).items()
    }
    weights = parts.vae.state_dict()
    for ours, theirs in vae_to_theirs(weights).items():
        linear = ".mid.attn_1." in theirs and weights[ours].ndim == 2  # theirs is a 1x1 convolution
        tensors[VAE_PREFIX + theirs] = weights[ours][..., None, None] if linear else weights[ours]
    weights = tower.model.state_dict()
    if text.hidden_act == "gelu":
        tensors |= {OPEN_CLIP_PREFIX + k: v for k, v in _to_open_clip(weights).items()}
        last = f"transformer.resblocks.{text.num_hidden_layers - 1}."
        unseen = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{text.num_hidden_layers}."
        again = below(OPEN_CLIP_PREFIX + last, tensors)
        tensors |= {unseen + k: v.clone() for k, v in again.items() if unseen + k not in left}
    else:
        tensors |= {CLIP_PREFIX + name: weight for name, weight in weights.items()}
    ours = {
        "unet": asdict(parts.unet.config),
        "vae": asdict(parts.vae.config),
        "schedule": asdict(parts.schedule.config),
        "text_encoder": asdict(text),
        "pad_token": words.bpe.id_to_token(words.padding),
        "defaults": dict(parts.defaults),
    }
    with atomic_file(file) as temporary:
        write_tensors(
            temporary, {**left, **tensors}, _modelspec(parts, file.stem) | {"ldm": json.dumps(ours)}
        )


def open_clip_weights(file: str | Path) -> dict[str, Tensor]:
    """The text tower of an SD 2.x file, all its layers, as open_clip's own state dict.

    Raises:
        CheckpointError: the file is damaged, or has no such tower.
    """
    file = Path(file)
    tensors = read_tensors(file) if file.suffix == ".safetensors" else read_ckpt(file)
    weights = below(OPEN_CLIP_PREFIX, tensors)
    if not weights:
        raise CheckpointError(f"{file} has no text encoder of open_clip")
    weights.pop("logit_scale", None)  # it belongs to the whole CLIP
    return weights


def _check_names(names: Iterable[str], file: Path) -> None:
    """Refuse what is no Stable Diffusion 1.x or 2.x, and keys that nobody asked for."""
    for pattern, kind in OTHER_KINDS.items():
        if name := next((n for n in names if re.match(pattern, n)), None):
            raise CheckpointError(
                f"{file} is {kind} ({name}); ldm reads models of Stable Diffusion 1.x and 2.x"
            )
    parts = {"U-Net": UNET_PREFIX, "autoencoder": VAE_PREFIX, "text encoder": "cond_stage_model."}
    for part, prefix in parts.items():
        if not any(name.startswith(prefix) for name in names):
            raise CheckpointError(f"{file} has no {part} (no key {prefix}*); it is no whole model")
    prefixes = (UNET_PREFIX, VAE_PREFIX, HF, OPEN_CLIP_PREFIX)
    if wrong := [n for n in names if not n.startswith(prefixes) and not UNUSED.fullmatch(n)]:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"{file} has keys that no Stable Diffusion has: {shown}")
    towers = [
        [n for n in names if n.startswith(p) and not UNUSED.fullmatch(n)] for p in prefixes[2:]
    ]
    if all(towers):
        both = " and ".join(tower[0] for tower in towers)
        raise CheckpointError(f"{file} has two text encoders, {both}; take one of them out")


def _assemble(
    tensors: Mapping[str, Tensor],
    configs: dict[str, Any],
    options: Mapping[str, Any],
    width: int,
    ema: bool | None,
    dtype: torch.dtype | None,
    file: Path,
) -> ModelParts:
    """The parts, of tensors whose names have passed `_check_names`.

    Args:
        tensors: of the file.
        configs: what is known of the parts; at least the schedule.
        options: of the YAML.
        width: of the context.
        ema: see `load_single_file`.
        dtype: likewise.
        file: for the error line.
    """
    schedule = configs["schedule"]
    raw = below(UNET_PREFIX, tensors)
    average = {n: tensors[ema_name(n)] for n in raw if ema_name(n) in tensors}
    if ema and not average:
        raise CheckpointError(f"{file} holds no moving average (EMA); leave out --ema")
    used = {ema_name(name) for name in raw}
    left = {
        name: tensor
        for name, tensor in tensors.items()
        if UNUSED.fullmatch(name)
        and name not in used
        and (ema is None or not name.startswith("model_ema."))
    }
    if average and ema is None:
        left |= {UNET_PREFIX + name: tensor for name, tensor in raw.items()}
    names, chosen = unet_to_ours(raw), average if average and ema is not False else raw
    weights = _renamed(chosen, names, file)
    v = schedule.prediction_type == "v_prediction" and width == 1024  # SD 2.x at 768 pixels
    if "unet" not in configs:
        heads = _heads(options, width, file)
        size = {"sample_size": 96 if v else 64, "upcast_attention": v}
        configs["unet"] = _unet_config(weights, **size, **heads)
    with without_weights():
        unet = UNet(configs["unet"])
    load_weights(unet, weights, file, dtype=dtype)

    stored = {n: t for n, t in below(VAE_PREFIX, tensors).items() if VAE_PREFIX + n not in left}
    names = vae_to_ours(stored)
    weights = {n: _linear(n, t) for n, t in _renamed(stored, names, file).items()}
    if "vae" not in configs:
        scale = {"scaling_factor": options.get("scale_factor", 0.18215)}
        configs["vae"] = _vae_config(weights, sample_size=768 if v else 512, **scale)
    with without_weights():
        vae = AutoencoderKL(configs["vae"])
    load_weights(vae, weights, file, dtype=dtype)

    text_encoder = _text_encoder(tensors, configs, left, dtype, file)
    defaults = configs.get("defaults", {})
    return ModelParts(
        unet.eval(), vae.eval(), text_encoder, NoiseSchedule(schedule), defaults, left
    )


def _text_encoder(
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Any],
    left: dict[str, Tensor],
    dtype: torch.dtype | None,
    file: Path,
) -> TextEncoder:
    """The text encoder, of either dialect; layers that it does not use are added to `left`."""
    config: ClipTextConfig | None = configs.get("text_encoder")
    fused = {
        n: t
        for n, t in below(OPEN_CLIP_PREFIX, tensors).items()
        if OPEN_CLIP_PREFIX + n not in left
    }
    if fused:
        layers = count(r"transformer\.resblocks\.(\d+)\.", fused)
        # SD 2.x takes the state before the last layer; some tools have left that one out already
        whole = config is None and layers == 23 and len(fused["ln_final.weight"]) == 1024
        if config is None and len(fused["ln_final.weight"]) == 1024 and layers not in (23, 24):
            raise CheckpointError(
                f"{file} has a text encoder of {layers} layers; SD 2.x has 24, or 23 where the"
                " last, which it does not use, is left out"
            )
        last = f"transformer.resblocks.{layers - 1}."
        if not whole:
            left |= {OPEN_CLIP_PREFIX + n: t for n, t in fused.items() if n.startswith(last)}
            fused = {n: t for n, t in fused.items() if not n.startswith(last)}
        weights = _from_open_clip(fused, file)
    else:
        kept = {n: t for n, t in below(HF, tensors).items() if HF + n not in left}
        weights = _renamed(kept, {name: name.removeprefix("text_model.") for name in kept}, file)
    if config is None:
        vocab_size, width = weights["embeddings.token_embedding.weight"].shape
        if width % 64:
            raise CheckpointError(f"{file} has a text encoder of width {width}, which is no CLIP's")
        config = ClipTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=count(r"encoder\.layers\.(\d+)\.", weights),
            num_attention_heads=width // 64,  # the width of a head in every CLIP
            max_position_embeddings=len(weights["embeddings.position_embedding.weight"]),
            hidden_act="gelu" if fused else "quick_gelu",
            projection_dim=512 if fused else width,  # as SD's own folders say; not computed with
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=0 if fused else vocab_size - 1,
        )
    if not 514 <= config.vocab_size <= 49408:
        raise CheckpointError(f"{file} has a vocabulary of {config.vocab_size}, which is no CLIP's")
    pad_token = configs.get("pad_token", "!" if fused else END)
    words = clip_tokenizer(config.vocab_size, config.max_position_embeddings, pad_token)
    return make_text_encoder(config, weights, words, file, dtype)


def _renamed(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], file: Path
) -> dict[str, Tensor]:
    """By our names, of which none may have two of theirs."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if names[name] in renamed:
            raise CheckpointError(f"{file} has {names[name]} under two names, one of them {name}")
        renamed[names[name]] = tensor
    return renamed


def _from_open_clip(fused: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        thirds = tensor.chunk(3) if ".in_proj_" in name else ()  # q, k and v, one above the other
        weights |= {f"{name}.{i}": third for i, third in enumerate(thirds)} or {name: tensor}
    return _renamed(weights, open_clip_to_ours(weights), file)


def _to_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    thirds: dict[str, list[Tensor]] = {}
    for ours, theirs in sorted(open_clip_to_theirs(weights).items(), key=lambda pair: pair[1]):
        name = theirs[:-2] if ".in_proj_" in theirs else theirs  # without the third's number
        thirds.setdefault(name, []).append(weights[ours])
    return {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in thirds.items()}


def _linear(name: str, weight: Tensor) -> Tensor:
    """A weight of the autoencoder's attention without the kernel that CompVis's has."""
    return weight.flatten(1) if ".attentions.0.to_" in name and weight.ndim > 2 else weight


def _unet_config(weights: Mapping[str, Tensor], **known: Any) -> UNetConfig:
    levels = range(count(r"down_blocks\.(\d+)\.", weights))
    middle = "mid_block.attentions.0"
    return UNetConfig(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=len(weights["conv_out.weight"]),
        block_out_channels=tuple(
            len(weights[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels
        ),
        layers_per_block=count(r"down_blocks\.0\.resnets\.(\d+)\.", weights),
        cross_attention=tuple(
            f"down_blocks.{level}.attentions.0.norm.weight" in weights for level in levels
        ),
        transformer_layers_per_block=count(rf"{middle}\.transformer_blocks\.(\d+)\.", weights),
        cross_attention_dim=weights[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        use_linear_projection=weights[f"{middle}.proj_in.weight"].ndim == 2,
        **known,
    )


def _heads(options: Mapping[str, Any], width: int, file: Path) -> dict[str, int]:
    """Of the U-Net's attention: as the YAML says, or by the width of the context."""
    for ours, theirs in (
        ("attention_head_dim", "num_head_channels"),
        ("num_attention_heads", "num_heads"),
    ):
        if (number := options.get(theirs, -1)) > 0:
            return {ours: number}
    known = {768: {"num_attention_heads": 8}, 1024: {"attention_head_dim": 64}}
    if width not in known:
        raise CheckpointError(
            f"{file} has a context of width {width}, which is no Stable Diffusion's, so that its"
            " attention heads are not known; give --config the YAML that came with it"
        )
    return known[width]


def _vae_config(weights: Mapping[str, Tensor], **known: Any) -> AutoencoderConfig:
    levels = range(count(r"encoder\.down_blocks\.(\d+)\.", weights))
    return AutoencoderConfig(
        in_channels=weights["encoder.conv_in.weight"].shape[1],
        out_channels=len(weights["decoder.conv_out.weight"]),
        latent_channels=weights["decoder.conv_in.weight"].shape[1],
        block_out_channels=tuple(
            len(weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"]) for level in levels
        ),
        layers_per_block=count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", weights),
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in weights,
        **known,
    )


def _schedule_config(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], file: Path
) -> ScheduleConfig:
    """Stable Diffusion's, but for what the YAML says, or the table or the marker in the file."""
    known = {
        "linear_start": "beta_start",
        "linear_end": "beta_end",
        "timesteps": "num_train_timesteps",
    }
    said = {known[key]: options[key] for key in known if key in options}
    said["rescale_betas_zero_snr"] = "ztsnr" in tensors
    config = read_config(ScheduleConfig, said, file)
    if (betas := tensors.get("betas")) is None:
        return config
    if betas.numel() > MAX_NUMBER:
        raise CheckpointError(
            f"{file} has a schedule of {betas.numel()} steps, which is no model's"
        )
    formula = NoiseSchedule(config).betas
    if len(betas) == len(formula) and torch.allclose(betas.double(), formula, rtol=1e-2):
        return config  # the same, or so in half precision
    return replace(config, num_train_timesteps=len(betas), trained_betas=tuple(betas.tolist()))


def _yaml(file: Path, *, needed: bool) -> dict[str, Any]:
    """What a configuration in CompVis's layout says that ldm asks for, in one dictionary."""
    import yaml

    if not needed and not file.is_file():
        return {}
    kinds = {"linear_start": float, "linear_end": float, "timesteps": int, "scale_factor": float}
    kinds |= {"num_heads": int, "num_head_channels": int}
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases, with which a few lines can become millions")
        model = yaml.safe_load(text)["model"]["params"]
        said = {**model, **model.get("unet_config", {}).get("params", {})}
        prediction = PARAMETERIZATION[said.get("parameterization", "eps")]
        options = {name: kind(said[name]) for name, kind in kinds.items() if name in said}
    except (
        OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
        OverflowError,
    ) as error:  # fmt: skip
        reason = f"is no configuration in CompVis's layout ({' '.join(str(error).split())[:100]})"
        if needed:
            raise CheckpointError(f"{file} {reason}") from None
        logger.warning("%s %s; it is left aside", file, reason)
        return {}
    return {**options, "prediction_type": prediction}


def _stored(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """The configurations that ldm wrote; {} for other tools' files."""
    if "ldm" not in metadata:
        return {}
    try:
        stored = json.loads(metadata["ldm"])
        kinds: dict[str, Any] = {
            "unet": UNetConfig,
            "vae": AutoencoderConfig,
            "schedule": ScheduleConfig,
            "text_encoder": ClipTextConfig,
        }
        for name, kind in kinds.items():
            stored[name] = read_config(kind, stored[name], f"{file}: ldm's metadata")
        if type(stored["pad_token"]) is not str or type(stored["defaults"]) is not dict:
            raise TypeError("pad_token or defaults")
        return stored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: ldm's metadata is damaged ({error!r})") from None


def _modelspec(parts: ModelParts, title: str) -> dict[str, str]:
    """Stability AI's ModelSpec: how other tools know what the U-Net predicts."""
    prediction, unet = parts.schedule.config.prediction_type, parts.unet.config
    spec = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    if prediction == "sample":
        return spec
    spec["modelspec.prediction_type"] = {"epsilon": "epsilon", "v_prediction": "v"}[prediction]
    if unet.block_out_channels == (320, 640, 1280, 1280):
        second = "v2-512" if prediction == "epsilon" else "v2-768-v"
        version = "v1" if unet.cross_attention_dim == 768 else second
        spec["modelspec.architecture"] = f"stable-diffusion-{version}"
        spec["modelspec.implementation"] = "https://github.com/Stability-AI/stablediffusion"
    return spec


def _check_vocabulary(words: ClipTokenizer, config: ClipTextConfig) -> None:
    """A single file holds no vocabulary: the tools that open it take CLIP's own."""
    known = clip_tokenizer(config.vocab_size)
    own, clips = (json.loads(w.bpe.to_str())["model"] for w in (words, known))
    if any(own[key] != clips[key] for key in ("vocab", "merges")):
        raise ConfigError(
            "the text encoder's vocabulary is not CLIP's own, which is what single files are read"
            " with; keep this model as a folder"
        )
