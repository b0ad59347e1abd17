"""Model folders travel both ways between ldm and diffusers, and the picture stays the same.

Largest difference allowed: 2 of 255 levels, from the same latents (or, last, from the same seed).
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from clips import their_tokenizer
from tiny import CLIP, make_pipeline, randomize
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint.tokenizer import clip_tokenizer
from ldm.config import ScheduleConfig
from ldm.pipeline import LatentDiffusionPipeline

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE = tuple(np.linspace(0.01, 0.2, 50).tolist())
PROMPTS = ["a red flower", "two blue tulips at night"]
NEGATIVE = ["blurry, grey", "a red flower"]
CALL = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}


def noise(count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def open_diffusers(folder, sampler, **options):
    """The folder in diffusers, drawing with its scheduler of the same name."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **options)
    if not isinstance(pipe.scheduler, SCHEDULERS[sampler]):
        # where a file does not say, DDIM clips x0, which is for pixels
        config = pipe.scheduler.config | {"clip_sample": False}
        pipe.scheduler = SCHEDULERS[sampler].from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_ldm(folder, **options):
    pipe = LatentDiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_picture(mine, reference):
    assert mine.shape == reference.shape
    assert reference.std() > 0.05 and np.mean((reference == 0) | (reference == 1)) < 0.2
    assert np.abs(mine - reference).max() <= 2 / 255


def assert_draw_alike(mine, theirs, sampler="ddim"):
    latents, words = noise(), {"negative_prompt": NEGATIVE}
    image = mine(PROMPTS, **words, sampler=sampler, latents=latents, **CALL).images
    assert_same_picture(image, theirs(PROMPTS, **words, latents=latents, **CALL).images)
    other = mine(PROMPTS, sampler=sampler, latents=latents, **CALL).images
    assert np.abs(image - other).max() > 4 / 255  # what is compared depends on the words


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_saved_by_ldm_opens_in_diffusers(tiny_pipeline, tiny_model_folder, sampler):
    assert_draw_alike(tiny_pipeline, open_diffusers(tiny_model_folder, sampler), sampler)


@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        (ScheduleConfig(prediction_type="v_prediction"), "ddim"),
        (ScheduleConfig(prediction_type="v_prediction"), "euler"),
        (ScheduleConfig(timestep_spacing="trailing"), "ddim"),
        (
            ScheduleConfig(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
            ),
            "ddim",
        ),
        (ScheduleConfig(beta_schedule="cosine_signal_rates"), "ddim"),
        (ScheduleConfig(beta_schedule="cosine_signal_rates"), "dpmpp_2m"),
        (ScheduleConfig(beta_schedule="squaredcos_cap_v2"), "euler"),
        (ScheduleConfig(num_train_timesteps=50, trained_betas=TABLE, steps_offset=1), "ddim"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.beta_schedule,
)
def test_every_schedule_travels(tmp_path, config, sampler):
    mine = make_pipeline(config)
    mine.save_pretrained(tmp_path)
    assert_draw_alike(mine, open_diffusers(tmp_path, sampler), sampler)
    assert_draw_alike(open_ldm(tmp_path), open_diffusers(tmp_path, sampler), sampler)


KARRAS = {"use_karras_sigmas": True, "prediction_type": "v_prediction"}


def diffusers_pipeline():
    """A model of diffusers' own classes, in the manner of Stable Diffusion 2."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.31,
    )
    tower = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=998,
            eos_token_id=999,
            pad_token_id=999,
            hidden_act="gelu",
        )
    )
    for module in (unet, vae, tower):
        randomize(module)
        module.eval()
    return diffusers.StableDiffusionPipeline(
        vae,
        tower,
        their_tokenizer(clip_tokenizer(CLIP.vocab_size)),
        unet,
        diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        None,
        None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        (diffusers.DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1), "ddim"),
        (diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction"), "ddim"),
        (diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1), "ddim"),
        (diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1), "dpmpp_2m"),
        (diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"), "euler"),
        (diffusers.EulerDiscreteScheduler(**BETAS, **KARRAS), "euler"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, steps_offset=1), "dpmpp_2m"),
        (diffusers.DPMSolverMultistepScheduler(**BETAS, **KARRAS), "dpmpp_2m"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_saved_by_diffusers_opens_in_ldm(tmp_path, scheduler, sampler):
    diffusers_pipeline().save_pretrained(tmp_path)
    scheduler.save_pretrained(tmp_path / "scheduler")  # as it is: the pipeline would change it
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"][1] = type(scheduler).__name__
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert_draw_alike(open_ldm(tmp_path), open_diffusers(tmp_path, sampler), sampler)


def test_half_precision_folder_of_diffusers(tmp_path):
    diffusers_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    reference = open_diffusers(tmp_path, "ddim", variant="fp16", torch_dtype=torch.float32)
    mine = open_ldm(tmp_path, variant="fp16")
    assert_draw_alike(mine, reference)
    weight = open_ldm(tmp_path, variant="fp16", torch_dtype=torch.bfloat16).unet.conv_in.weight
    assert torch.equal(weight, mine.unet.conv_in.weight.bfloat16())


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmpp_2m"])
def test_a_seed_draws_what_a_generator_draws_in_diffusers(
    tiny_pipeline, tiny_model_folder, sampler
):
    theirs = open_diffusers(tiny_model_folder, sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = theirs(PROMPTS, generator=generators, **CALL).images
    assert_same_picture(tiny_pipeline(PROMPTS, seed=7, sampler=sampler, **CALL).images, expected)


def test_options_of_the_call_mean_the_same(tiny_pipeline, tiny_model_folder):
    """Rescaled guidance, another size, pictures a prompt, context instead of words."""
    theirs = open_diffusers(tiny_model_folder, "ddim")
    options = {"guidance_rescale": 0.6, "height": 24, "width": 48, "num_images_per_prompt": 2}
    latents = torch.randn(4, 4, 6, 12, generator=torch.Generator().manual_seed(3))
    call = {**CALL, **options, "latents": latents}
    mine = tiny_pipeline(PROMPTS, negative_prompt="grey", **call).images
    assert_same_picture(mine, theirs(PROMPTS, negative_prompt=["grey"] * 2, **call).images)
    plain = tiny_pipeline(PROMPTS, negative_prompt="grey", **call | {"guidance_rescale": 0.0})
    assert np.abs(mine - plain.images).max() > 4 / 255
    context = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(4))
    embeds = {"prompt_embeds": context, "negative_prompt_embeds": context.flip(0)}
    assert_same_picture(
        tiny_pipeline(**embeds, latents=noise(), **CALL).images,
        theirs(**embeds, latents=noise(), **CALL).images,
    )


def test_eta_of_ddim(tiny_pipeline, tiny_model_folder):
    theirs = open_diffusers(tiny_model_folder, "ddim")
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = theirs(PROMPTS, generator=generators, eta=1.0, **CALL).images
    assert_same_picture(tiny_pipeline(PROMPTS, seed=7, eta=1.0, **CALL).images, expected)
