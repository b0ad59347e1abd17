"""The shapes of every model and of the noise schedule, as frozen dataclasses. Imports no torch.

Field names are those of the diffusers configuration files where such a file exists, because that
is the format of our model folders. Each class checks itself when it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ldm.errors import ConfigError, suggest

Prediction = Literal["epsilon", "v_prediction", "sample"]
LongPrompts = Literal["truncate", "chunk"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]  # of DDPM's steps
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "cosine_signal_rates"]
Spacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "beta"]
TIMESTEP_SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")
"""The spacings that choose timesteps; the others choose sigmas."""
SamplerName = Literal[
    "ddpm", "ddim", "plms", "euler", "euler_a", "heun", "lms", "dpm2", "dpmpp_2s_a", "dpmpp_sde",
    "dpmpp_2m", "dpmpp_2m_sde", "unipc",
]  # fmt: skip


EngineName = Literal["plain", "fast", "compiled"]
"""What computes: the modules as they are; the same, prepared for the device; or built for it."""
GradientCheckpointing = bool | Literal["selective"]
"""What training recomputes in its backward pass: all or nothing, or only what costs little."""


@dataclass(frozen=True)
class UNetConfig:
    """The cross-attention U-Net of Latent Diffusion (Rombach et al. 2022); defaults are SD 1.5.

    Attributes:
        sample_size: side of the latents it is trained on, in latent pixels.
        in_channels: latent channels in; 9 for inpainting models.
        out_channels: latent channels out; twice as many where it predicts its variance, too.
        block_out_channels: width of each resolution level, finest first.
        layers_per_block: residual blocks a level (the decoder has one more).
        cross_attention: which levels have transformer blocks, finest first.
        transformer_layers_per_block: transformer blocks after each residual block.
        cross_attention_dim: width of the text context.
        num_attention_heads: heads by count, one number for all levels or one a level.
        attention_head_dim: heads by width instead; give one of the two.
        use_linear_projection: linear layers around the transformer (SD 2.x), 1x1 convs otherwise.
        upcast_attention: carried for SD 2.1's folders; attention here always accumulates in fp32.
        norm_num_groups: groups of every group normalisation.
        norm_eps: epsilon of the residual blocks' group normalisation.
        num_class_embeds: rows of a table of classes whose entries join the time embedding; the last
            one stands for no class. There is no such table when not given.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    transformer_layers_per_block: int = 1
    cross_attention_dim: int = 768
    num_attention_heads: int | tuple[int, ...] | None = None
    attention_head_dim: int | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        if len(self.cross_attention) != len(self.block_out_channels):
            raise ConfigError(
                f"unet: cross_attention has {len(self.cross_attention)} entries and"
                f" block_out_channels {len(self.block_out_channels)}; give one a level"
            )
        if (self.num_attention_heads is None) == (self.attention_head_dim is None):
            raise ConfigError(
                "unet: give num_attention_heads or attention_head_dim, one of the two"
            )
        numbers = ("sample_size", "in_channels", "out_channels", "layers_per_block")
        _check_positive("unet", self, *numbers, "transformer_layers_per_block")
        _check_positive("unet", self, "cross_attention_dim", "norm_num_groups")
        _check_groups("unet", self.block_out_channels, self.norm_num_groups)
        if self.num_class_embeds is not None and self.num_class_embeds < 2:
            raise ConfigError(
                f"unet: num_class_embeds is {self.num_class_embeds}; give one more than there are"
                " classes, for no class has a row, too"
            )
        if (head_width := self.attention_head_dim) is not None:
            _check_positive("unet", self, "attention_head_dim")
        used = (*self.cross_attention[:-1], True)  # the middle block has attention in any case
        for width, heads, here in zip(self.block_out_channels, self.heads, used, strict=True):
            if here and (heads < 1 or width != heads * (head_width or width // heads)):
                parts = f"heads of width {head_width}" if head_width else f"{heads} heads"
                raise ConfigError(f"unet: a width of {width} cannot be split into {parts}")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads at each level, finest first."""
        if self.attention_head_dim is not None:
            return tuple(
                max(width // self.attention_head_dim, 1) for width in self.block_out_channels
            )
        if isinstance(self.num_attention_heads, int):
            return (self.num_attention_heads,) * len(self.block_out_channels)
        heads = tuple(self.num_attention_heads or ())
        if len(heads) != len(self.block_out_channels):
            raise ConfigError(
                f"unet: num_attention_heads has {len(heads)} entries and block_out_channels"
                f" {len(self.block_out_channels)}; give one number, or one a level"
            )
        return heads


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL-regularised autoencoder of Latent Diffusion; defaults are Stable Diffusion's (f8).

    Attributes:
        in_channels: channels of a picture in.
        out_channels: channels of a picture out.
        latent_channels: channels of the latents.
        block_out_channels: width of each level, finest first; n levels shrink by 2 ** (n - 1).
        layers_per_block: residual blocks a level (the decoder has one more).
        norm_num_groups: groups of every group normalisation.
        sample_size: side of the training pictures, in pixels.
        scaling_factor: what the raw latents are multiplied by to have unit variance.
        shift_factor: what is subtracted from the raw latents before that.
        mid_block_add_attention: one self-attention at the lowest resolution.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        numbers = ("in_channels", "out_channels", "latent_channels", "layers_per_block")
        _check_positive("vae", self, *numbers, "norm_num_groups", "sample_size")
        _check_groups("vae", self.block_out_channels, self.norm_num_groups)
        if self.scaling_factor <= 0:
            raise ConfigError(f"vae: scaling_factor is {self.scaling_factor}; it must be positive")

    @property
    def downsample_factor(self) -> int:
        """Picture pixels to one latent pixel, along a side: the f of f4 and f8."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process q(x_t | x_0) and what the network predicts of it.

    Attributes:
        num_train_timesteps: T, the length of the discrete chain.
        beta_schedule: `linear` (DDPM), `scaled_linear` (Latent Diffusion: linear in the square
            root), `squaredcos_cap_v2` (improved DDPM), or `cosine_signal_rates` (the continuous
            cosine schedule of the Keras DDIM example, which the two rates below bound).
        beta_start: first beta, for the linear schedules.
        beta_end: last beta, for the linear schedules.
        min_signal_rate: sqrt(alpha_bar) at the noisiest time, for `cosine_signal_rates`.
        max_signal_rate: sqrt(alpha_bar) at the cleanest time, for `cosine_signal_rates`.
        prediction_type: what the network returns: epsilon, v_prediction or sample (x0).
        rescale_betas_zero_snr: shift the schedule to end at pure noise (Lin et al. 2024).
        timestep_spacing: which timesteps a sampler visits, unless it is told.
        steps_offset: what `leading` spacing adds to every timestep (1 in Stable Diffusion).
        set_alpha_to_one: whether a sampler's last step goes to sigma 0 or to timestep 0.
        clip_sample: clip the predicted x0 to [-1, 1]; for models that work on pixels.
        trained_betas: a table of T betas to use instead of a formula.
        variance_type: of DDPM's steps, unless it is told: beta tilde (`fixed_small`), beta
            (`fixed_large`), or between them as the network predicts (`learned_range`).
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    min_signal_rate: float = 0.02
    max_signal_rate: float = 0.95
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    trained_betas: tuple[float, ...] | None = None
    variance_type: Variance = "fixed_small"

    def __post_init__(self) -> None:
        for name, choices in (
            ("beta_schedule", BetaSchedule),
            ("prediction_type", Prediction),
            ("timestep_spacing", Spacing),
            ("variance_type", Variance),
        ):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ConfigError(
                    f"schedule: no {name} '{value}'; {suggest(value, get_args(choices))}"
                )
        if self.num_train_timesteps < 2:
            raise ConfigError(
                f"schedule: num_train_timesteps is {self.num_train_timesteps}; it must be 2 or more"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"schedule: need 0 < beta_start <= beta_end < 1, not {self.beta_start} and"
                f" {self.beta_end}"
            )
        if not 0 < self.min_signal_rate < self.max_signal_rate < 1:
            raise ConfigError(
                f"schedule: need 0 < min_signal_rate < max_signal_rate < 1, not"
                f" {self.min_signal_rate} and {self.max_signal_rate}"
            )


@dataclass(frozen=True)
class TowerConfig:
    """One transformer of a CLIP model."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.num_hidden_layers, self.num_attention_heads) < 1:
            raise ConfigError(
                "clip: hidden_size, num_hidden_layers and num_attention_heads must be 1 or more"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"clip: a width of {self.hidden_size} cannot be split into"
                f" {self.num_attention_heads} attention heads"
            )


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP model to train from scratch (Radford et al. 2021).

    Attributes:
        text: the text tower.
        vision: the vision tower.
        vocab_size: tokens kept of CLIP's own 49,408; the most frequent merges come first.
        max_position_embeddings: tokens a prompt can have, the start and end tokens included.
        projection_dim: width of the space in which pictures and captions meet.
        image_size: side of the pictures, in pixels.
        patch_size: side of the vision tower's patches, in pixels.
    """

    text: TowerConfig = field(default_factory=TowerConfig)
    vision: TowerConfig = field(default_factory=TowerConfig)
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    projection_dim: int = 128
    image_size: int = 64
    patch_size: int = 8

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(
                f"clip: image_size {self.image_size} is not a multiple of patch_size"
                f" {self.patch_size}"
            )
        if not 514 <= self.vocab_size <= 49408:
            raise ConfigError(
                f"clip: vocab_size is {self.vocab_size}; it must lie between 514 (single bytes and"
                " the two markers) and 49408 (all of CLIP's)"
            )


@dataclass(frozen=True)
class ModelPreset:
    """The three configurations that make a text-to-image model."""

    unet: UNetConfig
    vae: AutoencoderConfig
    schedule: ScheduleConfig


def check_size(height: int, width: int, factor: int) -> None:
    """Refuse a picture size in pixels that latents of this downsampling factor cannot have.

    Raises:
        ConfigError: a side is not a positive multiple; the line names the nearest that is.
    """
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            near = max(factor, round(side / factor) * factor)
            raise ConfigError(
                f"{name} is {side}; it must be a positive multiple of {factor}, such as {near}"
            )


def _check_positive(model: str, config: object, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ConfigError(f"{model}: {name} is {value}; it must be 1 or more")


def _check_groups(model: str, widths: tuple[int, ...], groups: int) -> None:
    bad = [width for width in widths if width % groups]
    if not widths or bad:
        raise ConfigError(
            f"{model}: block_out_channels {widths} must be multiples of norm_num_groups {groups}"
        )


PRESETS: dict[str, ModelPreset] = {
    "flowers": ModelPreset(
        UNetConfig(
            sample_size=16,
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            cross_attention=(False, True, False),
            cross_attention_dim=128,
            attention_head_dim=32,
            norm_num_groups=16,
        ),
        AutoencoderConfig(
            block_out_channels=(32, 48, 96), layers_per_block=1, norm_num_groups=16, sample_size=64
        ),
        ScheduleConfig(timestep_spacing="trailing"),
    ),
    "sd15": ModelPreset(UNetConfig(num_attention_heads=8), AutoencoderConfig(), ScheduleConfig()),
    "sd21": ModelPreset(
        UNetConfig(cross_attention_dim=1024, attention_head_dim=64, use_linear_projection=True),
        AutoencoderConfig(),
        ScheduleConfig(),
    ),
    "sd21-v": ModelPreset(
        UNetConfig(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=64,
            use_linear_projection=True,
            upcast_attention=True,
        ),
        AutoencoderConfig(sample_size=768),
        ScheduleConfig(prediction_type="v_prediction"),
    ),
}
