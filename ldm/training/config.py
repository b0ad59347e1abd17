"""What a training run can be told: one schema for the options all stages share, and one a stage.

The names are those of the diffusers example scripts. One word means something stricter here:
`train_batch_size` is the number of pictures in an optimizer step **over all processes**, however
many there are and however the step is accumulated, so that a run does not depend on either.
Imports no torch: a misspelt key is refused before anything heavy loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.config import (
    AutoencoderConfig,
    ClipConfig,
    GradientCheckpointing,
    Prediction,
    ScheduleConfig,
    UNetConfig,
)
from ldm.errors import ConfigError


@dataclass(frozen=True)
class TrainingConfig:
    """Options of every stage.

    Attributes:
        output_dir: where checkpoints, logs and the finished model go.
        train_data_dir: a folder of pictures, of tars or of parquet files, a WebDataset tar, a glob
            or brace pattern of tars or their addresses, or `flowers` (procedural).
        dataset_name: a data set of the Hugging Face hub instead, or a folder of such a layout.
        dataset_config_name: its configuration, where it has several.
        image_column: the picture's column in parquet files and data sets of the hub.
        caption_column: the caption's name in such columns, in metadata.jsonl, and in the .json of a
            shard.
        caption_extension: of the caption files that lie beside pictures.
        validation_split: share of the data that is kept back for the validation loss, where it
            has no folders `train` and `validation` of its own; 0 validates on training samples.
        max_train_samples: use only so many samples; all when not given.
        on_bad_sample: a picture or caption that cannot be read is named, and ends the run (`stop`),
            or another sample takes its place (`skip`).
        shard_cache_gb: shards that are streamed from elsewhere are kept on this machine's disk up
            to so many gigabytes a process.
        resolution: side of the training pictures, in pixels; of a square of the same area with
            `enable_bucket`.
        enable_bucket: keep each picture's shape as nearly as sides in steps of `bucket_reso_steps`
            allow; a batch has pictures of one shape.
        min_bucket_reso: least side of a bucket.
        max_bucket_reso: greatest side of a bucket.
        bucket_reso_steps: what sides of buckets are multiples of.
        bucket_no_upscale: a small picture goes into a smaller bucket instead of being enlarged.
        center_crop: crop the centre of a picture; a random part when off.
        random_flip: mirror every second picture.
        image_interpolation_mode: how pictures are resized.
        seed: of every random number of the run.
        train_batch_size: pictures in an optimizer step, over all processes and accumulation.
        gradient_accumulation_steps: pieces in which each process works through its share.
        max_train_steps: optimizer steps.
        learning_rate: after warm-up.
        lr_scheduler: what the learning rate does after warm-up; zero is where it would be after
            the last step.
        lr_warmup_steps: optimizer steps of linear warm-up.
        lr_decay_steps: at a `constant` rate, go down to zero along a line over the last so many
            steps; until they begin, the run may be resumed with more steps than it was begun with.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_weight_decay: decoupled weight decay.
        adam_epsilon: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: what the forward pass computes in; weights are always float32.
        on_non_finite: a step with an infinite or undefined loss or gradient never changes the
            weights: it is left out and counted (`skip`; ten in a row end the run), or ends the run.
        gradient_checkpointing: recompute activations instead of keeping them: all (`true`), in a
            third more time and least memory, or those that cost hardly any time (`selective`),
            more than a third of it.
        torch_compile: compile the trained networks; the first step takes minutes. It pays on a GPU.
        use_ema: save an exponential moving average of the weights as the model.
        ema_decay: of that average, after its own warm-up.
        dataloader_num_workers: processes that read and prepare pictures.
        checkpointing_steps: optimizer steps between checkpoints.
        checkpoints_total_limit: how many checkpoints to keep; all when not given.
        resume_from_checkpoint: `latest`, or a checkpoint's folder.
        validation_steps: optimizer steps between validations, each with its sample grid.
        validation_samples: pictures in the validation loss.
        logging_steps: optimizer steps between writes of metrics.jsonl and the trackers.
        report_to: an Accelerate tracker, such as `tensorboard` or `wandb`; or `none`.
    """

    output_dir: Path = Path("outputs/model")
    train_data_dir: str = "flowers"
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    caption_extension: str = ".txt"
    validation_split: float = 0.05
    max_train_samples: int | None = None
    on_bad_sample: Literal["stop", "skip"] = "stop"
    shard_cache_gb: float = 50.0
    resolution: int = 64
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    center_crop: bool = True
    random_flip: bool = False
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "lanczos"
    seed: int = 42
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 10_000
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 500
    lr_decay_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    on_non_finite: Literal["skip", "stop"] = "skip"
    gradient_checkpointing: GradientCheckpointing = False
    torch_compile: bool = False
    use_ema: bool = True
    ema_decay: float = 0.999
    dataloader_num_workers: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 3
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    validation_samples: int = 256
    logging_steps: int = 10
    report_to: str | None = "tensorboard"

    def __post_init__(self) -> None:
        positive = (
            "resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
            "learning_rate", "max_grad_norm", "checkpointing_steps", "validation_steps",
            "validation_samples", "logging_steps", "shard_cache_gb", "min_bucket_reso",
            "max_bucket_reso", "bucket_reso_steps",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:  # nor NaN
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("checkpoints_total_limit", "max_train_samples"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ConfigError(f"{name} is {number}; it must be positive, or left out for all")
        for name in (
            "dataloader_num_workers", "lr_warmup_steps", "lr_decay_steps", "adam_weight_decay",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.lr_decay_steps and self.lr_scheduler != "constant":
            raise ConfigError(
                f"lr_decay_steps goes with lr_scheduler constant; {self.lr_scheduler} decays anyway"
            )
        for name in ("validation_split", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train_batch_size {self.train_batch_size} cannot be split into"
                f" gradient_accumulation_steps {self.gradient_accumulation_steps} equal pieces"
            )


@dataclass(frozen=True)
class VaeTraining(TrainingConfig):
    """Options of the `vae` stage: L1 + KL + perceptual + adversarial loss (Esser et al. 2021).

    Attributes:
        vae: the autoencoder to train from scratch; not looked at where the next option brings one.
        pretrained_model_name_or_path: a model whose autoencoder to train on instead.
        decoder_only: leave the encoder and the latents' scale as they are, so that a U-Net trained
            on these latents stays valid.
        rec_loss: the reconstruction loss, a mean over pixels and channels.
        kl_scale: weight of the KL divergence, a mean over pixels and channels likewise.
        perceptual_scale: weight of LPIPS (needs the `lpips` package and its VGG weights).
        disc_start: the optimizer step at which the discriminator joins; never when not given.
        disc_scale: weight of the adversarial loss, times the adaptive weight.
        disc_learning_rate: of the discriminator; that of the autoencoder when not given.
    """

    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    pretrained_model_name_or_path: str | None = None
    decoder_only: bool = False
    rec_loss: Literal["l1", "l2"] = "l1"
    kl_scale: float = 1e-6
    perceptual_scale: float = 0.0
    disc_start: int | None = None
    disc_scale: float = 0.5
    disc_learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pretrained_model_name_or_path:
            check_sides(self, self.vae.downsample_factor)
        if self.mixed_precision == "fp16" and self.disc_start is not None:
            raise ConfigError("two optimizers cannot share one fp16 loss scale; use bf16")
        if self.disc_start is not None and self.gradient_accumulation_steps > 1:
            raise ConfigError(
                "the adversarial loss is weighed by the gradients of the whole batch, so it cannot"
                " be accumulated; set gradient_accumulation_steps to 1"
            )
        if self.torch_compile and self.disc_start is not None:
            raise ConfigError(
                "the adversarial loss is differentiated twice, and compiled networks do not allow"
                " that; turn torch_compile off"
            )
        if self.decoder_only and not self.pretrained_model_name_or_path:
            raise ConfigError(
                "decoder_only needs the encoder of a trained model; set"
                " pretrained_model_name_or_path"
            )


@dataclass(frozen=True)
class ClipTraining(TrainingConfig):
    """Options of the `clip` stage: the symmetric contrastive loss (Radford et al. 2021).

    Attributes:
        text_encoder_lr: learning rate of the text tower; learning_rate when not given. A slow text
            tower keeps a caption's words apart, where a fast one learns every phrase by heart: its
            U-Net then draws "a yellow rose" only if it has seen one.
        clip: the two towers and the vocabulary.
    """

    text_encoder_lr: float | None = None
    clip: ClipConfig = field(default_factory=ClipConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoder_lr is not None and self.text_encoder_lr < 0:
            raise ConfigError(f"text_encoder_lr is {self.text_encoder_lr}; it must be 0 or more")
        if self.enable_bucket:
            raise ConfigError("the towers of CLIP see squares of one size; turn enable_bucket off")
        if self.resolution != self.clip.image_size:
            raise ConfigError(
                f"resolution {self.resolution} and clip.image_size {self.clip.image_size} differ;"
                " make them equal"
            )
        if self.gradient_accumulation_steps > 1:
            raise ConfigError(
                "the contrastive loss compares every pair of a batch, so it cannot be accumulated;"
                " set gradient_accumulation_steps to 1"
            )


@dataclass(frozen=True)
class UNetTraining(TrainingConfig):
    """Options of the `unet` stage: the diffusion objective with frozen VAE and text encoder.

    Attributes:
        pretrained_model_name_or_path: the model whose VAE and text encoder are used, and whose
            U-Net and noise schedule are trained on, unless the options below say otherwise.
        pretrained_vae_model_name_or_path: take the VAE from this model or checkpoint instead.
        pretrained_text_encoder_name_or_path: take the text encoder from here instead.
        unet: a U-Net to train from scratch.
        schedule: the noise schedule of a U-Net trained from scratch.
        prediction_type: what the U-Net learns to predict, instead of what its schedule says.
        rescale_betas_zero_snr: let the schedule end at pure noise, and draw from there with
            `trailing` spacing (Lin et al. 2024); not with epsilon, of which pure noise tells all.
        proportion_empty_prompts: captions dropped to "", so that guidance has its other half; 1
            leaves a U-Net that has classes nothing but them.
        loss_type: the distance that is descended: `l2` (the paper's), `l1`, or `huber`.
        huber_c: where the Huber loss turns from the parabola of `l2` into a line.
        snr_gamma: weigh the loss by min-SNR-gamma (Hang et al. 2023); 5 is the paper's choice.
        noise_offset: adds noise of this strength that is the same all over a channel, so that the
            model learns very dark and very bright pictures; 0.1 is usual.
        input_perturbation: adds noise of this strength to the noise that is seen, not to the one
            that is predicted (Ning et al. 2023); 0.1 is the paper's choice.
        stratified_timesteps: spread the timesteps of a batch evenly over the schedule.
        vlb_weight: of the variational bound, where the U-Net predicts its variance too, having
            twice as many channels out as in (Nichol and Dhariwal 2021); 0.001 is the paper's.
        class_column: where the sample's class comes from, if the U-Net has `num_class_embeds`:
            a column of whole numbers, or `folder`.
        class_dropout_prob: classes dropped likewise, together with the captions.
        cache_latents: encode every picture and caption once, onto disk, before the first step.
        latent_cache_dir: where that cache lies, for several runs to share; in the output folder
            when not given.
        fsdp: share out weights, gradients and optimizer over the processes (FSDP2), for a U-Net
            that does not fit one device.
        validation_prompts: what the sample grids draw; captions of the data when not given.
        validation_class_labels: their classes, one for all or one a prompt; without prompts of
            your own, the data's.
        num_validation_images: pictures a prompt in the sample grids.
        guidance_scale: of the sample grids, and the finished model's own default.
        num_inference_steps: of the sample grids, and the finished model's own default.
    """

    pretrained_model_name_or_path: str = "flowers"
    pretrained_vae_model_name_or_path: str | None = None
    pretrained_text_encoder_name_or_path: str | None = None
    unet: UNetConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction_type: Prediction | None = None
    rescale_betas_zero_snr: bool = False
    proportion_empty_prompts: float = 0.1
    loss_type: Literal["l2", "l1", "huber"] = "l2"
    huber_c: float = 0.1
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    stratified_timesteps: bool = False
    vlb_weight: float = 1e-3
    class_column: str | None = None
    class_dropout_prob: float = 0.1
    cache_latents: bool = False
    latent_cache_dir: Path | None = None
    fsdp: bool = False
    validation_prompts: tuple[str, ...] = ()
    validation_class_labels: tuple[int, ...] = ()
    num_validation_images: int = 4
    guidance_scale: float = 7.5
    num_inference_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fsdp and self.mixed_precision == "fp16":
            raise ConfigError("fsdp cannot share out the loss scale of fp16; use bf16 or no")
        for name in ("noise_offset", "input_perturbation", "vlb_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("num_validation_images", "num_inference_steps", "snr_gamma", "huber_c"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ConfigError(f"{name} is {number}; it must be positive")
        if self.num_inference_steps > self.schedule.num_train_timesteps:
            raise ConfigError(
                f"num_inference_steps is {self.num_inference_steps}, more than the schedule's"
                f" num_train_timesteps {self.schedule.num_train_timesteps}"
            )
        if self.unet is None and self.schedule != ScheduleConfig():
            raise ConfigError(
                "schedule belongs to a U-Net trained from scratch, and without unet the U-Net and"
                " schedule of pretrained_model_name_or_path are trained on; leave schedule out"
            )
        for name in ("proportion_empty_prompts", "class_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.cache_latents and not self.center_crop:
            raise ConfigError("cache_latents keeps one crop of a picture; turn center_crop on")


def check_sides(config: TrainingConfig, factor: int) -> None:
    """Refuse pictures, in pixels, that the VAE's downsampling factor does not divide.

    Raises:
        ConfigError: it leaves a rest.
    """
    for name in ("resolution", "bucket_reso_steps") if config.enable_bucket else ("resolution",):
        if (side := getattr(config, name)) % factor:
            raise ConfigError(
                f"{name} {side} is not a multiple of {factor}, the VAE's downsampling factor"
            )


STAGES: dict[str, type[TrainingConfig]] = {
    "vae": VaeTraining,
    "clip": ClipTraining,
    "unet": UNetTraining,
}


def learning_rate_at(config: TrainingConfig, step: int, base: float | None = None) -> float:
    """The learning rate of optimizer step `step` (0 the first): a pure function, nothing to save.

    Linear warm-up, then constant up to the last `lr_decay_steps`, or down to zero along a line or
    half a cosine.
    """
    from math import cos, pi

    base = config.learning_rate if base is None else base
    warmup = min(config.lr_warmup_steps, config.max_train_steps)
    if step < warmup:
        return base * (step + 1) / warmup
    done = (step - warmup) / max(config.max_train_steps - warmup, 1)
    constant = min(1.0, (config.max_train_steps - step) / max(config.lr_decay_steps, 1))
    decay = {"constant": constant, "linear": 1 - done, "cosine": 0.5 * (1 + cos(pi * done))}
    return base * decay[config.lr_scheduler]


# Options that may change between a run and its resumption without changing what is learnt.
FREE = {
    "output_dir", "train_data_dir", "dataset_name", "on_bad_sample", "shard_cache_gb",
    "on_non_finite", "torch_compile", "cache_latents", "latent_cache_dir", "fsdp",
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path",
    "pretrained_text_encoder_name_or_path", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "validation_steps", "validation_samples", "validation_prompts",
    "num_validation_images", "validation_class_labels",
    "logging_steps", "report_to", "dataloader_num_workers",
    "gradient_accumulation_steps", "gradient_checkpointing", "guidance_scale",
    "num_inference_steps",
}  # fmt: skip
LEARNING_RATE = {"lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "max_train_steps"}


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as `plain`, its nested options by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in plain(options).items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def plain(value: Any) -> Any:
    """A configuration as JSON gives it back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
