"""Adapters against diffusers and peft: the same file, the same prediction and the same context."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint.adapters import Adapters
from ldm.pipeline import LatentDiffusionPipeline

PROMPTS = ["a red flower", "three blue tulips"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
ATTENTION = [f"{BLOCK}attn{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
TRANSFORMERS = [
    *ATTENTION,
    "mid_block.attentions.0.proj_out",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
]
UNET = [
    *TRANSFORMERS,
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
    "mid_block.resnets.1.conv2",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "time_embedding.linear_1",
    "conv_in",
    "conv_out",
]
TOWER = [f"encoder.layers.1.self_attn.{to}_proj" for to in ("q", "k", "v", "out")]
MLP = ["encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc2"]

PARTS = ("unet", "text_encoder")

Layers = dict[str, tuple[Tensor, Tensor, float]]  # module -> down, up, alpha
Write = Callable[[Layers, Layers], dict[str, Tensor]]


def kohya(unet: Layers, text_encoder: Layers, te: str = "lora_te") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for head, part in (("lora_unet_", unet), (f"{te}_text_model_", text_encoder)):
        for name, (down, up, alpha) in part.items():
            module = head + name.replace(".", "_")
            tensors[f"{module}.lora_down.weight"] = down
            tensors[f"{module}.lora_up.weight"] = up
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya_te1(unet: Layers, text_encoder: Layers) -> dict[str, Tensor]:
    return kohya(unet, text_encoder, "lora_te1")


def kohya_compvis(unet: Layers, text_encoder: Layers) -> dict[str, Tensor]:
    blocks = {
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
    }
    theirs = {}
    for name, factors in unet.items():
        ours = next(block for block in blocks if name.startswith(block))
        theirs[blocks[ours] + name.removeprefix(ours)] = factors
    return kohya(theirs, text_encoder)


def dotted(layers: Layers, head: str, down: str, up: str) -> dict[str, Tensor]:
    return {
        f"{head}{name}{end}.weight": factor
        for name, factors in layers.items()
        for end, factor in ((down, factors[0]), (up, factors[1]))
    }


def diffusers_first(unet: Layers, text_encoder: Layers, head: str = "unet.") -> dict[str, Tensor]:
    """LoRAs as attention processors."""
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tower = {}
    for name, factors in text_encoder.items():
        module, _, last = name.rpartition(".")
        tower[f"{module}.{names[last]}"] = factors
    processors = {
        name.replace(".to_", ".processor.to_").removesuffix(".0"): factors
        for name, factors in unet.items()
    }
    return dotted(processors, head, "_lora.down", "_lora.up") | dotted(
        tower, "text_encoder.text_model.", "_lora.down", "_lora.up"
    )


def diffusers_second(unet: Layers, text_encoder: Layers) -> dict[str, Tensor]:
    head, end = "text_encoder.text_model.", ".lora_linear_layer."
    return dotted(unet, "unet.", ".lora.down", ".lora.up") | dotted(
        text_encoder, head, f"{end}down", f"{end}up"
    )


def diffusers_now(unet: Layers, text_encoder: Layers) -> dict[str, Tensor]:
    return dotted(unet, "unet.", ".lora_A", ".lora_B") | dotted(
        text_encoder, "text_encoder.", ".lora_A", ".lora_B"
    )


class Pair:
    """The tiny model twice, ours and diffusers', to be changed."""

    def __init__(self, ours: LatentDiffusionPipeline, theirs: StableDiffusionPipeline):
        self.unet, self.text_encoder = copy.deepcopy((ours.unet, ours.text_encoder))
        self.adapters = Adapters(self.unet, self.text_encoder)
        changed = {p: copy.deepcopy(getattr(theirs, p)) for p in ("unet", "text_encoder")}
        changed["tokenizer"] = copy.deepcopy(theirs.tokenizer)
        parts = theirs.components | changed
        self.theirs = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        self.plain = self.ours()

    def layers(
        self, unet: list[str], text_encoder: list[str], *, alpha: float | None = None, seed: int = 1
    ) -> tuple[Layers, Layers]:
        """A random LoRA of several ranks, and of several alphas unless one is given."""
        torch.manual_seed(seed)
        made: tuple[Layers, Layers] = ({}, {})
        models = (self.theirs.unet, self.theirs.text_encoder)
        for layers, model, names in zip(made, models, (unet, text_encoder), strict=True):
            for i, name in enumerate(names):
                weight = model.get_parameter(f"{name}.weight")
                out, *inputs = weight.shape
                down = torch.randn(1 + i % 3, *inputs) / weight[0].numel() ** 0.5
                up = torch.randn(out, len(down), *[1] * (weight.ndim - 2)) / 8
                layers[name] = (down, up, 1.0 + i % 4 if alpha is None else alpha)
        return made

    @torch.no_grad()
    def ours(self) -> list[Tensor]:
        x, t, context = self.inputs()
        return [self.unet(x, t, context), self.text_encoder.encode(PROMPTS)]

    @torch.no_grad()
    def diffusers(self) -> list[Tensor]:
        x, t, context = self.inputs()
        ids = self.theirs.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
        states = self.theirs.text_encoder(ids).last_hidden_state
        return [self.theirs.unet(x, t, context).sample, states]

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(2)
        return torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 7, 32)

    def check(self) -> None:
        for ours, theirs, plain in zip(self.ours(), self.diffusers(), self.plain, strict=True):
            assert (theirs - plain).abs().max() > 0.1  # the adapter matters
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_model_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_model_folder)


@pytest.fixture
def pair(
    tiny_pipeline: LatentDiffusionPipeline, diffusers_pipeline: StableDiffusionPipeline
) -> Pair:
    return Pair(tiny_pipeline, diffusers_pipeline)


@pytest.mark.parametrize(
    ("write", "unet", "text_encoder"),
    [
        (kohya, UNET, TOWER + MLP),
        (kohya_te1, ATTENTION, TOWER),
        (kohya_compvis, TRANSFORMERS, TOWER),
        (diffusers_first, ATTENTION, TOWER),
        (diffusers_second, UNET, TOWER + MLP),
        (diffusers_now, UNET, TOWER + MLP),
    ],
)
def test_a_lora_equals_diffusers(
    pair: Pair, tmp_path: Path, write: Write, unet: list[str], text_encoder: list[str]
) -> None:
    # where a file has several alphas, diffusers loses those of the attention
    made = pair.layers(unet, text_encoder, alpha=2)
    file = str(tmp_path / "lora.safetensors")
    save_file(write(*made), file)
    pair.theirs.load_lora_weights(file, unet_config=pair.theirs.unet.config)
    pair.adapters.add_lora(file)
    pair.check()


def test_several_loras_equal_diffusers(pair: Pair, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        made = pair.layers(UNET[seed:], TOWER[seed:], alpha=2, seed=seed)
        save_file(kohya(*made), tmp_path / f"{name}.safetensors")
        pair.theirs.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
    pair.theirs.set_adapters(["a", "b"], [0.7, -0.4])
    pair.adapters.add_lora(tmp_path / "a.safetensors", 0.7)
    pair.adapters.add_lora(tmp_path / "b.safetensors", -0.4)
    pair.check()


def peft_config(layers: Layers, rslora: bool) -> LoraConfig:
    return LoraConfig(
        target_modules=list(layers),
        rank_pattern={f"^{name}": len(down) for name, (down, _, _) in layers.items()},
        alpha_pattern={name: alpha for name, (_, _, alpha) in layers.items()},
        use_rslora=rslora,
    )


def fill(model: nn.Module, layers: Layers) -> None:
    """Peft's layers with these numbers."""
    for name, (down, up, _) in layers.items():
        module: Any = model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(down)
        module.lora_B["default"].weight.data.copy_(up)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_own_folders(pair: Pair, tmp_path: Path, rslora: bool) -> None:
    for part, layers in zip(PARTS, pair.layers(UNET, TOWER + MLP), strict=True):
        model = getattr(pair.theirs, part)
        wrapped = get_peft_model(model, peft_config(layers, rslora))
        fill(model, layers)
        wrapped.save_pretrained(str(tmp_path / part))
        pair.adapters.add_lora(tmp_path / part)
    pair.check()


@pytest.mark.parametrize(
    ("dialect", "rslora"), [("kohya", False), ("diffusers", False), ("diffusers", True)]
)
def test_the_alpha_of_every_layer_equals_peft(
    pair: Pair, tmp_path: Path, dialect: str, rslora: bool
) -> None:
    made = pair.layers(UNET, TOWER + MLP)
    saved: dict[str, Any] = {}
    for part, layers in zip(PARTS, made, strict=True):
        model, config = getattr(pair.theirs, part), peft_config(layers, rslora)
        inject_adapter_in_model(config, model)
        fill(model, layers)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        settings = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        saved[f"{part}_lora_adapter_metadata"] = settings
    if dialect == "kohya":
        save_file(kohya(*made), tmp_path / "pytorch_lora_weights.safetensors")
    else:
        StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    pair.adapters.add_lora(tmp_path)
    pair.check()


def test_the_file_of_a_unet_alone(pair: Pair, tmp_path: Path) -> None:
    """Without `unet.`: the pickle of the first diffusers, and what `save_lora_adapter` writes."""
    first, _ = pair.layers(ATTENTION, [])
    torch.save(diffusers_first(first, {}, head=""), tmp_path / "lora.bin")
    pair.adapters.add_lora(tmp_path / "lora.bin")
    second, _ = pair.layers(UNET, [], seed=3)
    unet = pair.theirs.unet
    unet.add_adapter(peft_config(second, True), "default")
    fill(unet, second)
    unet.save_lora_adapter(tmp_path)
    pair.adapters.add_lora(tmp_path)
    pair.theirs.load_lora_weights(diffusers_first(first, {}), adapter_name="first")
    unet.set_adapters(["default", "first"])
    ours, theirs = pair.ours()[0], pair.diffusers()[0]
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("token", [None, "odd-cat"])
@pytest.mark.parametrize("dialect", ["a1111", "diffusers"])
def test_a_textual_inversion_equals_diffusers(
    pair: Pair, tmp_path: Path, dialect: str, token: str | None, vectors: int
) -> None:
    torch.manual_seed(3)
    learned = torch.randn(vectors, 32)
    if dialect == "a1111":
        file = tmp_path / "my-cat.pt"
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": learned}}
        torch.save(content | {"name": "my-cat", "step": 500}, file)
    else:
        file = tmp_path / "learned_embeds.safetensors"
        save_file({"<my-cat>": learned}, file)
    pair.theirs.load_textual_inversion(str(file), token)
    word = pair.adapters.add_textual_inversion(file, token)
    assert word == (token or {"a1111": "my-cat", "diffusers": "<my-cat>"}[dialect])
    prompt = f"a {word} and a red flower"
    ids = pair.theirs.tokenizer(
        pair.theirs.maybe_convert_prompt(prompt, pair.theirs.tokenizer),
        padding="max_length",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        expected = pair.theirs.text_encoder(ids).last_hidden_state
    actual = pair.text_encoder.encode([prompt])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
