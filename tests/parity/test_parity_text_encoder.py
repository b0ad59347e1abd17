"""The text encoder against transformers and open_clip: same weights and words, same context."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import pytest
import torch
from clips import their_tokenizer, their_tower
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoint.folder import load_text_encoder, save_text_encoder
from ldm.errors import CheckpointError, ConfigError
from ldm.models.text_encoder import TextEncoder

PROMPTS = ["", "a red flower's petals, é 23", "The QUICK  brown fox " * 30]
START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's tokenizer in the layout of SD 1.x, from the vocabulary that open_clip bundles."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = list(SimpleTokenizer().encoder)[:START] + ["<|startoftext|>", "<|endoftext|>"]
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = merges[1 : START - 512 + 1]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return folder


@pytest.fixture(scope="module")
def model() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        bos_token_id=START,
        eos_token_id=END,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(model: CLIPTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as transformers 4 wrote them: a prefix, and the positions as a tensor."""
    folder = tmp_path_factory.mktemp("text_encoder")
    model.save_pretrained(folder)
    weights = {f"text_model.{name}": weight for name, weight in model.state_dict().items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def opened(text_encoder_dir: Path, tokenizer_dir: Path, **options: Any) -> TextEncoder:
    """These two as the folders of one model."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "text_encoder").symlink_to(text_encoder_dir)
        (Path(folder) / "tokenizer").symlink_to(tokenizer_dir)
        return load_text_encoder(Path(folder), **options)


@pytest.fixture(scope="module")
def encoder(folder: Path, tokenizer_dir: Path) -> TextEncoder:
    return opened(folder, tokenizer_dir)


def expected_ids(pad: int) -> Tensor:
    """By open_clip's own tokenizer, with its zeros after the end replaced by the padding."""
    ids = SimpleTokenizer()(PROMPTS)
    after_the_end = (ids == END).cumsum(dim=1) - (ids == END).int() > 0
    return ids.masked_fill(after_the_end, pad)


@pytest.mark.parametrize(("clip_skip", "index"), [(None, -1), (0, -1), (1, -2), (2, -3)])
@torch.no_grad()
def test_equals_transformers(
    encoder: TextEncoder, model: CLIPTextModel, clip_skip: int | None, index: int
) -> None:
    output = model(expected_ids(END), output_hidden_states=True)
    expected = model.final_layer_norm(output.hidden_states[index])
    assert expected.std() > 0.1
    torch.testing.assert_close(encoder.encode(PROMPTS, clip_skip), expected, atol=1e-5, rtol=1e-5)
    if index == -1:
        torch.testing.assert_close(expected, output.last_hidden_state)


def test_token_ids_equal_open_clips(encoder: TextEncoder) -> None:
    assert (encoder.dim, encoder.max_tokens) == (32, 77)
    assert torch.equal(encoder.token_ids(PROMPTS), expected_ids(END))


def test_pads_as_the_tokenizer_says(folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """SD 2.x's tokenizer pads with "!", whose number is open_clip's zero."""
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"})
    )
    sd2 = opened(folder, tmp_path)
    assert torch.equal(sd2.token_ids(PROMPTS), SimpleTokenizer()(PROMPTS))
    save_text_encoder(sd2, tmp_path / "text_encoder", tmp_path / "tokenizer")
    again = opened(tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert torch.equal(again.token_ids(PROMPTS), SimpleTokenizer()(PROMPTS))


def test_the_limit_is_the_models_where_the_tokenizer_has_none(
    folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_dir / name, tmp_path)
    encoder = opened(folder, tmp_path)
    assert torch.equal(encoder.token_ids(PROMPTS), expected_ids(END))


@torch.no_grad()
def test_saved_folders_open_in_transformers(
    encoder: TextEncoder, model: CLIPTextModel, tmp_path: Path
) -> None:
    save_text_encoder(encoder, tmp_path / "text_encoder", tmp_path / "tokenizer")
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    ids = expected_ids(END)
    assert torch.equal(theirs(ids).last_hidden_state, model(ids).last_hidden_state)
    # the names that transformers 4, diffusers' converters and single-file tools look for
    names = set(load_file(tmp_path / "text_encoder" / "model.safetensors"))
    assert names == {f"text_model.{name}" for name in model.state_dict()}
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"]

    def tokens(folder: Path) -> Tensor:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        return tokenizer(
            PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    assert torch.equal(tokens(tmp_path / "tokenizer"), ids)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # as older versions see it
    assert torch.equal(tokens(tmp_path / "tokenizer"), ids)


@torch.no_grad()
def test_saved_folders_open_in_diffusers(encoder: TextEncoder, tmp_path: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=their_tower(encoder.tower.model),
        tokenizer=their_tokenizer(encoder.tower.tokenizer),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / name)
    save_text_encoder(encoder, tmp_path / "text_encoder", tmp_path / "tokenizer")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert theirs.shape == (3, 77, 32)
    torch.testing.assert_close(encoder.encode(PROMPTS), theirs, atol=1e-5, rtol=1e-5)


def test_is_frozen_and_stays_in_evaluation_mode(encoder: TextEncoder) -> None:
    holder = torch.nn.ModuleList([encoder]).train()
    assert holder.training and not any(module.training for module in encoder.modules())
    assert not encoder.encode(PROMPTS).requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_dropped_is_the_text_that_does_not_fit(encoder: TextEncoder) -> None:
    for text in ("", "short", " ".join(["rose"] * 75)):
        assert encoder.dropped(text) == ""
    assert encoder.dropped(" ".join(["rose"] * 75 + ["Blue", "Tulip!"])) == "Blue Tulip!"
    # what is left of the prompt is all that is encoded
    with_end, without = " ".join(["rose"] * 75 + ["blue"]), " ".join(["rose"] * 75)
    assert torch.equal(encoder.token_ids([with_end]), encoder.token_ids([without]))


@pytest.mark.parametrize("clip_skip", [-1, 4])
def test_a_clip_skip_that_leaves_no_layer_is_refused(encoder: TextEncoder, clip_skip: int) -> None:
    with pytest.raises(ConfigError, match=f"clip_skip is {clip_skip}; .* allows 0 to 3"):
        encoder.encode(["a"], clip_skip)


def test_damaged_folders_are_refused_in_one_line(
    folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no file .*config.json") as caught:
        opened(tmp_path / "nowhere", tokenizer_dir)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no file .*tokenizer.json or vocab.json"):
        opened(folder, tmp_path)

    # transformers would fill a missing tensor with random numbers
    weights = load_file(folder / "model.safetensors")
    del weights["text_model.encoder.layers.1.mlp.fc1.weight"]
    shutil.copy(folder / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing encoder.layers.1.mlp.fc1.weight"):
        opened(tmp_path, tokenizer_dir)

    # pickled weights are not read, and neither is half a file
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        opened(tmp_path, tokenizer_dir)
    assert "\n" not in str(caught.value)
    half = (folder / "model.safetensors").read_bytes()[:100_000]
    (tmp_path / "model.safetensors").write_bytes(half)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tokenizer_dir)
    assert "\n" not in str(caught.value)


def test_variant_and_dtype(folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path / "model.fp16.safetensors")
    half = opened(tmp_path, tokenizer_dir, dtype=torch.bfloat16, variant="fp16")
    full = opened(folder, tokenizer_dir)
    assert half.encode(PROMPTS).dtype == torch.bfloat16
    torch.testing.assert_close(
        half.encode(PROMPTS).float(), full.encode(PROMPTS), atol=0.1, rtol=0.05
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[open_clip.CLIP, Path]:
    """A small model of open_clip's own kind, known to it by a name, and its weight file."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-clip").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "tiny.safetensors")
    return model, folder / "tiny.safetensors"


@torch.no_grad()
def test_equals_open_clip(tiny: tuple[open_clip.CLIP, Path]) -> None:
    theirs, weights = tiny
    ids = SimpleTokenizer()(PROMPTS)
    x = theirs.token_embedding(ids) + theirs.positional_embedding
    layers = [x := block(x, attn_mask=theirs.attn_mask) for block in theirs.transformer.resblocks]
    states = [theirs.ln_final(layer) for layer in layers]
    # the reference itself, against open_clip's own forward
    pooled = states[-1][torch.arange(3), ids.argmax(dim=1)] @ theirs.text_projection
    torch.testing.assert_close(pooled, theirs.encode_text(ids))

    last = TextEncoder.from_open_clip("tiny-test-clip", str(weights), layer="last")
    sd2 = TextEncoder.from_open_clip("tiny-test-clip", str(weights))
    assert (sd2.dim, sd2.max_tokens) == (64, 77)
    for actual, expected in (
        (last.encode(PROMPTS), states[2]),
        (last.encode(PROMPTS, clip_skip=1), states[1]),
        (sd2.encode(PROMPTS), states[1]),
        (sd2.encode(PROMPTS, clip_skip=1), states[0]),
    ):
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="allows 0 to 1"):
        sd2.encode(PROMPTS, clip_skip=2)


def test_open_clip_tells_what_it_drops_and_cannot_save(
    tiny: tuple[open_clip.CLIP, Path], tmp_path: Path
) -> None:
    encoder = TextEncoder.from_open_clip("tiny-test-clip", str(tiny[1]))
    assert encoder.dropped(" ".join(["rose"] * 75)) == ""
    assert encoder.dropped(" ".join(["rose"] * 75 + ["blue", "tulip"])) == "blue tulip"
    with pytest.raises(CheckpointError, match="no file format") as caught:
        save_text_encoder(encoder, tmp_path / "text_encoder", tmp_path / "tokenizer")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_open_clip_models_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model 'ViT-Z-1'"):
        TextEncoder.from_open_clip("ViT-Z-1")
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.from_open_clip("ViT-B-32", str(tmp_path / "missing.safetensors"))
    assert "\n" not in str(caught.value)
