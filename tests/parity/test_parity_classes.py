"""A model with classes and a learned variance: its files and its pictures against diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tiny import UNET, make_pipeline, randomize

from ldm.checkpoint.folder import ModelParts
from ldm.checkpoint.single_file import save_single_file
from ldm.config import ScheduleConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import image_generator, image_noise

SCHEDULE = ScheduleConfig(variance_type="learned_range", steps_offset=0)
PROMPTS = ["a red rose", "two blue tulips"]


@pytest.fixture(scope="module")
def pipeline():
    """Three classes, and a fourth row for none."""
    tiny = make_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet(replace(UNET, num_class_embeds=4, out_channels=8)).eval()
        randomize(unet)
    made = LatentDiffusionPipeline(
        **tiny.components | {"unet": unet, "schedule": NoiseSchedule(SCHEDULE)}
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "classes"
    pipeline.save_pretrained(folder)
    return folder


def draw(pipeline, prompts=PROMPTS, **options):
    options = {"seed": 5, "num_inference_steps": 6, "sampler": "ddpm"} | options
    return pipeline(prompts, output_type="latent", **options).images


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@torch.no_grad()
def test_ancestral_sampling(pipeline, folder, scale, variance):
    """As in diffusers' DiTPipeline: the mean is guided, the variance is the conditional half's."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    saved = DDPMScheduler.load_config(folder / "scheduler")
    assert saved["variance_type"] == "learned_range"
    scheduler = DDPMScheduler.from_config(saved, variance_type=variance)
    *contexts, none = pipeline.encode_prompts([*PROMPTS, ""])
    scheduler.set_timesteps(6)
    for i, label in enumerate([2, 0]):
        generator = image_generator(5 + i)
        x = image_noise(generator, (1, 4, 8, 8))
        for t in scheduler.timesteps:
            both = torch.stack([contexts[i], none])
            output = unet(x.repeat(2, 1, 1, 1), t, both, torch.tensor([label, 3])).sample
            (mean, uncond), (spread, _) = output[:, :4], output[:, 4:]
            mean = uncond + scale * (mean - uncond)
            if variance == "learned_range":
                mean = torch.cat([mean, spread])
            x = scheduler.step(mean[None], t, x, generator=generator).prev_sample
        mine = draw(
            pipeline,
            guidance_scale=scale,
            class_labels=[2, 0],
            variance=None if variance == "learned_range" else variance,
        )
        torch.testing.assert_close(mine[i : i + 1], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_files_hold_all_of_it(pipeline, folder, tmp_path, kind):
    if kind == "folder":
        again = LatentDiffusionPipeline.from_pretrained(folder)
        index = (folder / "model_index.json").read_text()
        assert '"DDPMScheduler"' in index
    else:
        file = tmp_path / "one.safetensors"
        save_single_file(ModelParts(**pipeline.components), file)
        again = LatentDiffusionPipeline.from_pretrained(file)
    again.set_progress_bar_config(disable=True)
    assert again.schedule.config == SCHEDULE and again.unet.config.num_class_embeds == 4
    for options in ({}, {"sampler": "dpmpp_2m", "class_labels": 1}):
        assert torch.equal(draw(again, **options), draw(pipeline, **options))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_others_see_the_mean_alone(pipeline, sampler):
    """The same pictures as of the network whose last layer has no second half."""
    plain = UNet(replace(pipeline.unet.config, out_channels=4)).eval()
    weights = dict(pipeline.unet.state_dict())
    weights |= {name: weights[name][:4] for name in ("conv_out.weight", "conv_out.bias")}
    plain.load_state_dict(weights)
    schedule = NoiseSchedule(replace(SCHEDULE, variance_type="fixed_small"))
    other = LatentDiffusionPipeline(**pipeline.components | {"unet": plain, "schedule": schedule})
    other.set_progress_bar_config(disable=True)
    options = {"sampler": sampler, "class_labels": [1, 2], "guidance_rescale": 0.7}
    torch.testing.assert_close(
        draw(pipeline, **options), draw(other, **options), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ConfigError, match="variance is learned_range, which this model lacks"):
        draw(other, sampler="ddpm", variance="learned_range")
    with pytest.raises(
        ConfigError, match="gives 8, .*variance_type learned_range, not fixed_small"
    ):
        LatentDiffusionPipeline(**pipeline.components | {"schedule": schedule})


def test_classes_of_a_call(pipeline):
    """One for all or one a prompt, as of pictures drawn alone; each picture tells its own."""
    options = {"num_images_per_prompt": 2, "num_inference_steps": 3}
    result = pipeline(PROMPTS, seed=5, class_labels=[2, 0], output_type="latent", **options)
    assert result.settings["class_labels"] == [2, 2, 0, 0]
    for i in range(4):
        own = result.settings_of(i)
        assert own["class_labels"] == [2, 2, 0, 0][i]
        alone = pipeline(PROMPTS[i // 2], output_type="latent", **own).images[0]
        torch.testing.assert_close(alone, result.images[i], rtol=1e-3, atol=1e-3)
    same = [draw(pipeline, class_labels=labels) for labels in (1, [1], [1, 1], np.int32([1]))]
    assert all(torch.equal(same[0], other) for other in same[1:])
    pieces = draw(pipeline, class_labels=[2, 0], batch_size=1)
    torch.testing.assert_close(draw(pipeline, class_labels=[2, 0]), pieces, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(draw(pipeline), same[0], atol=1e-2)
    interval = {"guidance_interval": (0.5, 4.0), "class_labels": [1, 2]}
    assert draw(pipeline, **interval).isfinite().all()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (3, "class_labels is 3; this model has classes 0 to 2"),
        ([0, -1], "classes 0 to 2"),
        ([0.5, 1], "classes 0 to 2"),
        ("a", "class_labels is a; this model has classes 0 to 2"),
        ([[0, 1], [2]], "classes 0 to 2"),
        ([True, False], "classes 0 to 2"),
        (2**70, "classes 0 to 2"),
        (np.array([2**63, 0], np.uint64), "classes 0 to 2"),
        (np.full((40, 40), 7), "classes 0 to 2"),
        ([0, 1, 2], "3 class_labels for 2 pictures"),
    ],
)
def test_classes_that_are_not_there(pipeline, labels, words):
    with pytest.raises(ConfigError, match=words) as error:
        draw(pipeline, class_labels=labels)
    assert "\n" not in str(error.value)


def test_a_model_without_classes(tiny_pipeline):
    with pytest.raises(ConfigError, match="class_labels is 0; this model has no classes"):
        tiny_pipeline("a", class_labels=0)
