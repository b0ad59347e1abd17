"""Prompts to context: a frozen CLIP text tower behind one class, whichever library it came from.

Shapes: b prompts, n tokens (77 in every published CLIP), d width of the tower.

Source: Radford et al. 2021, section 2.4; its use as context is Rombach et al. 2022, section 3.3;
words of one's own, Gal et al. 2023 (textual inversion).
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ldm.config import LongPrompts
from ldm.errors import CheckpointError, ConfigError, suggest
from ldm.models.clip import ClipTextModel, ClipTokenizer, cut
from ldm.prompts import BACKTRACK, Token, parse_weights, split_chunks


class TextEncoder(nn.Module):
    """A frozen CLIP text tower: it has no gradients and stays in evaluation mode.

    Args:
        tower: where the tokens and the hidden states come from.
        skip: layers left out at the end of every prompt; SD 2.x leaves out one.

    Attributes:
        embeddings: the words that `add_embeddings` taught it, and how many vectors each has.
    """

    def __init__(self, tower: ClipTower | OpenClipTower, skip: int = 0):
        super().__init__()
        self.tower = tower
        self.skip = skip
        self.embeddings: dict[str, int] = {}
        self.requires_grad_(False).eval()

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

    def settings(self) -> dict[str, Any]:
        """What contexts depend on beside the tensors, as JSON can hold it; `tokenizer` apart."""
        names = ("max_tokens", "start", "end", "padding")
        own = {name: getattr(self.tower, name) for name in names}
        return {"skip": self.skip} | own | self.tower.settings()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode, whatever the mode of the model that holds it."""
        return super().train(False)

    def token_ids(self, prompts: list[str]) -> Tensor:
        """Token numbers int64 `b n`, cut at the limit and padded to it, on the CPU."""
        return torch.tensor(
            [self._row(self._chunks(prompt, False, "truncate")[0]) for prompt in prompts]
        )  # b n

    def encode(self, prompts: list[str], clip_skip: int | None = None) -> Tensor:
        """The context of each prompt, read literally and cut at the limit.

        Args:
            prompts: b texts; "" is the context that guidance leads away from.
            clip_skip: take the states this many layers earlier, as in diffusers; 0 or None for
                the layer that the model was trained with.

        Returns:
            `b n d`, after the tower's last normalisation, on the tower's device.

        Raises:
            ConfigError: `clip_skip` leaves no layer.
        """
        return self._states(self.token_ids(prompts), clip_skip)

    def forward(self, prompts: list[str], clip_skip: int | None = None) -> Tensor:
        """The same as `encode`."""
        return self.encode(prompts, clip_skip)

    def contexts(
        self,
        prompts: list[str],
        *,
        clip_skip: int | None = None,
        prompt_weights: bool = True,
        long_prompts: LongPrompts = "truncate",
    ) -> list[Tensor]:
        """The context of each prompt by itself: no value depends on the other prompts.

        Args:
            prompts: texts; the same one twice is encoded once.
            clip_skip: as in `encode`.
            prompt_weights: read the weights of `ldm.prompts`, or take prompts literally.
            long_prompts: "truncate" keeps one chunk, what `max_tokens` hold; "chunk" encodes as
                many as it takes, each with a start and an end token, and puts them in a row.

        Returns:
            `n d` each, n being `max_tokens` for every chunk of that prompt.

        Raises:
            ConfigError: `clip_skip` leaves no layer, or the prompt asks for what ldm has not.
        """
        encoded = {}
        for prompt in dict.fromkeys(prompts):
            chunks = self._chunks(prompt, prompt_weights, long_prompts)
            kept = chunks if long_prompts == "chunk" else chunks[:1]
            encoded[prompt] = torch.cat([self._weighted(chunk, clip_skip) for chunk in kept])
        return [encoded[prompt] for prompt in prompts]

    def pad(self, context: Tensor, n: int, clip_skip: int | None = None) -> Tensor:
        """Lengthen a context by chunks without words, so that it can be guided by a longer one.

        Args:
            context: `m d`, from `contexts`.
            n: the length to reach, a multiple of `max_tokens` and no less than m.
            clip_skip: as it was for the context.

        Returns:
            `n d`.
        """
        missing = (n - len(context)) // self.max_tokens
        if not missing:
            return context
        empty = self.encode([""], clip_skip)[0].to(context)  # max_tokens d
        return torch.cat([context, *[empty] * missing])  # n d

    def dropped(self, prompt: str, *, prompt_weights: bool = True) -> str:
        """The end of the prompt that "truncate" leaves out, without its weights; "" if nothing."""
        rest = self._chunks(prompt, prompt_weights, "truncate")[1:]
        return "".join(token.text for chunk in rest for token in chunk).strip()

    def add_embeddings(self, token: str, vectors: Tensor) -> None:
        """Textual inversion: from now on a word in a prompt stands for these vectors.

        Args:
            token: the word, such as "<cat>" or "easynegative", in upper or lower case.
            vectors: `k d`, in the order in which they enter the prompt; cast to the tower's dtype.

        Raises:
            ConfigError: the word exists already, or the vectors do not fit this tower.
        """
        token = _composed(token)
        if len(self.tower.tokenize(token)) < 2 or self._find(token):
            raise ConfigError(
                f"textual inversion: the text encoder knows the word {token!r} already;"
                " give token= another name"
            )
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ConfigError(
                f"textual inversion: {token!r} has vectors of shape {tuple(vectors.shape)}; this"
                f" text encoder needs (k, {self.dim}): the file is for another kind of model"
            )
        if not 0 < len(vectors) <= self.max_tokens - 2:
            raise ConfigError(
                f"textual inversion: {token!r} has {len(vectors)} vectors; a prompt of this text"
                f" encoder holds 1 to {self.max_tokens - 2}"
            )
        weight = self.tower.table.weight
        self._set_table(torch.cat([weight, vectors.to(weight)]))
        self.embeddings[token] = len(vectors)

    def remove_embeddings(self, token: str | None = None) -> None:
        """Forget a word of `add_embeddings`, or all of them: the weights are again as before.

        Raises:
            ConfigError: there is no such word.
        """
        names = list(self.embeddings) if token is None else [_composed(token)]
        for name in names:
            if name not in self.embeddings:
                raise ConfigError(
                    f"textual inversion: no {name!r} is loaded; {suggest(name, self.embeddings)}"
                )
            ids, weight = self._embedding_ids(name), self.tower.table.weight
            self._set_table(torch.cat([weight[: ids[0]], weight[ids[-1] + 1 :]]))
            del self.embeddings[name]

    def _set_table(self, weight: Tensor) -> None:
        self.tower.table.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.tower.table.num_embeddings = len(weight)

    def _find(self, text: str) -> str | None:
        """The embedding of this name, in upper or lower case."""
        return next((name for name in self.embeddings if name.lower() == text.lower()), None)

    def _embedding_ids(self, name: str) -> list[int]:
        """Its rows of the table, whose last are the embeddings', in the order of loading."""
        names = list(self.embeddings)
        later = sum(self.embeddings[other] for other in names[names.index(name) :])
        first = self.tower.table.num_embeddings - later
        return list(range(first, first + self.embeddings[name]))

    def _tokens(self, section: list[tuple[str, float]]) -> list[Token]:
        """The tokens of texts and their weights, the name of an embedding being one token."""
        # the longest first; a name that begins or ends with a letter is a word of its own
        names = sorted(self.embeddings, key=len, reverse=True)
        pattern = "|".join(
            r"\b" * name[0].isalnum() + re.escape(name) + r"\b" * name[-1].isalnum()
            for name in names
        )
        tokens: list[Token] = []
        for text, weight in section:
            text = _composed(text)
            for part in re.split(f"({pattern})", text, flags=re.IGNORECASE) if names else [text]:
                if name := self._find(part):
                    tokens.append(Token(self._embedding_ids(name), part, weight))
                elif part.strip():
                    tokens += [Token([i], word, weight) for i, word in self.tower.tokenize(part)]
                elif tokens:
                    tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + part)
        return tokens

    def _chunks(
        self, prompt: str, prompt_weights: bool, long_prompts: LongPrompts
    ) -> list[list[Token]]:
        """All chunks of a prompt, without their start, end and padding; "truncate" uses the first.

        Chunks of "chunk" end after a comma where one is near, those of "truncate" where they must.
        """
        if long_prompts not in get_args(LongPrompts):
            choices = suggest(str(long_prompts), get_args(LongPrompts))
            raise ConfigError(f"long_prompts is {long_prompts!r}; {choices}")
        sections = parse_weights(prompt) if prompt_weights else [[(prompt, 1.0)]]
        if long_prompts == "truncate" and any(sections[1:]):
            raise ConfigError(
                "prompt: BREAK starts a new chunk, and only one is encoded; leave it out, or give"
                " long_prompts='chunk' (--long_prompts chunk)"
            )
        backtrack = BACKTRACK if long_prompts == "chunk" else 0
        chunks = [
            chunk
            for section in sections
            for chunk in split_chunks(self._tokens(section), self.max_tokens - 2, backtrack)
        ]
        return chunks if chunks[-1] else chunks[:-1] or chunks  # BREAK at the end adds nothing

    def _row(self, chunk: list[Token]) -> list[int]:
        """The chunk's token numbers, from its start token to the last of the padding."""
        ids = [self.tower.start, *(i for token in chunk for i in token.ids), self.tower.end]
        return ids + [self.tower.padding] * (self.max_tokens - len(ids))

    @torch.no_grad()
    def _states(self, token_ids: Tensor, clip_skip: int | None) -> Tensor:
        skip = self.skip + (clip_skip or 0)
        if not self.skip <= skip < self.tower.layers:
            raise ConfigError(
                f"clip_skip is {clip_skip}; this text encoder allows 0 to"
                f" {self.tower.layers - self.skip - 1}"
            )
        return self.tower.states(token_ids.to(self.tower.table.weight.device), skip)  # b n d

    def _weighted(self, chunk: list[Token], clip_skip: int | None) -> Tensor:
        """A chunk's context `n d`, each token's part of it times the token's weight.

        The whole is then scaled back to the mean that it had, as in the web UI; but not where that
        mean is within one standard error of 0, for then the ratio of the means would be noise.
        """
        states = self._states(torch.tensor([self._row(chunk)]), clip_skip)[0]  # n d
        weights = torch.ones(self.max_tokens)
        given = [token.weight for token in chunk for _ in token.ids]
        weights[1 : len(given) + 1] = torch.tensor(given)
        if bool((weights == 1).all()):
            return states
        plain = states.float()
        weighted = plain * weights[:, None].to(plain.device)
        if plain.mean().abs() > plain.std() / plain.numel() ** 0.5:
            weighted *= plain.mean() / weighted.mean()
        return weighted.to(states.dtype)  # n d


class ClipTower(nn.Module):
    """Our own text tower, with its tokenizer: what models are stored with."""

    def __init__(self, model: ClipTextModel, tokenizer: ClipTokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.config.hidden_size
        self.layers = model.config.num_hidden_layers
        self.max_tokens, self.padding = tokenizer.max_tokens, tokenizer.padding
        self.start, self.end = tokenizer.start, tokenizer.end

    @property
    def table(self) -> nn.Embedding:
        """A row `d` for every token."""
        return self.model.embeddings["token_embedding"]  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        """See `TextEncoder.settings`."""
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
        tokenizer = json.loads(self.tokenizer.bpe.to_str())
        parts = ("model", "added_tokens", "normalizer", "pre_tokenizer")
        own = {name: getattr(self.model.config, name) for name in names}
        return own | {"tokenizer": [tokenizer[part] for part in parts]}

    def tokenize(self, text: str) -> list[tuple[int, str]]:
        """See `ClipTokenizer.tokenize`."""
        return self.tokenizer.tokenize(text)

    def states(self, token_ids: Tensor, skip: int) -> Tensor:
        """Hidden states `b n d` of the layer `skip` before the last, normalised."""
        return self.model(token_ids, skip)


class OpenClipTower(nn.Module):
    """The text tower of open_clip's CLIP, with its tokenizer.

    Args:
        model: open_clip's TextTransformer.
        tokenizer: open_clip's SimpleTokenizer.

    Raises:
        ConfigError: the tower or the vocabulary is another model's than CLIP's.
    """

    def __init__(self, model: Any, tokenizer: Any):
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
        # zeros, as open_clip trains; 0 is the "!" of SD 2.x's tokenizer
        self.start, self.end, self.padding = tokenizer.sot_token_id, tokenizer.eot_token_id, 0

    @property
    def table(self) -> nn.Embedding:
        """A row `d` for every token."""
        return self.model.token_embedding

    def settings(self) -> dict[str, Any]:
        """See `TextEncoder.settings`."""
        return {"tokenizer": [self.tokenizer.encoder, list(self.tokenizer.bpe_ranks)]}

    def tokenize(self, text: str) -> list[tuple[int, str]]:
        """Token numbers, each with the part of the text that it stands for and spaces after it.

        open_clip mends and lower-cases a text before it reads it, so the parts are of the mended.
        """
        ids, mended = self.tokenizer.encode(text), self.tokenizer.clean_fn(text)
        text = " " * text[:1].isspace() + mended + " " * text[-1:].isspace()
        # every letter of a token is a byte of the text, whose spaces belong to no token
        sizes = [len(self.tokenizer.decoder[i].removesuffix("</w>")) for i in ids]
        places = [i for i, letter in enumerate(text) for _ in letter.encode() if letter != " "]
        starts = [places[end - size] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        return list(zip(ids, cut(text, starts), strict=True))

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


def _composed(text: str) -> str:
    """Letters and their marks as one character each, as both tokenizers see them."""
    return unicodedata.normalize("NFC", text)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
