"""CLIP's text half: its tokenizer, and its tower by the parameter names of transformers' files.

Legend: b prompts, n tokens, d width.

Source: Radford et al. 2021, section 2.4; the blocks are GPT-2's (Radford et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ldm.errors import ConfigError, suggest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's models
    "gelu": F.gelu,  # open_clip's
}


@dataclass(frozen=True)
class ClipTextConfig:
    """A text tower, by the names of transformers' config.json; other tools read the last four.

    Attributes:
        vocab_size: rows of the table of tokens.
        hidden_size: d.
        intermediate_size: width inside the feed-forward layers.
        num_hidden_layers: blocks.
        num_attention_heads: of each block.
        max_position_embeddings: n at most.
        hidden_act: one of `ACTIVATIONS`.
        layer_norm_eps: of every layer normalisation.
        projection_dim: width of the space in which CLIP compares texts with pictures.
        pad_token_id: of the tokenizer, as are the other two.
        bos_token_id: likewise.
        eos_token_id: likewise.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act is {self.hidden_act!r}; {suggest(self.hidden_act, ACTIVATIONS)}"
            )
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_hidden_layers)
        if min(*sizes, self.num_attention_heads, self.max_position_embeddings) < 1:
            raise ConfigError("a text encoder's sizes must be 1 or more")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"a text encoder's width of {self.hidden_size} cannot be split into"
                f" {self.num_attention_heads} attention heads"
            )


class ClipTextModel(nn.Module):
    """The tower: causal attention and feed-forward layers, each after its normalisation."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width),
            }
        )
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, token_ids: Tensor, skip: int = 0) -> Tensor:
        """Tokens `b n` to the hidden states `b n d` of the block `skip` before the last."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        x = self.embeddings["token_embedding"](token_ids)  # b n d
        x = x + self.embeddings["position_embedding"](positions)
        blocks = list(self.encoder["layers"].children())
        for block in blocks[: len(blocks) - skip]:
            x = block(x)
        return self.final_layer_norm(x)


class Block(nn.Module):
    """Self-attention to the tokens before, and two linear layers."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.activation = config.num_attention_heads, ACTIVATIONS[config.hidden_act]
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        """`b n d` to `b n d`."""
        normed, attention = self.layer_norm1(x), self.self_attn
        q, k, v = (
            rearrange(attention[name](normed), "b n (heads d) -> b heads n d", heads=self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        # no mask of the padding: Stable Diffusion's prompts attend to it
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # b heads n d/heads
        x = x + attention["out_proj"](rearrange(out, "b heads n d -> b n (heads d)"))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class ClipTokenizer:
    """Text to tokens, and what makes them a row: start, end, padding and its length.

    Args:
        bpe: the byte-pair encoding, by the `tokenizers` library.
        max_tokens: of a row, its start and end included.
        start: number of the token that begins a row.
        end: of the token that ends the text.
        padding: of the token that fills a row up: the end in SD 1.x, "!" in 2.x.
    """

    def __init__(self, bpe: Tokenizer, max_tokens: int, start: int, end: int, padding: int):
        self.bpe, self.max_tokens = bpe, max_tokens
        self.start, self.end, self.padding = start, end, padding

    def tokenize(self, text: str) -> list[tuple[int, str]]:
        """Token numbers, each with the part of the text that it stands for and spaces after it."""
        encoded = self.bpe.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoded.offsets]
        return list(zip(encoded.ids, cut(text, starts), strict=True))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Rows of tokens int64 `b n`, each cut at the limit and padded to the longest."""
        words = ([i for i, _ in self.tokenize(text)][: self.max_tokens - 2] for text in texts)
        rows = [torch.tensor([self.start, *row, self.end]) for row in words]
        return pad_sequence(rows, batch_first=True, padding_value=self.padding)


def cut(text: str, starts: list[int]) -> list[str]:
    """The parts of a text that begin at `starts`, the first with all before it."""
    return [text[a:b] for a, b in pairwise([0, *starts[1:], len(text)])] if starts else []
