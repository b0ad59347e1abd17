"""The configurations of a model folder come back as they went, and diffusers' are the same."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch

from ldm.checkpoint.folder import (
    ModelParts,
    load_defaults,
    load_folder,
    load_schedule,
    load_text_encoder,
    load_unet,
    load_vae,
    save_folder,
    save_index,
    save_schedule,
    save_unet,
    save_vae,
)
from ldm.config import PRESETS, AutoencoderConfig, ScheduleConfig, UNetConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import CheckpointError, LdmError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention=(True, False),
    cross_attention_dim=12,
    num_attention_heads=2,
    norm_num_groups=4,
)
UNETS = {
    "one number of heads": SMALL,
    "heads by level": replace(SMALL, num_attention_heads=(2, 4)),
    "heads by width": replace(SMALL, num_attention_heads=None, attention_head_dim=4),
    "linear, nine channels": replace(SMALL, use_linear_projection=True, in_channels=9),
    "attention below": replace(SMALL, cross_attention=(False, True), norm_eps=1e-6),
    "two transformers": replace(SMALL, transformer_layers_per_block=2, layers_per_block=2),
    "upcast": replace(SMALL, upcast_attention=True, out_channels=8),
}
VAES = {
    "f2": AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1),
    "shifted": AutoencoderConfig(
        block_out_channels=(4, 4, 8), norm_num_groups=2, shift_factor=0.1, scaling_factor=0.5
    ),
    "no attention": AutoencoderConfig(
        block_out_channels=(4, 8), norm_num_groups=4, mid_block_add_attention=False,
        latent_channels=3, sample_size=40,
    ),
}  # fmt: skip
SCHEDULES = {
    "sd": ScheduleConfig(),
    "v, zero snr": ScheduleConfig(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "karras": ScheduleConfig(timestep_spacing="karras"),
    "beta": ScheduleConfig(timestep_spacing="beta"),
    "cosine": ScheduleConfig(
        beta_schedule="cosine_signal_rates", min_signal_rate=0.03, max_signal_rate=0.9
    ),
    "cosine, karras": ScheduleConfig(
        beta_schedule="cosine_signal_rates", timestep_spacing="karras", clip_sample=True
    ),
    "table": ScheduleConfig(num_train_timesteps=3, trained_betas=(0.1, 0.25, 0.5), steps_offset=0),
    "table over cosine": ScheduleConfig(
        num_train_timesteps=2, beta_schedule="cosine_signal_rates", trained_betas=(0.1, 0.25)
    ),
    "squared cosine": ScheduleConfig(beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True),
    "large variance": ScheduleConfig(variance_type="fixed_large"),
    "learned variance": ScheduleConfig(variance_type="learned_range", timestep_spacing="trailing"),
}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS.keys())
def test_unet_round_trip(tmp_path, config):
    """Heads are stored by count, so a width comes back as counts that split the same way."""
    unet = UNet(config)
    save_unet(unet, tmp_path)
    back = load_unet(tmp_path)
    assert back.config.heads == config.heads
    heads = {"num_attention_heads": None, "attention_head_dim": 1}
    assert replace(back.config, **heads) == replace(config, **heads)
    assert not back.training
    for name, value in unet.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(theirs.conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("config", VAES.values(), ids=VAES.keys())
def test_vae_round_trip(tmp_path, config):
    vae = AutoencoderKL(config)
    save_vae(vae, tmp_path)
    back = load_vae(tmp_path, dtype=torch.bfloat16)
    assert back.config == config
    for name, value in vae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.bfloat16())
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(theirs.quant_conv.weight, vae.quant_conv.weight)
    assert theirs.config.scaling_factor == config.scaling_factor


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedule_round_trip(tmp_path, config):
    schedule = NoiseSchedule(config)
    save_schedule(schedule, tmp_path)
    back = load_schedule(tmp_path)
    assert back.config == config
    assert torch.equal(back.alphas_cumprod, schedule.alphas_cumprod)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    # theirs is float32, and sets the last alpha of a zero-SNR table to 0
    torch.testing.assert_close(
        theirs.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-4, atol=1e-7
    )


def their_unet(config, **options):
    """diffusers' U-Net of the same architecture, spelt as Stable Diffusion's own folders do."""
    cross = config.cross_attention
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=config.sample_size,
            block_out_channels=config.block_out_channels,
            down_block_types=[f"{'CrossAttn' if c else ''}DownBlock2D" for c in cross],
            up_block_types=[f"{'CrossAttn' if c else ''}UpBlock2D" for c in cross[::-1]],
            cross_attention_dim=config.cross_attention_dim,
            **options,
        )


SD = {
    "sd15": {"attention_head_dim": 8},
    "sd21": {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sd21-v": {
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}


@pytest.mark.parametrize("name", SD)
def test_presets_are_written_as_diffusers_writes_them(tmp_path, monkeypatch, name):
    monkeypatch.setattr("ldm.checkpoint.folder.write_tensors", lambda *_: None)  # gigabytes
    preset = PRESETS[name]
    with torch.device("meta"):
        unet, vae = UNet(preset.unet), AutoencoderKL(preset.vae)
    save_unet(unet, tmp_path / "unet")
    save_vae(vae, tmp_path / "vae")
    with torch.device("meta"):
        their_vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
            sample_size=preset.vae.sample_size,
        )
    for part, theirs, mine in (
        ("unet", their_unet(preset.unet, **SD[name]), unet),
        ("vae", their_vae, vae),
    ):
        written = json.loads((tmp_path / part / "config.json").read_text())
        expected = json.loads(theirs.to_json_string())
        assert written["_class_name"] == expected["_class_name"]
        for key, value in written.items():
            if not key.startswith("_"):
                assert value == expected[key], key
        # what we leave out, diffusers fills in with the default that it has here
        left_out = {k: v for k, v in expected.items() if k not in written and k[0] != "_"}
        defaults = json.loads(type(theirs)(**SMALLEST[part]).to_json_string())
        assert left_out == {k: defaults[k] for k in left_out}
        assert {k: v.shape for k, v in mine.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


SMALLEST = {
    "unet": {"block_out_channels": (32,) * 4, "attention_head_dim": 8, "cross_attention_dim": 8},
    "vae": {},
}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "num_class_embeds", 1),
        ("unet", "conv_in_kernel", 5),
        ("unet", "mid_block_type", None),
        ("unet", "dropout", 0.1),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ("unet", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("unet", "transformer_layers_per_block", [1, 2]),
        ("unet", "reverse_transformer_layers_per_block", [1, 2]),
        ("unet", "layers_per_block", [1, 2]),
        ("unet", "cross_attention_dim", [12, 16]),
        ("unet", "block_out_channels", [8, 17]),
        ("vae", "act_fn", "relu"),
        ("vae", "use_quant_conv", False),
        ("vae", "latents_mean", [0.0, 0.1, 0.2, 0.3]),
        ("vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("vae", "scaling_factor", -1),
        ("unet", "layers_per_block", 3000),
        ("unet", "block_out_channels", [8] * 17),
        ("unet", "block_out_channels", ["a", "b"]),
        ("unet", "norm_eps", "x"),
        ("unet", "use_linear_projection", "no"),
        ("unet", "sample_size", True),
        ("unet", "num_attention_heads", 2.0),
        ("unet", "down_block_types", 5),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "latent_channels", "4"),
    ],
)
def test_unknown_options_are_refused_by_name(tmp_path, part, key, value):
    if part == "unet":
        save_unet(UNet(SMALL), tmp_path)
    else:
        save_vae(AutoencoderKL(VAES["f2"]), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    name = "block" if part == "unet" and key.endswith("block_types") else key
    with pytest.raises(LdmError, match=name) as error:
        load_unet(tmp_path) if part == "unet" else load_vae(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "exponential"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "random"),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 2 * 10**9),
        ("num_train_timesteps", "1000"),
        ("beta_start", "x"),
        ("_ldm", 3),
    ],
)
def test_unknown_schedules_are_refused_by_name(tmp_path, key, value):
    save_schedule(NoiseSchedule(ScheduleConfig()), tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(
        LdmError, match=f"{key} .*{'no object' if key == '_ldm' else value}"
    ) as error:
        load_schedule(tmp_path)
    assert "\n" not in str(error.value)


def test_a_schedule_of_other_tools_is_read_as_diffusers_pipeline_does(tmp_path):
    """Which sets `steps_offset` and `clip_sample` aside."""
    diffusers.DDIMScheduler().save_pretrained(tmp_path)
    schedule = load_schedule(tmp_path).config
    assert schedule.beta_schedule == "linear" and schedule.beta_end == 0.02
    assert schedule.steps_offset == 1 and not schedule.clip_sample and schedule.set_alpha_to_one
    for spacing in ("karras", "exponential", "beta"):
        options = {f"use_{spacing}_sigmas": True, "timestep_spacing": "trailing"}
        diffusers.EulerDiscreteScheduler(**options).save_pretrained(tmp_path)
        assert load_schedule(tmp_path).config.timestep_spacing == spacing


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learned_range", "learned_range"),
        ("fixed_large", "fixed_large"),
        ("fixed_small_log", "fixed_small"),  # the same numbers, by way of their logarithms
    ],
)
def test_variance_types_of_diffusers(tmp_path, theirs, ours):
    diffusers.DDPMScheduler(variance_type=theirs).save_pretrained(tmp_path)
    assert load_schedule(tmp_path).config.variance_type == ours


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_what_a_schedulers_file_leaves_out_is_its_classs_own(tmp_path, name):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "num_train_timesteps": 1000}))
    ours, theirs = load_schedule(tmp_path).config, getattr(diffusers, name)().config
    for key in ("beta_schedule", "beta_start", "beta_end", "timestep_spacing", "prediction_type"):
        assert getattr(ours, key) == theirs[key], key
    assert ours.set_alpha_to_one == theirs.get("set_alpha_to_one", False)


def test_index_keeps_defaults(tmp_path):
    save_index(tmp_path, {"guidance_scale": 3.0})
    assert load_defaults(tmp_path) == {"guidance_scale": 3.0}
    index = diffusers.StableDiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "nope", "hidden_act is 'nope'; .*Choose from: gelu, quick_gelu"),
        ("num_attention_heads", 7, "width of 32 cannot be split into 7 attention heads"),
        ("intermediate_size", 0, "sizes must be 1 or more"),
        ("hidden_size", "32", "hidden_size is '32'"),
        ("num_hidden_layers", 1000, "num_hidden_layers is '1000'"),
        ("max_position_embeddings", 3 * 10**8, "max_position_embeddings is '300000000'"),
        ("max_position_embeddings", 10**5, r"is \(77, 32\), not \(100000, 32\)"),
        ("model_type", "bert", "model_type is 'bert'"),
    ],
)
def test_text_encoders_that_are_none(tmp_path, tiny_model_folder, key, value, words):
    with pytest.raises(CheckpointError, match=words) as error:
        load_text_encoder(text_encoder_with(tmp_path, tiny_model_folder, {key: value}))
    assert "\n" not in str(error.value)


def text_encoder_with(tmp_path, folder, changes):
    folder = shutil.copytree(folder, tmp_path / "model")
    file = folder / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_chooses_no_code(tmp_path, tiny_model_folder, name):
    """transformers fetches kernels for some words here; we take nothing but numbers."""
    changes = {name: "evil/repo", "return_dict": False, "output_attentions": True}
    text = load_text_encoder(text_encoder_with(tmp_path, tiny_model_folder, changes))
    plain = load_text_encoder(tiny_model_folder)
    assert text.tower.model.config == plain.tower.model.config
    assert torch.equal(text.encode(["a"]), plain.encode(["a"]))


def test_a_half_written_folder_does_not_open(tmp_path, tiny_pipeline, monkeypatch):
    """Else it would be a mixture of two models."""
    parts = ModelParts(**tiny_pipeline.components)
    save_folder(parts, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.checkpoint.folder.save_vae", full)
    with pytest.raises(OSError, match="No space"):
        save_folder(parts, tmp_path)
    with pytest.raises(CheckpointError, match="no file .*model_index.json"):
        load_folder(tmp_path)
    monkeypatch.undo()
    save_folder(parts, tmp_path)
    load_folder(tmp_path)


@pytest.mark.parametrize("ours", [None, [], 3, {"defaults": 3}])
def test_an_index_of_another_shape(tmp_path, ours):
    (tmp_path / "model_index.json").write_text(json.dumps({"_ldm": ours}))
    with pytest.raises(CheckpointError, match="model_index.json is damaged .its _ldm"):
        load_defaults(tmp_path)


def test_missing_parts_are_named(tmp_path, tiny_model_folder):
    with pytest.raises(CheckpointError, match=r"no file .*model_index.json"):
        load_defaults(tmp_path)
    with pytest.raises(CheckpointError, match=r"no file .*unet/config.json"):
        load_unet(tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"no file .*text_encoder/config.json"):
        load_text_encoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no file .*model.fp16.safetensors"):
        load_unet(tiny_model_folder / "unet", variant="fp16")


def test_autoencoders_of_before_diffusers_0_17(tmp_path):
    """Their attention layers have other names."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4))
    save_vae(vae, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, name in old.items():
        for side in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                place = f"{side}.mid_block.attentions.0"
                tensors[f"{place}.{name}.{kind}"] = tensors.pop(f"{place}.{new}.{kind}")
    save_file(tensors, file)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ours = load_vae(tmp_path)(images)[0]
        torch.testing.assert_close(ours, theirs(images).sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, vae(images)[0], rtol=1e-5, atol=1e-5)
