"""A text-to-image model: its parts, where they are, what changes them; pictures <-> latents.

Legend: b pictures, l channels of the latents, h w their height and width, H W the pictures' own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ldm.checkpoint.adapters import Adapters
from ldm.checkpoint.folder import ModelParts, load_folder, save_folder
from ldm.checkpoint.io import tensors_sha256
from ldm.checkpoint.locate import locate_model
from ldm.checkpoint.single_file import load_single_file
from ldm.config import AutoencoderConfig, EngineName, Prediction, UNetConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.engine import Engine
from ldm.engine.quantized import Quantization
from ldm.errors import ConfigError
from ldm.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.banded import BandedAutoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)


class _Part(Generic[Module]):
    """A network that an engine works for: who asks for it gets it with its weights in it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Model, owner: type) -> Module:
        return model._engines[self.name].lend()  # type: ignore[return-value]

    def __set__(self, model: Model, network: Module) -> None:
        model._engines[self.name] = Engine(network, model.engine)
        setattr(model, f"_{self.name}", network)


class Model:
    """The four parts, read and written, moved, adapted, and the VAE's two ways.

    Args:
        unet: predicts what the schedule's `prediction_type` says.
        vae: latents to pictures.
        text_encoder: prompts to context.
        schedule: the noise schedule that the U-Net was trained with.
        defaults: `num_inference_steps` and `guidance_scale` that suit this model.
        engine: what computes: `plain`, the modules as they are; `fast`, the same prepared for the
            device; or `compiled`, after a build of its own. See `ldm.engine`.

    Raises:
        ConfigError: the parts do not fit each other.
    """

    # These hand the networks out, with their weights. `_unet` and `_vae` are the same modules,
    # whose weights an engine may have just now: for their configuration, device and dtype.
    unet = _Part[UNet]()
    vae = _Part[AutoencoderKL]()
    _unet: UNet
    _vae: AutoencoderKL

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text_encoder: TextEncoder,
        schedule: NoiseSchedule,
        *,
        defaults: Mapping[str, Any] | None = None,
        engine: EngineName = "fast",
    ):
        check_parts(unet, vae, text_encoder, schedule)
        self._engine: EngineName = engine
        self._engines: dict[str, Engine] = {}
        self._exact = True
        self.unet, self.vae, self.text_encoder, self.schedule = unet, vae, text_encoder, schedule
        self.defaults = {"num_inference_steps": 50, "guidance_scale": 7.5} | dict(defaults or {})
        self._adapters = Adapters(unet, text_encoder)
        self._offload: torch.device | None = None
        self._banded: BandedAutoencoder | None = None
        self._slicing = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        engine: EngineName = "fast",
    ) -> Self:
        """Open a model: a folder in the diffusers layout, a single `.safetensors` or `.ckpt` file,
        `flowers`, or an `owner/name` of the hub.

        Args:
            pretrained_model_name_or_path: which model.
            torch_dtype: what the model computes in.
            variant: `fp16` reads the `.fp16.safetensors` files of a folder.
            revision: branch, tag or commit on the hub.
            local_files_only: never ask the network.
            engine: what computes, as of `Model`.

        Raises:
            ConfigError: there is no such model, or its parts do not fit each other.
            CheckpointError: the model is incomplete, damaged, or of a kind that ldm has not.
        """
        model = locate_model(
            pretrained_model_name_or_path,
            variant=variant,
            revision=revision,
            local_files_only=local_files_only,
        )
        if model.is_file():
            return cls.from_single_file(model, torch_dtype=torch_dtype, engine=engine)
        return cls._of(load_folder(model, dtype=torch_dtype, variant=variant), engine)

    @classmethod
    def from_single_file(
        cls,
        file: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        prediction_type: Prediction | None = None,
        config: str | Path | None = None,
        ema: bool | None = None,
        engine: EngineName = "fast",
    ) -> Self:
        """Open a single file of Stable Diffusion 1.x or 2.x, or one that ldm has written.

        Args:
            file: `.safetensors` or `.ckpt`.
            torch_dtype: what the model computes in.
            prediction_type: what the U-Net predicts, where neither the file nor a YAML says.
            config: the YAML that came with the file; the one beside it when not given.
            ema: whether to draw with the averaged weights; with them if there are any when None.
            engine: what computes, as of `Model`.

        Raises:
            CheckpointError: the file is damaged, of another kind of model, or its prediction type
                is not known; see `ldm.checkpoint.single_file`.
        """
        parts = load_single_file(
            file, prediction_type=prediction_type, config=config, ema=ema, dtype=torch_dtype
        )
        return cls._of(parts, engine)

    @classmethod
    def _of(cls, parts: ModelParts, engine: EngineName) -> Self:
        networks = (parts.unet, parts.vae, parts.text_encoder)
        model = cls(*networks, parts.schedule, defaults=parts.defaults, engine=engine)
        for each in model._engines.values():  # one whose weights share memory cannot move them
            places = [weight.data_ptr() for weight in each.network.parameters()]
            each.own = len(set(places)) == len(places)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a model folder that ldm and diffusers open, in the dtype that the weights have.

        Each component's folder is written whole or not at all, and the index last.
        """
        self._check_exact()
        self._release()
        networks = (self._unet, self._vae, self.text_encoder)
        save_folder(ModelParts(*networks, self.schedule, self.defaults), Path(save_directory))

    def to(self, *args: Any, **options: Any) -> Self:
        """Move the models to a device, a dtype or both, as `torch.nn.Module.to`; returns itself.

        Raises:
            ConfigError: this machine has no such device.
        """
        _check_place(*args, **options)
        if any(isinstance(where, str | torch.device) for where in (*args, *options.values())):
            self._offload = None
        self._release()
        for model in (self._unet, self._vae, self.text_encoder):
            model.to(*args, **options)
        return self

    @property
    def engine(self) -> EngineName:
        """What computes, as of `Model`; another one begins with the next picture."""
        return self._engine

    @engine.setter
    def engine(self, name: EngineName) -> None:
        self._release()
        made = {p: Engine(each.network, name, own=each.own) for p, each in self._engines.items()}
        self._engine, self._engines = name, made

    @property
    def device(self) -> torch.device:
        """Where the pipeline draws."""
        return self._offload or next(self._unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in."""
        return next(self._unet.parameters()).dtype

    @property
    def components(self) -> dict[str, Any]:
        """The parts, by the names of `__init__`: `LatentDiffusionPipeline(**pipe.components)`."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "schedule": self.schedule,
            "defaults": self.defaults,
        }

    def component_hashes(self) -> dict[str, str]:
        """SHA-256 of each network's tensors, by the names of `components`; adapters included."""
        self._release()
        parts = {"unet": self._unet, "vae": self._vae, "text_encoder": self.text_encoder}
        return {name: tensors_sha256(part.state_dict()) for name, part in parts.items()}

    def load_lora_weights(
        self, file: str | Path, weight: float = 1.0, name: str | None = None
    ) -> str:
        """Merge a LoRA file into the weights; see `ldm.checkpoint.adapters.Adapters.add_lora`."""
        self._check_exact()
        self._release()
        return self._adapters.add_lora(file, weight, name)

    def unload_lora_weights(self, name: str | None = None) -> None:
        """Take one LoRA, or all of them, out again: the weights are what they were, in bits."""
        self._check_exact()
        self._release()
        self._adapters.remove_lora(name)

    def load_textual_inversion(self, file: str | Path, token: str | None = None) -> str:
        """Teach the text encoder a word; see `Adapters.add_textual_inversion`."""
        return self._adapters.add_textual_inversion(file, token)

    def unload_textual_inversion(self, token: str | None = None) -> None:
        """Forget one such word, or all of them."""
        self._adapters.remove_textual_inversion(token)

    def quantize(self, how: Quantization) -> None:
        """Have the U-Net's transformer blocks multiply in 8 bits; see `ldm.engine.quantized`.

        On a CPU it gains time with the engine `compiled` alone. Load adapters before.

        Raises:
            ConfigError: torchao is not installed, or this device cannot do it.
        """
        from ldm.engine.quantized import quantized

        self._check_exact()
        self.unet, self._exact = quantized(self.unet, how), False

    def enable_vae_tiling(self, tile: int = 32) -> None:
        """Encode and decode in bands of rows, which changes no picture: see `ldm.models.banded`.

        Args:
            tile: a band has as many pixels as a square tile of this side, in latent pixels.

        Raises:
            ConfigError: `tile` is not positive.
        """
        if tile < 1:
            raise ConfigError(f"tile is {tile}; it must be 1 or more")
        self._engines["vae"].release()
        self._banded = BandedAutoencoder(self._vae, tile)

    def disable_vae_tiling(self) -> None:
        """Encode and decode pictures whole again."""
        self._banded = None

    def enable_vae_slicing(self) -> None:
        """Encode and decode one picture at a time."""
        self._slicing = True

    def disable_vae_slicing(self) -> None:
        """Encode and decode a batch at a time again."""
        self._slicing = False

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep every part on the CPU but for the time that it works on this device.

        Raises:
            ConfigError: this machine has no such device.
        """
        _check_place(device)
        self.to("cpu")
        self._offload = torch.device(device)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Scaled latents b l h w to pictures.

        Args:
            latents: on any device.
            output_type: as of a call.

        Raises:
            ConfigError: they are not finite, as when the U-Net overflows in half precision.
        """
        if output_type == "latent":
            return latents
        if wrong := _not_finite(latents):
            raise ConfigError(
                f"picture {wrong[0]} of the batch: the U-Net's numbers are not finite in"
                f" {self.dtype}; draw in float32, or look at the weights and the settings"
            )
        pieces = self._sliced(self._vae.unscale(latents))
        images = torch.cat([self._through_vae(lambda vae, x: vae.decode(x), x) for x in pieces])
        if output_type == "pil":
            return to_pil(images)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures b 3 H W in [-1, 1] to their likeliest scaled latents b l h w, on the CPU."""
        pieces = self._sliced(pixels)
        raw = [self._through_vae(lambda vae, x: vae.encode(x).mode(), x) for x in pieces]
        return self._vae.scale(torch.cat(raw)).cpu()

    @property
    def unet_config(self) -> UNetConfig:
        """The U-Net's shape."""
        return self._unet.config

    @property
    def vae_config(self) -> AutoencoderConfig:
        """The autoencoder's shape."""
        return self._vae.config

    def latent_shape(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Shape l h w of the latents of a picture of this size in pixels, or of the model's."""
        factor, side = self.vae_config.downsample_factor, self.unet_config.sample_size
        h, w = (side if size is None else size // factor for size in (height, width))
        return self.vae_config.latent_channels, h, w

    def _sliced(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(1 if self._slicing else len(x))

    def _through_vae(self, work: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """What the VAE makes of x, float32; where half precision overflows, made in float32."""
        dtype = next(self._vae.parameters()).dtype
        with self._at_work("vae") as vae:
            result = work(vae, x.to(self.device, dtype)).float()
            wrong = _not_finite(result)
            if wrong and dtype != torch.float32:
                logger.warning("the VAE overflows in %s; picture %s goes in float32", dtype, wrong)
                self._engines["vae"].release()
                self._vae.float()  # half precision survives the way there and back
                try:
                    plain = self._banded or self._vae
                    result[wrong] = work(plain, x[wrong].to(self.device, torch.float32))
                finally:
                    self._vae.to(dtype)
        if _not_finite(result):
            raise ConfigError("the VAE's numbers are not finite; its weights are damaged")
        return result

    @contextmanager
    def _at_work(self, name: str) -> Iterator[Any]:
        """What computes for a part; with CPU offload, it is on the device for this long only."""
        if name == "vae" and self._banded is not None:
            part, instead = self._vae, self._banded
        elif name == "text_encoder":
            part = instead = self.text_encoder
        else:
            engine = self._engines[name]
            part = engine.network
            instead = part if self._offload else engine.ready()
        try:
            if self._offload is not None:
                part.to(self._offload)
            yield instead
        finally:
            if self._offload is not None:
                part.to("cpu")

    def _check_exact(self) -> None:
        if not self._exact:
            raise ConfigError(
                "the U-Net is in 8 bits now; save it, and load or unload adapters, before quantize"
            )

    def _release(self) -> None:
        """Give the networks their weights, which the engines may have."""
        for engine in self._engines.values():
            engine.release()


def _not_finite(batch: Tensor) -> list[int]:
    """The places in a batch where not all numbers are finite."""
    return (~batch.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()


def _check_place(*args: Any, **options: Any) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(0).to(*args, **options)
    except (RuntimeError, AssertionError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(f"cannot move the model there: {said}") from None


def check_parts(
    unet: UNet, vae: AutoencoderKL, text_encoder: TextEncoder, schedule: NoiseSchedule
) -> None:
    """Refuse a U-Net that does not fit the VAE's latents, the text encoder's width or the schedule.

    Raises:
        ConfigError: they differ; the line says in what.
    """
    channels = vae.config.latent_channels
    inputs, outputs = unet.config.in_channels, unet.config.out_channels
    variance = schedule.config.variance_type
    means = outputs / (2 if variance == "learned_range" else 1)
    if means != channels or inputs not in (channels, 2 * channels + 1):
        raise ConfigError(
            f"the U-Net takes {inputs} channels and gives {outputs}, but the VAE's latents have"
            f" {channels}; ldm draws with {channels} in, or {2 * channels + 1} for inpainting; and"
            f" {channels} out, or {2 * channels} with variance_type learned_range, not {variance}"
        )
    if unet.config.cross_attention_dim != text_encoder.dim:
        raise ConfigError(
            f"unet.cross_attention_dim is {unet.config.cross_attention_dim} but the text encoder's"
            f" width is {text_encoder.dim}; make them equal"
        )
