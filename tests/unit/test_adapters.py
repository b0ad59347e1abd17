"""Adapters: merged in closed form, taken out bit for bit, and refused before anything changes."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint.adapters import Adapters, LoraLayer, read_lora, read_textual_inversion
from ldm.errors import CheckpointError, ConfigError
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline

Tensors = dict[str, Tensor]
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
PEFT_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {Q: ((16,), 16), CONV: ((32, 3, 3), 32), TE: ((32,), 32)}  # inputs, outputs


class Model:
    """The tiny model's networks, to be changed."""

    def __init__(self, pipeline: LatentDiffusionPipeline):
        self.unet: UNet = copy.deepcopy(pipeline.unet)
        self.text_encoder: TextEncoder = copy.deepcopy(pipeline.text_encoder)
        self.adapters = Adapters(self.unet, self.text_encoder)

    def to(self, dtype: torch.dtype) -> None:
        self.unet.to(dtype)
        self.text_encoder.to(dtype)

    def weights(self) -> Tensors:
        both = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        return {name: weight.clone() for name, weight in both.state_dict().items()}

    def changed(self, before: Tensors) -> list[str]:
        """Names of the weights that are no longer the same bits."""
        now = self.weights()
        assert now.keys() == before.keys()
        return [name for name in now if not torch.equal(bits(now[name]), bits(before[name]))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def model(tiny_pipeline: LatentDiffusionPipeline) -> Model:
    return Model(tiny_pipeline)


def lora(*modules: str, rank: int = 2, alpha: float = 1.0, seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    tensors = {}
    for module in modules:
        inputs, out = SHAPES[module]
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, *inputs)
        tensors[f"{module}.lora_up.weight"] = torch.randn(out, rank, *[1] * (len(inputs) - 1))
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


def written(folder: Path, tensors: Tensors, name: str = "lora", **metadata: str) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(tensors, file, metadata=metadata or None)
    return file


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """LoRAs that touch partly the same weights."""
    modules = {"a": (Q, CONV, TE), "b": (Q, TE), "c": (CONV, Q)}
    return {
        name: written(tmp_path, lora(*modules[name], seed=seed), name)
        for seed, name in enumerate(modules)
    }


@pytest.mark.parametrize(
    ("order", "dtype"),
    zip(
        itertools.permutations("abc"),
        itertools.cycle([torch.float32, torch.bfloat16, torch.float16]),
        strict=False,
    ),
)
def test_removed_in_any_order_bit_for_bit(
    tiny_pipeline: LatentDiffusionPipeline,
    three: dict[str, Path],
    order: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    model, other = Model(tiny_pipeline), Model(tiny_pipeline)
    model.to(dtype)
    other.to(dtype)
    before = model.weights()
    for name, file in three.items():
        assert model.adapters.add_lora(file, 0.3) == name
    assert len(model.changed(before)) == 3
    left = list(three)
    for name in order:
        model.adapters.remove_lora(name)
        left.remove(name)
        assert list(model.adapters.loras) == left
        other.adapters.remove_lora()
        for kept in left:
            other.adapters.add_lora(three[kept], 0.3)
        assert model.changed(other.weights()) == []
    assert model.changed(before) == []


def test_removed_after_the_model_has_moved(model: Model, three: dict[str, Path]) -> None:
    expected = copy.deepcopy(model)
    expected.to(torch.bfloat16)
    for file in three.values():
        model.adapters.add_lora(file)
    model.to(torch.bfloat16)
    model.adapters.remove_lora("b")
    assert len(model.changed(expected.weights())) == 3
    model.adapters.remove_lora()
    assert model.changed(expected.weights()) == []


def test_a_file_may_change_once_it_is_read(model: Model, three: dict[str, Path]) -> None:
    """It is mapped into memory; kohya's trainer writes over it."""
    for file in three.values():
        model.adapters.add_lora(file)
    model.adapters.remove_lora("c")
    expected = model.weights()
    model.adapters.add_lora(three["c"])
    for name in "ab":
        three[name].write_bytes(bytes(three[name].stat().st_size))
    model.adapters.remove_lora("c")
    assert model.changed(expected) == []


@pytest.mark.parametrize("weight", [1.0, 0.0, -0.5, 2.0])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 1.0), (4, 8.0)])
def test_merged_in_closed_form(
    model: Model, tmp_path: Path, weight: float, rank: int, alpha: float
) -> None:
    tensors = lora(Q, CONV, rank=rank, alpha=alpha)
    names = (f"{PEFT_Q.removeprefix('unet.')}.weight", "mid_block.resnets.0.conv1.weight")
    weights = [model.unet.get_parameter(name) for name in names]
    before = [weight.double() for weight in weights]
    assert model.adapters.add_lora(written(tmp_path, tensors), weight, "name") == "name"
    for module, merged, old in zip((Q, CONV), weights, before, strict=True):
        down, up = (tensors[f"{module}.lora_{end}.weight"].double() for end in ("down", "up"))
        product = torch.einsum("or, ri... -> oi...", up.flatten(1), down)
        expected = old + weight * alpha / rank * product
        torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 0}])
def test_convolutions_one_after_the_other(options: dict[str, Any], tucker: bool) -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 5, 9, 8), torch.randn(3, 3 if tucker else 5, 3, 3)
    up, point = torch.randn(6, 3, 1, 1), torch.randn(3, 5, 1, 1)
    if tucker:
        layer = LoraLayer(point, up, 0.7, mid=kernel)
        expected = F.conv2d(F.conv2d(F.conv2d(x, point), kernel, **options), up)
    else:
        layer = LoraLayer(kernel, up, 0.7)
        expected = F.conv2d(F.conv2d(x, kernel, **options), up)
    actual = F.conv2d(x, layer.delta(), **options)
    torch.testing.assert_close(actual, 0.7 * expected, atol=1e-4, rtol=1e-5)


def test_a_linear_layers_factors_are_a_pointwise_convolutions(model: Model, tmp_path: Path) -> None:
    """SD 1.x has 1x1 convolutions where SD 2.x has linear layers; files have either."""
    module = "lora_unet_mid_block_attentions_0_proj_in"
    torch.manual_seed(0)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    keys = (f"{module}.lora_down.weight", f"{module}.lora_up.weight")
    linear = written(tmp_path, dict(zip(keys, (down, up), strict=True)), "linear")
    model.adapters.add_lora(linear)
    expected = model.weights()
    model.adapters.remove_lora()
    factors = (down[..., None, None], up[..., None, None])
    model.adapters.add_lora(written(tmp_path, dict(zip(keys, factors, strict=True)), "conv"))
    assert model.unet.get_parameter("mid_block.attentions.0.proj_in.weight").ndim == 4
    assert model.changed(expected) == []


COMPVIS = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.0.skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "time_embed.2": "time_embedding.linear_2",
    "out.2": "conv_out",
}


@pytest.mark.parametrize(("theirs", "ours"), COMPVIS.items(), ids=list(COMPVIS))
def test_compvis_names(model: Model, tmp_path: Path, theirs: str, ours: str) -> None:
    weight = model.unet.get_parameter(f"{ours}.weight").clone()
    factors = (torch.ones(1, *weight.shape[1:]), torch.ones(len(weight), 1))
    module = f"lora_unet_{theirs.replace('.', '_')}"
    keys = (f"{module}.lora_down.weight", f"{module}.lora_up.weight")
    before = model.weights()
    model.adapters.add_lora(written(tmp_path, dict(zip(keys, factors, strict=True))))
    assert model.changed(before) == [f"unet.{ours}.weight"]
    torch.testing.assert_close(model.unet.get_parameter(f"{ours}.weight"), weight + 1)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^to_q": 2, "q": 2}}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{PEFT_Q[5:]}": 2}}, 0.5),
        ({"lora_alpha": 2, "alpha_pattern": None}, 0.5),
    ],
)
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_the_scale_by_pefts_settings(
    tmp_path: Path, settings: dict[str, Any], scale: float, adapter: str
) -> None:
    tensors = {
        f"{PEFT_Q}.lora_A{adapter}.weight": torch.ones(4, 16),
        f"{PEFT_Q}.lora_B{adapter}.weight": torch.ones(16, 4),
    }
    file = written(tmp_path, tensors, lora_adapter_metadata=json.dumps(settings))
    assert read_lora(file)[PEFT_Q].scale == scale


def without(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(key)


def having(key: str, *shape: int, value: float = 1.0) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: torch.full(shape, value)})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (having(f"{Q}.hada_w1_a", 2, 2), f"is a LoHa.*{Q}.hada_w1_a.*ldm reads"),
        (having(f"{Q}.lokr_w1", 2, 2), "is a LoKr"),
        (having(f"{Q}.oft_blocks", 2, 2), "is an OFT"),
        (having(f"{Q}.dora_scale", 1, 16), "is a DoRA"),
        (having("unet.mid.to_q.lora_magnitude_vector", 16), "is a DoRA"),
        (having("lora_te2_text_model_x.lora_up.weight", 2, 2), "is a LoRA for SDXL"),
        (having("text_encoder_2.x.lora_B.weight", 2, 2), "is a LoRA for SDXL"),
        (having(f"{Q}.diff", 16, 16), f"is no LoRA.*{Q}.diff"),
        (dict.clear, "is no LoRA.*nothing"),
        (without(f"{Q}.lora_up.weight"), f"{Q} has no up"),
        (without(f"{CONV}.lora_down.weight"), f"{CONV} has no down"),
        (having("alone.alpha"), "alone has no down and no up"),
        (having(f"{Q}.lora_up.weight", 16, 3), r"down \(2, 16\), up \(16, 3\)"),
        (having(f"{Q}.lora_up.weight", 16), r"up \(16,\)"),
        (having(f"{Q}.lora_down.weight", 0, 16), r"down \(0, 16\)"),
        (having(f"{CONV}.lora_up.weight", 32, 2, 3, 3), r"up \(32, 2, 3, 3\)"),
        (having(f"{CONV}.lora_mid.weight", 2, 2, 3, 3), r"mid \(2, 2, 3, 3\)"),
        (having(f"{CONV}.lora_mid.weight", 2, 3, 3, 3), r"mid \(2, 3, 3, 3\)"),
        (having(f"{Q}.alpha", 2), r"alpha \(2,\)"),
        (having(f"{Q}.lora_up.weight", 16, 2, value=float("nan")), f"{Q} has numbers that are not"),
        (having(f"{Q}.lora_up.weight", 8, 2), r"weight of \(8, 16\), not \(16, 16\)"),
        (having(f"{Q}.lora_down.weight", 2, 12), r"weight of \(16, 12\), not \(16, 16\)"),
        (
            having(f"{CONV}.lora_down.weight", 2, 32, 1, 1),
            r"\(32, 32, 1, 1\), not \(32, 32, 3, 3\)",
        ),
    ],
)
def test_a_wrong_lora_changes_nothing(
    model: Model, tmp_path: Path, damage: Callable[[Tensors], Any], said: str
) -> None:
    tensors = lora(Q, CONV, TE)
    damage(tensors)
    refused(model, written(tmp_path, tensors), said)


def refused(model: Model, file: Path, said: str) -> None:
    before = model.weights()
    with pytest.raises(CheckpointError, match=said) as error:
        model.adapters.add_lora(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert model.changed(before) == []
    assert model.adapters.loras == {}


@pytest.mark.parametrize("count", [1, 4, 7])
def test_unknown_modules_are_named_and_counted(model: Model, tmp_path: Path, count: int) -> None:
    tensors = lora(Q)
    for i in range(count):
        tensors[f"lora_unet_other_{i}.lora_down.weight"] = torch.ones(1, 2)
        tensors[f"lora_unet_other_{i}.lora_up.weight"] = torch.ones(2, 1)
    rest = f"; and {count - 4} more" if count > 4 else ""
    refused(model, written(tmp_path, tensors), f"no module lora_unet_other_0.*{rest}; is it for")


def test_a_module_under_two_names(model: Model, tmp_path: Path) -> None:
    twice = {key.replace("lora_unet_", "unet."): tensor for key, tensor in lora(Q).items()}
    refused(model, written(tmp_path, lora(Q) | twice), "attn1_to_q twice")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("{", "is no JSON"),
        ("3", "is no JSON"),
        ('{"unet.lora_alpha": "8"}', "lora_alpha or alpha_pattern is damaged"),
        ('{"unet.lora_alpha": 8, "unet.alpha_pattern": 3}', "alpha_pattern is damaged"),
        ('{"unet.lora_alpha": 8, "unet.alpha_pattern": {".*q": 3}}', "no regular expression"),
    ],
)
def test_damaged_settings(model: Model, tmp_path: Path, metadata: str, said: str) -> None:
    tensors = {
        f"{PEFT_Q}.lora_A.weight": torch.ones(4, 16),
        f"{PEFT_Q}.lora_B.weight": torch.ones(16, 4),
    }
    refused(model, written(tmp_path, tensors, lora_adapter_metadata=metadata), said)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.bin"])
def test_missing_and_torn_files(model: Model, tmp_path: Path, name: str) -> None:
    refused(model, tmp_path / name, "no file")
    (tmp_path / name).write_bytes(b"torn")
    refused(model, tmp_path / name, "is damaged|cut short")
    if name.endswith("t"):
        torch.save([torch.ones(2)], tmp_path / name)
        refused(model, tmp_path / name, "no dictionary of tensors")


def test_names_and_weights_of_loras(model: Model, three: dict[str, Path]) -> None:
    model.adapters.add_lora(three["a"])
    before = model.weights()
    for call, said in (
        (lambda: model.adapters.add_lora(three["a"]), "'a' is loaded"),
        (lambda: model.adapters.add_lora(three["b"], name="a"), "'a' is loaded"),
        (lambda: model.adapters.add_lora(three["b"], float("inf")), "weight of LoRA 'b' is inf"),
        (lambda: model.adapters.remove_lora("aa"), "no LoRA 'aa'.*did you mean 'a'"),
        (lambda: model.adapters.remove_textual_inversion("cat"), "no 'cat'"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    assert model.changed(before) == []
    assert model.adapters.loras == {"a": 1.0}


def old_parameter_dict(vectors: Tensor) -> nn.ParameterDict:
    """As torch 1.11 pickled it."""
    stored = nn.ParameterDict({"*": nn.Parameter(vectors)})
    del stored.__dict__["_keys"]
    return stored


VECTORS = torch.arange(96.0).reshape(3, 32)
A1111 = {"string_to_token": {"*": torch.tensor(265)}, "name": "other", "step": 5}


@pytest.mark.parametrize(
    ("name", "content", "token", "rows"),
    [
        ("cat.pt", A1111 | {"string_to_param": {"*": VECTORS}}, "cat", 3),
        ("cat.pt", A1111 | {"string_to_param": nn.ParameterDict({"*": VECTORS})}, "cat", 3),
        ("cat.pt", A1111 | {"string_to_param": old_parameter_dict(VECTORS)}, "cat", 3),
        ("cat.safetensors", {"emb_params": VECTORS}, "cat", 3),
        ("learned_embeds.bin", {"<cat>": VECTORS[0]}, "<cat>", 1),
        ("learned_embeds.bin", {"<cat>": VECTORS}, "<cat>", 3),
        ("learned_embeds.safetensors", {"<cat>": VECTORS[:1]}, "<cat>", 1),
    ],
)
def test_textual_inversions_of_every_kind(
    tmp_path: Path, name: str, content: dict[str, Any], token: str, rows: int
) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    save(content, tmp_path / name)
    word, vectors = read_textual_inversion(tmp_path / name)
    assert word == token
    assert torch.equal(vectors, VECTORS[:rows])
    assert not vectors.requires_grad


def test_words_are_forgotten_bit_for_bit(model: Model, tmp_path: Path) -> None:
    before, prompt = model.weights(), ["a cat and a dog"]
    plain = model.text_encoder.encode(prompt)
    for token in ("cat", "dog"):
        save_file({"emb_params": VECTORS}, tmp_path / f"{token}.safetensors")
        assert model.adapters.add_textual_inversion(tmp_path / f"{token}.safetensors") == token
    assert not torch.equal(model.text_encoder.encode(prompt), plain)
    model.adapters.remove_textual_inversion("cat")
    model.adapters.remove_textual_inversion()
    assert model.changed(before) == []
    assert torch.equal(model.text_encoder.encode(prompt), plain)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "for SDXL"),
        ({"<cat>": VECTORS, "<dog>": VECTORS}, "is no textual inversion"),
        ({}, "is no textual inversion"),
        ({"<cat>": torch.tensor(1.0)}, "is no textual inversion"),
        ({"string_to_param": 3}, "is no textual inversion"),
        ({"string_to_param": {"*": VECTORS, "+": VECTORS}}, "is no textual inversion"),
        ({"<cat>": VECTORS / 0}, "not finite"),
        ({"<cat>": VECTORS.int()}, "not finite"),
        ({"<cat>": VECTORS.cfloat()}, "<cat> is no plain tensor"),
        ({"<cat>": VECTORS[:1, :1].expand(10**6, 10**6)}, "<cat> claims more numbers"),
        ({"<cat>": torch.ones(2, 768)}, r"are 768 wide \(SD 1.x\), the text encoder's 32 wide"),
        ({"<cat>": torch.ones(2, 1024)}, r"are 1024 wide \(SD 2.x\)"),
        ({"<cat>": torch.ones(2, 5)}, r"are 5 wide \(a family unknown here\)"),
    ],
)
def test_a_wrong_textual_inversion_changes_nothing(
    model: Model, tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    before = model.weights()
    torch.save(content, tmp_path / "cat.pt")
    with pytest.raises(CheckpointError, match=said) as error:
        model.adapters.add_textual_inversion(tmp_path / "cat.pt")
    assert "\n" not in str(error.value)
    assert model.changed(before) == []
