"""Our text tower and tokenizer as transformers', and back: the same weights and words."""

import json
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoint.folder import make_text_encoder, read_config
from ldm.models.clip import ClipTextConfig, ClipTextModel, ClipTokenizer
from ldm.models.text_encoder import TextEncoder


def our_encoder(theirs: CLIPTextModel, tokenizer: ClipTokenizer) -> TextEncoder:
    """It shares the weights of transformers' tower."""
    config = read_config(ClipTextConfig, theirs.config.to_dict(), "transformers'")
    return make_text_encoder(config, theirs.state_dict(), tokenizer, Path("transformers'"))


def their_tower(ours: ClipTextModel) -> CLIPTextModel:
    names = ClipTextConfig.__dataclass_fields__
    theirs = CLIPTextModel(CLIPTextConfig(**{name: getattr(ours.config, name) for name in names}))
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def their_tokenizer(ours: ClipTokenizer) -> CLIPTokenizer:
    model = json.loads(ours.bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token=ours.bpe.id_to_token(ours.padding),
        model_max_length=ours.max_tokens,
    )
