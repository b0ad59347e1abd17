"""Prompts to context: a frozen CLIP text tower behind one class, whichever library it came from.

Shapes: b prompts, n tokens (77 in every published CLIP), d width of the tower.

Source: Radford et al. 2021, section 2.4; its use as context is Rombach et al. 2022, section 3.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


class TextEncoder(nn.Module):
    """A frozen CLIP text tower: it has no gradients and stays in evaluation mode.

    Args:
        tower: where the tokens and the hidden states come from.
        skip: layers left out at the end of every prompt; SD 2.x leaves out one.
    """

    def __init__(self, tower: TransformersTower | OpenClipTower, skip: int = 0):
        super().__init__()
        self.tower = tower
        self.skip = skip
        self.requires_grad_(False).eval()

    @classmethod
    def from_folder(
        cls,
        text_encoder_dir: str | Path,
        tokenizer_dir: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> TextEncoder:
        """Opens the `text_encoder` and `tokenizer` folders of a model. Never downloads.

        Args:
            text_encoder_dir: holds config.json and the weights, as safetensors.
            tokenizer_dir: holds tokenizer.json, or vocab.json and merges.txt.
            dtype: of the weights in memory.
            variant: "fp16" reads model.fp16.safetensors.

        Raises:
            CheckpointError: a file is missing or damaged, or does not fit its config.json.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        for folder, names in (
            (Path(text_encoder_dir), ["config.json"]),
            (Path(tokenizer_dir), ["tokenizer.json", "vocab.json"]),
        ):
            if not any((folder / name).is_file() for name in names):
                raise CheckpointError(
                    f"{folder}: no {' or '.join(names)}; is it a folder of a diffusers model?"
                )
        try:
            loaded: Any = CLIPTextModel.from_pretrained(
                text_encoder_dir,
                dtype=dtype,
                variant=variant,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many kinds; all mean the files
            raise CheckpointError(f"{text_encoder_dir}: {_first_line(error)}") from error
        model, info = loaded
        # transformers leaves what it does not find at random values, with no more than a warning
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"{text_encoder_dir}: the weights lack {len(missing)} of the model's tensors, the"
                f" first being {missing[0]}; get the file anew"
            )
        try:
            tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{tokenizer_dir}: {_first_line(error)}") from error
        return cls(TransformersTower(model, tokenizer))

    @classmethod
    def from_open_clip(
        cls,
        model_name: str,
        pretrained: str | None = None,
        *,
        layer: Literal["last", "penultimate"] = "penultimate",
    ) -> TextEncoder:
        """The text half of an open_clip model.

        Args:
            model_name: a name that open_clip knows, such as "ViT-H-14", or one with its prefix
                "local-dir:" or "hf-hub:".
            pretrained: a weight file, or a tag that open_clip downloads; None for random weights.
            layer: which layer's states become the context; SD 2.x takes the penultimate.

        Raises:
            ConfigError: no such model, or one without CLIP's own text tower and vocabulary.
            CheckpointError: the weights cannot be had.
        """
        import open_clip

        if ":" not in model_name and not open_clip.get_model_config(model_name):
            raise ConfigError(
                f"text encoder: open_clip has no model {model_name!r};"
                " open_clip.list_models() names them"
            )
        try:
            model: Any = open_clip.create_model(
                model_name, pretrained=pretrained, force_custom_text=True
            )
            tokenizer = open_clip.get_tokenizer(model_name)
        except Exception as error:  # a missing file, a failed download, weights that do not fit
            raise CheckpointError(f"open_clip {model_name}: {_first_line(error)}") from error
        return cls(OpenClipTower(model.text, tokenizer), skip=int(layer == "penultimate"))

    @property
    def dim(self) -> int:
        """d, the width of the context."""
        return self.tower.dim

    @property
    def max_tokens(self) -> int:
        """n, the tokens of every prompt, its start, end and padding included."""
        return self.tower.max_tokens

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode, whatever the mode of the model that holds it."""
        return super().train(False)

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Token numbers int64 `b n`, cut at the limit and padded to it, on the CPU."""
        return self.tower.token_ids(prompts)

    @torch.no_grad()
    def encode(self, prompts: list[str], clip_skip: int | None = None) -> Tensor:
        """The context of each prompt.

        Args:
            prompts: b texts; "" is the context that guidance leads away from.
            clip_skip: take the states this many layers earlier, as in diffusers; 0 or None for
                the layer that the model was trained with.

        Returns:
            `b n d`, after the tower's last normalisation, on the tower's device.

        Raises:
            ConfigError: `clip_skip` leaves no layer.
        """
        skip = self.skip + (clip_skip or 0)
        if not self.skip <= skip < self.tower.layers:
            raise ConfigError(
                f"clip_skip is {clip_skip}; this text encoder allows 0 to"
                f" {self.tower.layers - self.skip - 1}"
            )
        device = next(self.parameters()).device
        return self.tower.states(self.token_ids(prompts).to(device), skip)  # b n d

    def forward(self, prompts: list[str], clip_skip: int | None = None) -> Tensor:
        """The same as `encode`."""
        return self.encode(prompts, clip_skip)

    def dropped(self, prompt: str) -> str:
        """The end of the prompt that lies beyond the token limit; "" when nothing does."""
        return self.tower.dropped(prompt)

    def save(self, text_encoder_dir: str | Path, tokenizer_dir: str | Path) -> None:
        """Writes the two folders of a model, in the layout that all versions of transformers read.

        Raises:
            CheckpointError: the tower is open_clip's, which has no such layout.
        """
        self.tower.save(Path(text_encoder_dir), Path(tokenizer_dir))


class TransformersTower(nn.Module):
    """The text tower of transformers' CLIP, with its tokenizer."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim: int = model.config.hidden_size
        self.layers: int = model.config.num_hidden_layers
        # a tokenizer without a limit of its own claims 10**30
        self.max_tokens = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        tokenizer.model_max_length = self.max_tokens

    def token_ids(self, prompts: list[str]) -> Tensor:
        """`b n`, padded with the tokenizer's own pad token: the end token in SD 1.x, "!" in 2.x."""
        return self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids  # b n

    def states(self, token_ids: Tensor, skip: int) -> Tensor:
        """Hidden states `b n d` of the layer `skip` before the last, normalised."""
        # no attention mask: Stable Diffusion's prompts attend to their padding
        if skip == 0:
            return self.model(token_ids).last_hidden_state  # b n d
        hidden = self.model(token_ids, output_hidden_states=True).hidden_states
        return self.model.final_layer_norm(hidden[-(skip + 1)])  # b n d

    def dropped(self, prompt: str) -> str:
        """The text from the first token that does not fit; the last place is the end token's."""
        offsets = self.tokenizer(
            prompt, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        if len(offsets) <= self.max_tokens:
            return ""
        return prompt[offsets[self.max_tokens - 1][0] :].strip()

    def save(self, text_encoder_dir: Path, tokenizer_dir: Path) -> None:
        """Writes what transformers 5 writes, and what older versions and other tools look for."""
        from safetensors.torch import save_file

        text_encoder_dir.mkdir(parents=True, exist_ok=True)
        tokenizer_dir.mkdir(parents=True, exist_ok=True)
        # transformers 5 left the prefix out of its own files; it reads both, the others only this
        weights = {
            f"text_model.{name}": weight.detach().cpu().contiguous()
            for name, weight in self.model.state_dict().items()
        }
        save_file(weights, text_encoder_dir / "model.safetensors", metadata={"format": "pt"})
        self.model.config.architectures = ["CLIPTextModel"]
        self.model.config.save_pretrained(text_encoder_dir)
        self.tokenizer.save_pretrained(tokenizer_dir)
        # vocab.json and merges.txt, from before tokenizer.json
        self.tokenizer.backend_tokenizer.model.save(str(tokenizer_dir))


class OpenClipTower(nn.Module):
    """The text tower of open_clip's CLIP, with its tokenizer.

    Args:
        model: open_clip's TextTransformer.
        tokenizer: open_clip's SimpleTokenizer.

    Raises:
        ConfigError: the tower or the vocabulary is another model's than CLIP's.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import TextTransformer

        super().__init__()
        if not isinstance(model, TextTransformer) or not isinstance(tokenizer, SimpleTokenizer):
            raise ConfigError(
                f"text encoder: a tower of {type(model).__name__} with {type(tokenizer).__name__}"
                " is not CLIP's; choose an open_clip model with CLIP's own text tower"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.dim: int = model.transformer.width
        self.layers: int = model.transformer.layers
        self.max_tokens: int = model.context_length

    def token_ids(self, prompts: list[str]) -> Tensor:
        """`b n`, padded with zeros, as open_clip trains; 0 is the "!" of SD 2.x's tokenizer."""
        return self.tokenizer(prompts, context_length=self.max_tokens)  # b n

    def states(self, token_ids: Tensor, skip: int) -> Tensor:
        """Hidden states `b n d` of the layer `skip` before the last, normalised."""
        output = self.model.forward_intermediates(
            token_ids,
            indices=[self.layers - 1 - skip],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return output["text_intermediates"][0]  # b n d

    def dropped(self, prompt: str) -> str:
        """The text of the tokens that do not fit between the start and the end token."""
        return self.tokenizer.decode(self.tokenizer.encode(prompt)[self.max_tokens - 2 :]).strip()

    def save(self, text_encoder_dir: Path, tokenizer_dir: Path) -> None:
        """Raises CheckpointError: open_clip's towers have no folder layout."""
        raise CheckpointError(
            f"{text_encoder_dir}: an open_clip text encoder has no folder format; open the model's"
            " own text_encoder folder with TextEncoder.from_folder and save that"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
