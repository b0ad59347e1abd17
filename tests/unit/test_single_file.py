"""Single files of every dialect: the networks that they came from, or a refusal in one line."""

import json
import pickle
import zipfile
from contextlib import nullcontext

import pytest
import torch
from dialects import (
    BETAS,
    CLIP_EXTRAS,
    DIALECTS,
    EXTRAS,
    OPEN_CLIP_EXTRAS,
    computed,
    expected,
    single_file,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ldm.checkpoint.folder import ModelParts, load_folder, save_folder
from ldm.checkpoint.io import read_ckpt
from ldm.checkpoint.locate import safetensors_header
from ldm.checkpoint.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from ldm.checkpoint.single_file import load_single_file, open_clip_weights, save_single_file
from ldm.config import ScheduleConfig
from ldm.errors import CheckpointError, ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SD1, SD2 = DIALECTS["sd1"], DIALECTS["sd2 base"]
ATTENTION = UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
TOKENS = "embeddings.token_embedding.weight"
FUSED = OPEN_CLIP_PREFIX + "transformer.resblocks.0.attn.in_proj_bias"


def write(tensors, file, metadata=None):
    """As safetensors, or as a trainer's pickle."""
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata=metadata)
    else:
        torch.save({"state_dict": tensors, "global_step": 7, "callbacks": {}}, file)
    return file


def check(parts, dialect, dtype, *, average=False):
    assert parts.schedule.config.prediction_type == dialect.prediction
    references = expected(dialect, dtype, average=average)
    for name, result in computed(parts, dialect).items():
        assert references[name].std() > 0.01
        assert_close(result, references[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def refused(file, *words, **options):
    """In one line, with the file's name and these words."""
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load_single_file(file, **options)
    message = str(error.value)
    assert "\n" not in message and str(file) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tmp_path, dialect, dtype, suffix):
    dialect, dtype = DIALECTS[dialect], DTYPES[dtype]
    extras = CLIP_EXTRAS if dialect.version == 1 else OPEN_CLIP_EXTRAS
    file = write(single_file(dialect, dtype) | extras, tmp_path / f"model{suffix}")
    stored = load_single_file(file, prediction_type=dialect.prediction)
    for part in (stored.unet, stored.vae, stored.text_encoder):
        assert {p.dtype for p in part.parameters()} == {dtype}
    parts = load_single_file(file, prediction_type=dialect.prediction, dtype=torch.float32)
    check(parts, dialect, dtype)
    pad = parts.text_encoder.token_ids([""])[0, -1]
    assert pad == (599 if dialect.version == 1 else 0)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("ema", [None, True, False])
def test_ema_is_chosen(tmp_path, ema, suffix):
    tensors = single_file(SD1, ema=True) | EXTRAS
    parts = load_single_file(write(tensors, tmp_path / f"model{suffix}"), ema=ema)
    check(parts, SD1, torch.float32, average=ema is not False)
    raw = {name for name in tensors if name.startswith(UNET_PREFIX)}
    kept = raw | EXTRAS.keys() if ema is None else {n for n in EXTRAS if "model_ema" not in n}
    assert parts.left_over.keys() == kept


def test_ema_that_is_not_there(tmp_path):
    file = write(single_file(SD1) | EXTRAS, tmp_path / "model.safetensors")
    refused(file, "EMA", "--ema", ema=True)
    check(load_single_file(file, ema=False), SD1, torch.float32)
    half = single_file(SD1, ema=True)
    del half["model_ema.diffusion_modelout2bias"]
    refused(write(half, tmp_path / "half.ckpt"), "missing conv_out.bias")


def test_other_spellings(tmp_path):
    """Names of the text encoder without `text_model.`, attention of the VAE without a kernel."""
    tensors = {
        name.replace("transformer.text_model.", "transformer."): tensor.flatten(1)
        if ".attn_1." in name and tensor.ndim == 4
        else tensor
        for name, tensor in (single_file(SD1) | CLIP_EXTRAS).items()
    }
    check(load_single_file(write(tensors, tmp_path / "m.safetensors")), SD1, torch.float32)


@pytest.mark.parametrize(
    "names", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")]
)
def test_attention_of_the_vae_by_diffusers_names(tmp_path, names):
    """As diffusers' converter wrote it once; with both spellings, nobody knows which one counts."""
    old = dict(zip(("q", "k", "v", "proj_out"), names, strict=True))
    tensors = single_file(SD1)
    for name in [name for name in tensors if ".attn_1." in name and ".norm." not in name]:
        head, layer, kind = (
            name.replace("attn_1.", "attn_1 ")
            .replace(".weight", " weight")
            .replace(".bias", " bias")
            .split()
        )
        tensors[f"{head}.{old[layer]}.{kind}"] = tensors.pop(name).flatten(
            1 if kind == "weight" else 0
        )
    check(load_single_file(write(tensors, tmp_path / "m.safetensors")), SD1, torch.float32)
    key = VAE_PREFIX + "encoder.mid.attn_1.q.bias"
    refused(
        write(tensors | {key: torch.zeros(32)}, tmp_path / "two.safetensors"),
        "two names",
        "mid.attn_1.",
    )


def test_two_text_encoders(tmp_path):
    """Of which one would be dropped without a word."""
    key = CLIP_PREFIX + "final_layer_norm.bias"
    tensors = single_file(SD2, torch.float16) | {key: torch.zeros(2)}
    words = ("two text encoders", key, OPEN_CLIP_PREFIX)
    refused(write(tensors, tmp_path / "m.safetensors"), *words, prediction_type="epsilon")
    twice = single_file(SD1, torch.float16) | {key.replace(".text_model", ""): torch.zeros(2)}
    refused(write(twice, tmp_path / "m.ckpt"), "two names")


@pytest.mark.parametrize("layers", [22, 23, 24])
def test_depth_of_sd_2(tmp_path, layers):
    """Of 24 layers the last is not used, and may be left out. All layers here are one."""
    from open_clip.transformer import TextTransformer

    wide = TextTransformer(
        vocab_size=600, width=1024, heads=16, layers=1, mlp_ratio=1 / 16, output_dim=8
    )
    first = "transformer.resblocks.0."
    tensors = {k: v for k, v in single_file(SD2).items() if not k.startswith(OPEN_CLIP_PREFIX)}
    for name, tensor in wide.state_dict().items():
        repeats = range(layers) if name.startswith(first) else [0]
        for i in repeats:
            tensors[OPEN_CLIP_PREFIX + name.replace(first, f"transformer.resblocks.{i}.")] = tensor
    file = write(tensors, tmp_path / "m.ckpt")
    if layers == 22:
        return refused(file, "22 layers", "24, or 23", prediction_type="epsilon")
    parts = load_single_file(file, prediction_type="epsilon")
    assert parts.text_encoder.tower.layers == 23
    left = [name for name in parts.left_over if ".resblocks." in name]
    assert len(left) == (12 if layers == 24 else 0) and all(".23." in name for name in left)


def test_each_tensor_keeps_its_dtype(tmp_path):
    tensors = single_file(SD1, torch.float16)
    name = UNET_PREFIX + "time_embed.0.weight"
    tensors[name] = tensors[name].float() + 1e-6
    parts = load_single_file(write(tensors, tmp_path / "mixed.safetensors"))
    assert torch.equal(parts.unet.time_embedding.linear_1.weight, tensors[name])
    assert parts.unet.conv_in.weight.dtype == torch.float16


# What says what a U-Net of SD 2.x predicts.
SPEC_V = {"modelspec.prediction_type": "v"}
YAML = "model:\n  params:\n    linear_start: 0.00085\n"
YAML_V = YAML + '    parameterization: "v"\n'


@pytest.mark.parametrize(
    ("metadata", "neighbour", "options", "prediction"),
    [
        (SPEC_V, None, {}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, {}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, {}, "v_prediction"),
        (None, YAML, {}, "epsilon"),
        (None, YAML_V, {}, "v_prediction"),
        (None, YAML.replace("linear_start: 0.00085", "parameterization: x0"), {}, "sample"),
        (SPEC_V, YAML, {}, "v_prediction"),
        (SPEC_V, YAML, {"config": YAML}, "epsilon"),
        (SPEC_V, YAML_V, {"prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_prediction_type(tmp_path, metadata, neighbour, options, prediction):
    file = write(single_file(SD2, torch.float16), tmp_path / "sd2.safetensors", metadata)
    if neighbour:
        file.with_suffix(".yaml").write_text(neighbour)
    if "config" in options:
        (tmp_path / "other.yaml").write_text(options["config"])
        options = {"config": tmp_path / "other.yaml"}
    assert load_single_file(file, **options).schedule.config.prediction_type == prediction


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_prediction_type_that_nobody_says(tmp_path, suffix):
    file = write(single_file(SD2, torch.float16), tmp_path / f"sd2{suffix}")
    refused(file, "--prediction_type", "epsilon", "v_prediction")


def test_markers_of_trainers(tmp_path, caplog):
    """`v_pred` and `ztsnr` are empty tensors; they are written back."""
    names = ("v_pred", "ztsnr")
    markers = {name: torch.zeros(0) for name in names}
    for dialect in (SD1, SD2):
        tensors = single_file(dialect, torch.float16)
        parts = load_single_file(write(tensors | markers, tmp_path / "m.safetensors"))
        config = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        assert parts.schedule.config == config and not caplog.messages
        save_single_file(parts, tmp_path / "again.safetensors")
        again = load_single_file(tmp_path / "again.safetensors")
        assert again.schedule.config == config
        assert set(names) <= set(again.left_over)
    load_single_file(write(single_file(SD1, torch.float16), tmp_path / "plain.safetensors"))
    (message,) = caplog.messages
    assert "plain.safetensors does not say what its U-Net predicts" in message


def test_a_yaml_says_more(tmp_path):
    """The schedule, the scale of the latents and the heads."""
    file = write(single_file(SD1, torch.float16), tmp_path / "m.safetensors")
    file.with_suffix(".yaml").write_text(
        "model: {params: {linear_start: 0.001, linear_end: 0.02, timesteps: 500, scale_factor: 0.3,"
        " unet_config: {params: {num_heads: -1, num_head_channels: 16}}}}"
    )
    parts = load_single_file(file)
    assert parts.schedule.config == ScheduleConfig(500, beta_start=0.001, beta_end=0.02)
    assert parts.vae.config.scaling_factor == 0.3 and parts.unet.config.heads == (2, 4)


NO_YAML = {
    "foreign": ("name: my notes", "'model'"),
    "no mapping": ("model: 3", "not subscriptable"),
    "deep": ("model: " + "[" * 3000 + "]" * 3000, "recursion"),
    "aliases": ("a: &a {b: 1}\nmodel: {<<: [*a, *a], params: {}}", "aliases"),
}


@pytest.mark.parametrize(("text", "words"), NO_YAML.values(), ids=NO_YAML)
def test_a_yaml_of_something_else(tmp_path, caplog, text, words):
    """Beside the file it is left aside, with a warning; as --config it is a mistake."""
    file = write(single_file(SD1, torch.float16), tmp_path / "m.safetensors")
    (yaml := file.with_suffix(".yaml")).write_text(text)
    load_single_file(file, prediction_type="epsilon")
    assert f"{yaml} is no configuration in CompVis's layout" in caplog.text
    with pytest.raises(CheckpointError, match=f"m.yaml is no configuration .*{words}") as error:
        load_single_file(file, config=yaml)
    assert "\n" not in str(error.value)


def test_a_table_of_betas_is_the_schedule(tmp_path):
    tensors = single_file(SD1, torch.float16)
    usual = write(tensors | {"betas": BETAS.half()}, tmp_path / "usual.safetensors")
    assert load_single_file(usual).schedule.config == ScheduleConfig()
    betas = torch.linspace(0.001, 0.03, 300)
    other = load_single_file(write(tensors | {"betas": betas}, tmp_path / "other.ckpt")).schedule
    assert_close(other.betas, betas.double(), rtol=1e-6, atol=0)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_shape(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def with_key(name):
    return lambda tensors: tensors.update({name: torch.zeros(2)})


DAMAGE = {
    "U-Net, missing": (SD1, without(UNET_PREFIX + "out.2.bias"), "missing conv_out.bias"),
    "U-Net, what shapes it": (SD1, without(UNET_PREFIX + "input_blocks.0.0.weight"), "conv_in"),
    "U-Net, downsampler": (SD1, without(UNET_PREFIX + "input_blocks.2.0.op.bias"), "missing"),
    "U-Net, unexpected": (SD2, with_key(UNET_PREFIX + "out.3.bias"), "unexpected out.3.bias"),
    "U-Net, misshapen": (SD2, with_shape(UNET_PREFIX + "out.0.bias", 5), "norm_out.bias is (5,)"),
    "U-Net, no context": (SD1, without(ATTENTION), "--prediction_type"),
    "U-Net, odd context": (SD1, with_shape(ATTENTION, 64, 100), "--prediction_type"),
    "VAE, missing": (SD2, without(VAE_PREFIX + "quant_conv.bias"), "missing quant_conv.bias"),
    "VAE, what shapes it": (SD1, without(VAE_PREFIX + "decoder.conv_in.weight"), "decoder.conv_in"),
    "VAE, unexpected": (SD1, with_key(VAE_PREFIX + "decoder.x"), "unexpected decoder.x"),
    "VAE, misshapen": (
        SD1,
        with_shape(VAE_PREFIX + "encoder.mid.attn_1.q.weight", 32, 32, 3, 3),
        "to_q.weight is (32, 288), not (32, 32)",
    ),
    "CLIP, missing": (SD1, without(CLIP_PREFIX + "final_layer_norm.bias"), "missing final_layer"),
    "CLIP, what shapes it": (SD1, without(CLIP_PREFIX + TOKENS), "token_embedding"),
    "CLIP, unexpected": (SD1, with_key(CLIP_PREFIX + "x"), "unexpected x"),
    "CLIP, misshapen": (SD1, with_shape(CLIP_PREFIX + "final_layer_norm.bias", 3), "is (3,)"),
    "CLIP, small": (SD1, with_shape(CLIP_PREFIX + TOKENS, 100, 768), "vocabulary of 100"),
    "CLIP, narrow": (SD1, with_shape(CLIP_PREFIX + TOKENS, 600, 100), "width 100"),
    "OpenCLIP, missing": (SD2, without(FUSED), "missing encoder.layers.0.self_attn.q_proj.bias"),
    "OpenCLIP, unexpected": (SD2, with_key(OPEN_CLIP_PREFIX + "x"), "unexpected x"),
    "OpenCLIP, misshapen": (SD2, with_shape(FUSED, 30), "q_proj.bias is (10,)"),
    "U-Net, whole numbers": (
        SD1,
        lambda tensors: tensors.update({UNET_PREFIX + "out.2.bias": torch.zeros(4).int()}),
        "conv_out.bias is of torch.int32",
    ),
    "a scalar for a matrix": (SD1, with_shape(ATTENTION), "--prediction_type"),
    "U-Net, endless": (SD1, with_key(UNET_PREFIX + "input_blocks.300000.0.x"), "unexpected input"),
    "VAE, endless": (SD1, with_key(VAE_PREFIX + "encoder.down.3000000000.x"), "unexpected encoder"),
    "OpenCLIP, endless": (
        SD2,
        with_key(OPEN_CLIP_PREFIX + "transformer.resblocks.3000000.x"),
        "unexpected transformer.resblocks.3000000.x",
    ),
    "a key of nobody": (SD1, with_key("embedding_manager.x"), "embedding_manager.x"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("dialect", "damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_listed(tmp_path, dialect, damage, words, suffix):
    tensors = single_file(dialect, torch.float16)
    damage(tensors)
    prediction = "epsilon" if dialect is SD2 else None
    refused(write(tensors, tmp_path / f"m{suffix}"), words, prediction_type=prediction)


OTHERS = {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "SDXL",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "SD 3",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux",
    "model.diffusion_model.label_emb.0.0.weight": "unCLIP",
    "control_model.zero_convs.0.0.weight": "ControlNet",
    "depth_model.model.pretrained.cls_token": "depth",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": "LoRA",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "LoRA",
    "emb_params": "textual inversion",
    "down_blocks.0.resnets.0.conv1.weight": "component of a model folder",
    "text_model.encoder.layers.0.layer_norm1.weight": "component of a model folder",
    "decoder.conv_in.weight": "autoencoder alone",
    "anything": "has no U-Net",
}


@pytest.mark.parametrize(("key", "words"), OTHERS.items(), ids=OTHERS.values())
def test_other_kinds_of_files_are_named(tmp_path, key, words):
    """Before anything is read: the header is enough."""
    whole = single_file(SD1, torch.float16) if words in ("SDXL", "unCLIP", "depth") else {}
    refused(write(whole | {key: torch.zeros(2)}, tmp_path / "x.safetensors"), words)


def test_models_without_a_part(tmp_path):
    for prefix, part in ((VAE_PREFIX, "autoencoder"), ("cond_stage_model.", "text encoder")):
        tensors = single_file(SD1, torch.float16)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        refused(write(tensors, tmp_path / "part.safetensors"), f"has no {part}")


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("length", [0, 4, 1000, -1000])
def test_truncated_files(tmp_path, suffix, length):
    whole = write(single_file(SD1, torch.float16), tmp_path / f"whole{suffix}")
    torn = tmp_path / f"torn{suffix}"
    torn.write_bytes(whole.read_bytes()[:length])
    refused(torn, "is damaged (" if suffix == ".safetensors" else "is cut short")
    refused(tmp_path / f"nowhere{suffix}", "no file")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", ["os.system", "eval", "exec", "subprocess", "getattr"])
def test_nothing_in_a_pickle_is_run(tmp_path, function, zipped):
    import os
    import subprocess

    sentinel = tmp_path / "was-run"
    evil = {
        "os.system": Evil(os.system, f"touch {sentinel}"),
        "eval": Evil(eval, f"open({str(sentinel)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(sentinel)!r}, 'w')"),
        "subprocess": Evil(subprocess.call, ["touch", str(sentinel)]),
        "getattr": Evil(getattr, "x", "upper"),
    }[function]
    file = tmp_path / "evil.ckpt"
    torch.save(
        {"state_dict": single_file(SD1, torch.float16), "callbacks": evil}, file,
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    refused(file, "asks for", "nothing of it was run")
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(evil))  # which does run it
    assert sentinel.exists() == (function != "getattr")


def test_what_old_trainers_stored_is_inert(tmp_path, monkeypatch):
    """pytorch_lightning's callbacks, numpy's scalars, defaultdicts: none of it is imported."""
    import collections
    import sys
    import types

    import numpy as np

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = ModelCheckpoint
    callback = ModelCheckpoint()
    callback.best = np.float32(3)
    file = tmp_path / "old.ckpt"
    content = {
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.1), "callback": callback}},
        "optimizer_states": collections.defaultdict(dict, {1: torch.zeros(2)}),
        "state_dict": single_file(SD1),
    }
    torch.save(content, file)
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    check(load_single_file(file), SD1, torch.float32)


def test_archives_that_grow(tmp_path):
    """Compressed ones, and ones whose entries lie over each other."""
    whole = write({"x": torch.zeros(2**20)}, tmp_path / "whole.ckpt")
    assert read_ckpt(whole)["x"].shape == (2**20,)
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert bomb.stat().st_size < 2**18
    refused(bomb, "compressed")
    content = bytearray(whole.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = (2**31).to_bytes(4, "little") * 2
    bomb.write_bytes(content)
    refused(bomb, "more than its own size")
    (tmp_path / "list.ckpt").write_bytes(pickle.dumps([1, 2], 2))
    refused(tmp_path / "list.ckpt", "nothing that torch.save writes")
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "no dictionary of tensors")


def test_an_archive_has_one_end(tmp_path):
    """Else one reader checks what another does not read."""
    whole = write({"x": torch.zeros(100)}, tmp_path / "whole.ckpt").read_bytes()
    for name, tail in {"cut": whole[-22:-2], "twice": whole[-98:], "end": b"PK\5\6"}.items():
        file = tmp_path / f"{name}.ckpt"
        file.write_bytes(whole + tail)
        refused(file, "cut short, or has something behind its end")
    file = tmp_path / "two.ckpt"
    for evil in ("whole/data.pkl", "other/DATA.PKL"):
        file.write_bytes(whole)
        with (
            zipfile.ZipFile(file, "a") as archive,
            pytest.warns() if "whole" in evil else nullcontext(),
        ):
            archive.writestr(evil, b"")
        refused(file, "archive that torch.save did not write")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "kind", ["bytearray", "storage", "sparse", "meta", "quantized", "complex", "expanded"]
)
def test_what_no_plain_weights_are(tmp_path, kind, zipped):
    """It takes memory that the file does not have, or computes in another way."""
    x = torch.eye(4)
    content, words = {
        "bytearray": (Evil(bytearray, 2**40), "asks for builtins.bytearray"),
        "storage": (Evil(torch.FloatTensor, 2**40), "asks for torch.FloatTensor"),
        "sparse": (x.to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
        "meta": (x.to("meta"), "asks for torch._utils._rebuild_meta_tensor_no_storage"),
        "quantized": (
            torch._empty_affine_quantized([4], scale=1.0, zero_point=0, dtype=torch.qint8),
            "asks for torch._utils._rebuild_qtensor",
        ),
        "complex": (x.cfloat(), "betas is no plain tensor"),
        "expanded": (torch.zeros(1).expand(10**6, 10**6), "betas claims more numbers"),
    }[kind]
    file = tmp_path / "m.ckpt"
    tensors = single_file(SD1, torch.float16) | {"betas": content}
    torch.save({"state_dict": tensors}, file, _use_new_zipfile_serialization=zipped)
    refused(file, words)


def test_a_damaged_pickle_gets_no_advice_of_torch(tmp_path):
    """Which is to run the file's code."""
    import collections

    file = tmp_path / "m.ckpt"
    torch.save(single_file(SD1) | {"x": collections.defaultdict(Evil, {})}, file, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="m.ckpt cannot be read as weights") as error:
        load_single_file(file)
    assert not any(word in str(error.value) for word in ("weights_only", "torch.load", "\x1b"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4265380512\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_are_something_else(tmp_path, suffix):
    file = tmp_path / f"m{suffix}"
    for content, words in ((POINTER, "git-lfs"), (b"\n<!DOCTYPE html>", "a web page")):
        file.write_bytes(content)
        refused(file, words)
    other = ".ckpt" if suffix == ".safetensors" else ".safetensors"
    content = write(single_file(SD1, torch.float16), tmp_path / f"other{other}").read_bytes()
    file.write_bytes(content)
    refused(file, f"rename it to {other}")


def same(a, b):
    """Bit for bit, dtypes included."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(
    ("dialect", "dtype"),
    [("sd1", "fp16"), ("sd1 inpainting", "bf16"), ("sd2 base", "fp32"), ("sd2 v", "fp16")],
)
def test_single_folder_single(tmp_path, dialect, ema, dtype):
    dialect = DIALECTS[dialect]
    tensors = single_file(dialect, DTYPES[dtype], ema=ema)
    tensors |= {name: tensor for name, tensor in EXTRAS.items() if ema or "model_ema" not in name}
    tensors |= CLIP_EXTRAS if dialect.version == 1 else OPEN_CLIP_EXTRAS
    file = write(tensors, tmp_path / "a.safetensors")
    parts = load_single_file(file, prediction_type=dialect.prediction)
    save_folder(parts, tmp_path / "folder")
    assert (tmp_path / "folder/unet/diffusion_pytorch_model.non_ema.safetensors").exists() == ema
    save_single_file(load_folder(tmp_path / "folder", ema=None), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
    again = load_single_file(tmp_path / "b.safetensors")  # which now says what it predicts
    assert again.schedule.config == parts.schedule.config


def contents(folder):
    return {
        f"{file.parent.name}/{file.name}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_folder_single_folder(tmp_path, tiny_pipeline, act):
    """A tiny model, of heads that no shape tells; with gelu its text encoder is open_clip's."""
    parts = ModelParts(**tiny_pipeline.components)
    save_folder(parts, tmp_path / "a")
    config = tmp_path / "a/text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": act}))
    save_single_file(load_folder(tmp_path / "a"), tmp_path / "m.safetensors")
    back = load_single_file(tmp_path / "m.safetensors")
    save_folder(back, tmp_path / "b")
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    extra = {name for name in after if "single_file_extras" in name}
    same(before, {name: tensor for name, tensor in after.items() if name not in extra})
    assert bool(extra) == (act == "gelu")  # the layer after the last, which tools look for
    assert back.text_encoder.tower.model.config.hidden_act == act
    assert back.schedule.config == parts.schedule.config and back.defaults == parts.defaults
    assert back.unet.config == load_folder(tmp_path / "a").unet.config
    assert back.vae.config == parts.vae.config
    names = load_file(tmp_path / "m.safetensors")
    if act == "gelu":
        layers = [f"{OPEN_CLIP_PREFIX}transformer.resblocks.{i}.ln_1.weight" for i in (1, 2)]
        assert torch.equal(*(names[layer] for layer in layers))
    words = ["a red flower", "붉은 꽃"]
    ids = tiny_pipeline.text_encoder.token_ids(words)
    assert torch.equal(back.text_encoder.token_ids(words), ids)


def test_a_folder_keeps_no_extras_of_an_older_model(tmp_path, tiny_pipeline):
    parts = ModelParts(**tiny_pipeline.components)
    save_folder(parts._replace(left_over={"betas": torch.zeros(3)}), tmp_path / "m")
    assert load_folder(tmp_path / "m").left_over.keys() == {"betas"}
    save_folder(parts, tmp_path / "m")
    assert not load_folder(tmp_path / "m").left_over


def test_open_clip_weights_need_open_clip(tmp_path):
    file = write(single_file(SD1, torch.float16), tmp_path / "sd1.safetensors")
    with pytest.raises(CheckpointError, match="no text encoder of open_clip"):
        open_clip_weights(file)


def test_metadata_that_is_damaged(tmp_path):
    tensors = single_file(SD1, torch.float16)
    for text in ("{", "{}", '{"unet": 3}', "[]", "[" * 100_000):
        refused(write(tensors, tmp_path / "m.safetensors", {"ldm": text}), "metadata is damaged")


WRONG = {
    "text_encoder, act": ("text_encoder", {"hidden_act": "nope"}, "hidden_act is 'nope'"),
    "text_encoder, positions": (
        "text_encoder",
        {"max_position_embeddings": 3 * 10**8},
        "300000000",
    ),
    "text_encoder": ("text_encoder", 3, "metadata is damaged"),
    "unet, word": ("unet", {"layers_per_block": "2"}, "layers_per_block is '2'"),
    "unet, many": ("unet", {"layers_per_block": 3000}, "layers_per_block is '3000'"),
    "vae": ("vae", {"block_out_channels": [32] * 17}, "block_out_channels"),
    "schedule": ("schedule", {"num_train_timesteps": 2 * 10**9}, "num_train_timesteps"),
    "defaults": ("defaults", 3, "metadata is damaged"),
    "pad_token, number": ("pad_token", 3, "metadata is damaged"),
    "pad_token, none": ("pad_token", "nope", "word 'nope' is none of the text encoder's 1000"),
}


@pytest.mark.parametrize(("part", "change", "words"), WRONG.values(), ids=WRONG)
def test_metadata_that_is_wrong(tmp_path, tiny_pipeline, part, change, words):
    save_single_file(ModelParts(**tiny_pipeline.components), tmp_path / "m.safetensors")
    ours = json.loads(safetensors_header(tmp_path / "m.safetensors")[1]["ldm"])
    ours[part] = ours[part] | change if isinstance(change, dict) else change
    metadata = {"ldm": json.dumps(ours)}
    tensors = load_file(tmp_path / "m.safetensors")
    refused(write(tensors, tmp_path / "wrong.safetensors", metadata), words)


def test_metadata_chooses_no_code(tmp_path, tiny_pipeline):
    """transformers fetches kernels for some words in `attn_implementation`."""
    save_single_file(ModelParts(**tiny_pipeline.components), tmp_path / "m.safetensors")
    ours = json.loads(safetensors_header(tmp_path / "m.safetensors")[1]["ldm"])
    evil = {"attn_implementation": "evil/repo", "_attn_implementation": "evil/repo"}
    ours["text_encoder"] |= evil | {"return_dict": False}
    tensors = load_file(tmp_path / "m.safetensors")
    file = write(tensors, tmp_path / "evil.safetensors", {"ldm": json.dumps(ours)})
    config = load_single_file(file).text_encoder.tower.model.config
    assert config == tiny_pipeline.text_encoder.tower.model.config
