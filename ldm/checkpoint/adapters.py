"""Small files that change a model, LoRA and textual inversion, of whichever tool wrote them.

A LoRA is merged into the weights; a textual inversion becomes a word that the text encoder knows.
Both can be taken out again, and the weights are then what they were, bit for bit.

A file's names are looked up among the model's own modules, and every shape is compared, before
anything changes: an error leaves the model untouched.

Sources: Hu et al. 2021, LoRA, section 4.1; Gal et al. 2022, An Image is Worth One Word, section 3.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.checkpoint.io import read_json, read_pickle, read_tensors
from ldm.checkpoint.names import unet_to_theirs
from ldm.errors import CheckpointError, ConfigError, suggest
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet

IN_FOLDERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL"}  # by the width of the text encoder

# kohya `.lora_down` and `.alpha`; PEFT `.lora_A`, with or without an adapter's name; diffusers, one
# after the other, `_lora.down`, `.lora.down` and `.lora_linear_layer.down`
KEY = re.compile(
    r"(.+?)(?:(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(down|up|mid|A|B)(?:\.[^.]+)?\.weight"
    r"|(?:[._]lora|\.lora_linear_layer)?\.alpha)"
)
ROLES = {"A": "down", "B": "up", None: "alpha"}
OTHER_KINDS = {
    r"\.(dora_scale|lora_magnitude_vector)": "a DoRA",
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.oft_": "an OFT",
    r"^(lora_te2_|text_encoder_2\.)": "a LoRA for SDXL",
}
# what diffusers' first LoRAs called attention's projections
OLD_ENDS = {
    ".to_out.0": ".to_out",
    ".self_attn.q_proj": ".self_attn.to_q",
    ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v",
    ".self_attn.out_proj": ".self_attn.to_out",
}


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to the weight of one layer: scale * up @ down.

    Args:
        down: `r in`, or `r in kh kw` of a convolution; r is the rank.
        up: `out r`, or `out r 1 1`.
        scale: alpha / r.
        mid: `r r kh kw`, the middle of a convolution in Tucker's form, whose down is 1x1.
    """

    down: Tensor
    up: Tensor
    scale: float
    mid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is made for."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return (len(self.up), self.down.shape[1], *kernel)

    def delta(self) -> Tensor:
        """What it adds, in float32: of convolutions in a row, the one that equals them."""
        up, down = self.up.flatten(1).float(), self.down.flatten(1).float()
        if self.mid is None:
            product = up @ down
        else:
            product = torch.einsum("o p, p q h w, q i -> o i h w", up, self.mid.float(), down)
        return self.scale * product.reshape(self.shape)


def read_lora(file: str | Path) -> dict[str, LoraLayer]:
    """Reads a LoRA of kohya, of diffusers, old or new, or of PEFT.

    Args:
        file: .safetensors, .pt or .bin; or a folder with diffusers' or PEFT's file.

    Returns:
        The layers, by the names that the file has for the modules.

    Raises:
        CheckpointError: it is missing, damaged or no LoRA; the line names the tensor.
    """
    file = Path(file)
    file = next((file / name for name in IN_FOLDERS if (file / name).is_file()), file)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in _read(file).items():
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                raise CheckpointError(
                    f"{file} is {kind} ({key}); ldm reads LoRA and LoCon for SD 1.x and 2.x"
                )
        match = KEY.fullmatch(key)
        if match is None or not isinstance(tensor, Tensor):
            unknown.append(key)
            continue
        # a copy, for the file is only mapped into memory, and may change
        module = match[1].removeprefix("base_model.model.")
        parts.setdefault(module, {})[ROLES.get(match[2], match[2])] = tensor.clone()
    if unknown or not parts:
        raise CheckpointError(
            f"{file} is no LoRA of kohya, diffusers or PEFT: it holds {_some(unknown)}"
        )
    if wrong := [f"{name} has {what}" for name, part in parts.items() if (what := _wrong(part))]:
        raise CheckpointError(f"{file} is damaged, get it anew: {_some(wrong)}")
    settings = _peft_settings(file)
    return {
        name: LoraLayer(
            part["down"], part["up"], _scale(name, part, settings, file), part.get("mid")
        )
        for name, part in parts.items()
    }


def read_textual_inversion(file: str | Path) -> tuple[str, Tensor]:
    """Reads an embedding of A1111 (.pt, .safetensors) or of diffusers (`learned_embeds`).

    Returns:
        Its word, which with A1111 is the name of the file, and its vectors `k d`.

    Raises:
        CheckpointError: it is missing, damaged or something else.
    """
    file = Path(file)
    content = _read(file)
    if "clip_g" in content:
        raise CheckpointError(f"{file} is an embedding for SDXL; use one for SD 1.x or 2.x")
    token = file.stem
    if "string_to_param" in content:
        stored = content["string_to_param"]
        # before torch 1.12 a ParameterDict kept its tensors where today's does not look
        content = getattr(stored, "_parameters", stored)
    elif "emb_params" not in content:
        token = next(iter(content), token)
    vectors = next(iter(content.values()), None) if isinstance(content, dict) else None
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(content) != 1:
        raise CheckpointError(
            f"{file} is no textual inversion of A1111 or diffusers: it does not hold the vectors of"
            " one word"
        )
    if not vectors.is_floating_point() or not vectors.isfinite().all():
        raise CheckpointError(f"{file} is damaged, get it anew: its numbers are not finite ones")
    return token, vectors.detach().reshape(-1, vectors.shape[-1])  # k d


class Adapters:
    """The LoRAs and textual inversions that a model has at the moment.

    Weights are merged on the CPU in float32, from the kept originals and in the order in which
    the LoRAs were added: so they are the same on every device, and after any order of removal.
    The originals, of the weights that a LoRA touches, are kept on the CPU.

    Args:
        unet: the model's own; changed in place.
        text_encoder: the model's own; changed in place.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder):
        self._unet = unet
        self._text_encoder = text_encoder
        self._loras: dict[str, tuple[float, dict[str, LoraLayer]]] = {}
        self._originals: dict[str, Tensor] = {}

    @property
    def loras(self) -> dict[str, float]:
        """The weight of each LoRA by its name, in the order in which they were added."""
        return {name: weight for name, (weight, _) in self._loras.items()}

    def add_lora(self, file: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Merges a LoRA into the weights.

        Args:
            file: as for `read_lora`.
            weight: how much of it; 1 is what it was trained for.
            name: to remove it by; the file's name without its ending when None.

        Returns:
            Its name.

        Raises:
            CheckpointError: the file is none that `read_lora` reads, or is for another model.
            ConfigError: the weight is not finite, or a LoRA has that name.
        """
        name = Path(file).stem if name is None else name
        if not math.isfinite(weight):
            raise ConfigError(f"the weight of LoRA {name!r} is {weight}; give a finite number")
        if name in self._loras:
            raise ConfigError(f"a LoRA {name!r} is loaded; remove it, or give this another name")
        layers = self._fit(read_lora(file), file)
        self._loras[name] = (weight, layers)
        self._merge(layers)
        return name

    def remove_lora(self, name: str | None = None) -> None:
        """Takes one LoRA, or all of them, out of the weights again.

        Raises:
            ConfigError: no LoRA has that name.
        """
        if name is not None and name not in self._loras:
            raise ConfigError(f"no LoRA {name!r} is loaded; {suggest(name, self._loras)}")
        for gone in list(self._loras) if name is None else [name]:
            self._merge(self._loras.pop(gone)[1])

    def add_textual_inversion(self, file: str | Path, token: str | None = None) -> str:
        """Teaches the text encoder a word.

        Args:
            file: as for `read_textual_inversion`.
            token: the word; the file's own when None.

        Returns:
            The word.

        Raises:
            CheckpointError: the file is no textual inversion, or is for another text encoder.
            ConfigError: the text encoder knows that word.
        """
        own_token, vectors = read_textual_inversion(file)
        token = own_token if token is None else token
        given, needed = (
            f"{width} wide ({FAMILIES.get(width, 'a family unknown here')})"
            for width in (vectors.shape[1], self._text_encoder.dim)
        )
        if given != needed:
            raise CheckpointError(
                f"{file} does not fit this model: its vectors are {given}, the text encoder's"
                f" {needed}; use an embedding for this family of models"
            )
        self._text_encoder.add_embeddings(token, vectors)
        return token

    def remove_textual_inversion(self, token: str | None = None) -> None:
        """Makes the text encoder forget one word that was added, or all of them.

        Raises:
            ConfigError: no such word was added.
        """
        self._text_encoder.remove_embeddings(token)

    def _fit(self, layers: Mapping[str, LoraLayer], file: str | Path) -> dict[str, LoraLayer]:
        """The same layers by the names of this model's weights."""
        known = self._known_names()
        fitted: dict[str, LoraLayer] = {}
        wrong = []
        for name, layer in layers.items():
            weight = known.get(_flat(name))
            if weight is None:
                wrong.append(f"no module {name}")
            elif weight in fitted:
                wrong.append(f"{name} twice")
            elif _linear(layer.shape) != _linear(shape := tuple(self._weight(weight).shape)):
                wrong.append(f"{name} is for a weight of {layer.shape}, not {shape}")
            else:
                fitted[weight] = layer
        if wrong:
            raise CheckpointError(
                f"{file} does not fit this model: {_some(wrong)}; is it for another family?"
            )
        return fitted

    @torch.no_grad()
    def _merge(self, names: Iterable[str]) -> None:
        """Brings weights up to date with the LoRAs that there are."""
        for name in names:
            weight = self._weight(name)
            active = [(w, layers[name]) for w, layers in self._loras.values() if name in layers]
            if not active:
                weight.copy_(self._originals.pop(name))
                continue
            if name not in self._originals:
                self._originals[name] = weight.detach().to("cpu", copy=True)
            merged = self._originals[name].to(torch.float32, copy=True)
            for factor, layer in active:
                merged += factor * layer.delta().reshape(merged.shape)
            weight.copy_(merged)

    def _known_names(self) -> dict[str, str]:
        """What any tool calls a layer of this model, flattened -> the name of its weight here."""
        known = {}
        theirs = unet_to_theirs(self._unet.state_dict())
        for part, model in self._models().items():
            for own, module in model.named_modules():
                if not isinstance(module, (nn.Linear, nn.Conv2d)):
                    continue
                names = [own]
                for end, old in OLD_ENDS.items():
                    if own.endswith(end):
                        names.append(own.removesuffix(end) + old)
                if part == "unet":
                    names.append(theirs[f"{own}.weight"].removesuffix(".weight"))
                    heads = ["", "unet.", "lora_unet."]
                else:
                    names += [f"text_model.{name}" for name in names]  # as before transformers 5
                    heads = ["", "text_encoder.", "lora_te.", "lora_te1."]
                known |= {_flat(head + name): f"{part}.{own}" for head in heads for name in names}
        return known

    def _models(self) -> dict[str, nn.Module]:
        return {"unet": self._unet, "text_encoder": self._text_encoder.tower.model}

    def _weight(self, name: str) -> nn.Parameter:
        part, _, module = name.partition(".")
        return self._models()[part].get_parameter(f"{module}.weight")


def _flat(name: str) -> str:
    """kohya writes underscores for dots; diffusers once put a processor above `to_q`."""
    return name.replace(".processor.", ".").replace(".", "_")


def _linear(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution as the linear layer that it is: files have either for the other."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape


def _wrong(part: Mapping[str, Tensor]) -> str:
    """What is wrong with the tensors of one layer; "" if nothing."""
    if missing := [role for role in ("down", "up") if role not in part]:
        return f"no {' and no '.join(missing)}"
    if not all(tensor.isfinite().all() for tensor in part.values()):
        return "numbers that are not finite"
    if not all(tensor.is_floating_point() for role, tensor in part.items() if role != "alpha"):
        return "numbers that are not floating-point"
    down, up, mid = part["down"], part["up"], part.get("mid")
    # neighbours share the rank, and only one of them has a kernel
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and len(down) > 0
    if mid is None:
        fits = fits and up.shape[1] == len(down) and math.prod(up.shape[2:]) == 1
    else:
        fits = fits and mid.ndim == 4 and mid.shape[:2] == (up.shape[1], len(down))
        fits = fits and math.prod(up.shape[2:]) == math.prod(down.shape[2:]) == 1
    if not fits or part.get("alpha", torch.ones(())).numel() != 1:
        return ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in part.items())
    return ""


def _scale(name: str, part: Mapping[str, Tensor], settings: Mapping[str, Any], file: Path) -> float:
    """alpha / r of a layer; rank-stabilised LoRA divides by the root of r (Kalajdzievski 2023)."""
    rank = len(part["down"])
    if "alpha" in part:
        return part["alpha"].item() / rank
    # diffusers puts the component before the name of each setting
    component, _, module = name.partition(".")
    head = f"{component}." if f"{component}.lora_alpha" in settings else ""
    module = module if head else name
    alpha = settings.get(f"{head}lora_alpha", rank)
    patterns = settings.get(f"{head}alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise CheckpointError(
                    f"{file}: ldm reads no regular expression in alpha_pattern, as {pattern!r} is"
                )
            if module == pattern.removeprefix("^") or module.endswith(f".{pattern}"):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if settings.get(f"{head}use_rslora") else rank)
    except (AttributeError, TypeError):
        raise CheckpointError(f"{file}: PEFT's lora_alpha or alpha_pattern is damaged") from None


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"no file {file}; give a .safetensors, .pt or .bin file")
    if file.suffix == ".safetensors":
        return read_tensors(file)
    content = read_pickle(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no adapter: it holds no dictionary of tensors")
    return {str(key): value for key, value in content.items()}


def _peft_settings(file: Path) -> dict[str, Any]:
    """PEFT's LoraConfig: in the file, where diffusers writes it, or beside PEFT's own."""
    beside = file.with_name("adapter_config.json")
    if file.stem == "adapter_model" and beside.is_file():
        return read_json(beside)
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata() or {}
    try:
        return dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: lora_adapter_metadata is no JSON ({error})") from None


def _some(items: Iterable[str]) -> str:
    """The first few, for an error line."""
    items = list(items)
    more = f"; and {len(items) - 4} more" if len(items) > 4 else ""
    return "; ".join(items[:4]) + more if items else "nothing"
