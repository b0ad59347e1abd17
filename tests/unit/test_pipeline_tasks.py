"""Image to image, inpainting, variations, interpolation and strips, on a tiny model."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import UNET, make_pipeline, randomize

from ldm.config import ScheduleConfig
from ldm.data.flowers import Flowers
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ConfigError
from ldm.images import image_grid, to_pil
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import image_generator, image_noise, slerp
from ldm.tasks import denoising_strip, interpolate, outpainting, step_strip

STEPS = 4
PHOTO = Flowers(length=2, size=32)[0].image
OTHER = Flowers(length=2, size=32)[1].image


def box(left, top, right, bottom, size=(32, 32)):
    """A mask that is white in this rectangle."""
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


def draw(pipe, prompt="a red flower", **options):
    call = {"num_inference_steps": STEPS, "output_type": "pt", "seed": 3}
    return pipe(prompt, **call | options).images


@pytest.fixture(scope="module")
def inpainting_pipeline():
    """A model that sees mask and masked image: nine channels in."""
    parts = make_pipeline().components
    torch.manual_seed(1)
    unet = UNet(UNET.__class__(**{**UNET.__dict__, "in_channels": 9}))
    randomize(unet)
    pipe = LatentDiffusionPipeline(**parts | {"unet": unet.eval()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_at_strength_1_the_image_plays_no_part(tiny_pipeline, sampler):
    expected = draw(tiny_pipeline, sampler=sampler, width=32, height=32)
    assert torch.equal(draw(tiny_pipeline, sampler=sampler, image=PHOTO, strength=1.0), expected)


def test_at_strength_0_it_is_the_reconstruction(tiny_pipeline):
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)[None] / 127.5 - 1
        again = tiny_pipeline.vae.decode(tiny_pipeline.vae.encode(pixels).mode())
    torch.testing.assert_close(
        draw(tiny_pipeline, image=PHOTO, strength=0.0), (again / 2 + 0.5).clamp(0, 1)
    )
    masked = draw(tiny_pipeline, image=PHOTO, mask_image=box(0, 0, 8, 8), strength=0.0)
    torch.testing.assert_close(masked, (again / 2 + 0.5).clamp(0, 1))


def test_strength_says_how_far_from_the_image(tiny_pipeline):
    known = tiny_pipeline.encode(draw(tiny_pipeline, image=PHOTO, strength=0.0) * 2 - 1)
    far = [
        (draw(tiny_pipeline, image=PHOTO, strength=s, num_inference_steps=20, output_type="latent")
         - known).norm().item()
        for s in (0.1, 0.4, 0.9)
    ]  # fmt: skip
    assert far == sorted(far) and far[0] < far[2] / 2


@pytest.mark.parametrize("options", [{}, {"mask_image": box(4, 4, 20, 16), "strength": 0.75}])
def test_image_tasks_do_not_depend_on_the_batch(tiny_pipeline, options):
    prompts, images = ["a", "b", "c"], [PHOTO, OTHER, PHOTO]
    together = draw(tiny_pipeline, prompts, image=images, **options)
    pieces = draw(tiny_pipeline, prompts, image=images, batch_size=2, **options)
    torch.testing.assert_close(pieces, together, rtol=0, atol=1e-4)
    for i in range(3):
        alone = draw(tiny_pipeline, prompts[i], image=images[i], seed=3 + i, **options)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_one_image_serves_every_picture_and_a_list_one_each(tiny_pipeline):
    shared = draw(tiny_pipeline, ["a", "b"], image=PHOTO, num_images_per_prompt=2)
    listed = draw(tiny_pipeline, ["a", "b"], image=[PHOTO] * 2, num_images_per_prompt=2)
    torch.testing.assert_close(shared, listed, rtol=0, atol=1e-5)
    two = draw(tiny_pipeline, ["a", "b"], image=[PHOTO, OTHER], num_images_per_prompt=2)
    torch.testing.assert_close(two[:2], shared[:2], rtol=0, atol=1e-4)
    assert (two[2:] - shared[2:]).abs().max() > 0.05


def test_an_image_in_every_form(tiny_pipeline):
    expected = draw(tiny_pipeline, image=PHOTO)
    array = np.asarray(PHOTO) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    latents = tiny_pipeline.encode(tensor[None].float() * 2 - 1)
    for form in ([PHOTO], array, array[None], tensor, tensor[None], latents, PHOTO.convert("RGBA")):
        torch.testing.assert_close(draw(tiny_pipeline, image=form), expected, rtol=0, atol=1e-4)
    mask = box(4, 4, 20, 16)
    expected = draw(tiny_pipeline, image=PHOTO, mask_image=mask)
    level = np.asarray(mask) / 255
    for form in (level, level[None, ..., None], torch.from_numpy(level), mask.convert("RGB")):
        again = draw(tiny_pipeline, image=PHOTO, mask_image=form)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_the_picture_takes_the_image_s_size(tiny_pipeline):
    wide = PHOTO.resize((50, 35))
    assert draw(tiny_pipeline, image=wide).shape == (1, 3, 32, 48)
    same = draw(tiny_pipeline, image=wide.resize((48, 32), Image.Resampling.LANCZOS))
    torch.testing.assert_close(draw(tiny_pipeline, image=wide), same)
    assert draw(tiny_pipeline, image=wide, width=16, height=24).shape == (1, 3, 24, 16)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_mask_keeps_is_untouched(tiny_pipeline, sampler, strength):
    """Bit for bit, though the last step may end above sigma 0; all the rest is painted anew."""
    known = tiny_pipeline.encode(draw(tiny_pipeline, image=PHOTO, strength=0.0) * 2 - 1)
    options = {"sampler": sampler, "strength": strength, "output_type": "latent"}
    latents = draw(
        tiny_pipeline, image=known, mask_image=box(8, 8, 24, 24), num_inference_steps=6, **options
    )
    painted = torch.zeros(8, 8, dtype=torch.bool)
    painted[2:6, 2:6] = True
    assert torch.equal(latents[..., ~painted], known[..., ~painted])
    assert (latents - known)[..., painted].abs().amin(1).min() > 1e-4
    everything = draw(tiny_pipeline, image=known, mask_image=box(0, 0, 32, 32), **options)
    no_mask = draw(tiny_pipeline, image=known, **options)
    torch.testing.assert_close(everything, no_mask)


def test_a_latent_pixel_is_kept_only_where_all_its_pixels_are(tiny_pipeline):
    known = tiny_pipeline.encode(torch.zeros(1, 3, 32, 32))
    latents = draw(tiny_pipeline, image=known, mask_image=box(7, 7, 9, 9), output_type="latent")
    changed = (latents != known).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_an_inpainting_model_sees_mask_and_masked_image(inpainting_pipeline, monkeypatch):
    pipe, seen = inpainting_pipeline, []
    forward = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *rest: (seen.append(x), forward(x, *rest))[1]
    )
    mask = box(8, 0, 32, 32)
    draw(pipe, image=[PHOTO, OTHER], prompt=["a", "b"], mask_image=mask)
    hidden = np.asarray(PHOTO) / 127.5 - 1
    hidden[:, 8:] = 0
    with torch.no_grad():
        pixels = torch.from_numpy(hidden).permute(2, 0, 1)[None].float()
        latents = pipe.vae.scale(pipe.vae.encode(pixels).mode())[0]
    assert len(seen) == STEPS and all(x.shape == (2, 9, 8, 8) for x in seen)
    for x in seen:  # two pictures, for both halves of guidance
        assert torch.equal(x[:, 4], torch.tensor([0.0] * 2 + [1.0] * 6).expand(2, 8, 8))
        torch.testing.assert_close(x[0, 5:], latents)
        assert (x[1, 5:] - latents).abs().max() > 0.1


def test_variations_turn_the_noise(tiny_pipeline):
    base, other = draw(tiny_pipeline, seed=5), draw(tiny_pipeline, seed=9)
    options = {"seed": 5, "variation_seed": 9}
    slight = draw(tiny_pipeline, **options, variation_strength=1e-6)
    torch.testing.assert_close(slight, base, rtol=0, atol=1e-3)
    torch.testing.assert_close(draw(tiny_pipeline, **options, variation_strength=1.0), other)
    result = tiny_pipeline(
        "a red flower",
        **options,
        variation_strength=0.3,
        num_images_per_prompt=3,
        num_inference_steps=STEPS,
        output_type="pt",
    )
    assert result.seeds == [5, 5, 5] and result.settings["variation_seed"] == [9, 10, 11]
    for i in range(3):
        assert result.settings_of(i)["variation_seed"] == 9 + i
        again = tiny_pipeline("a red flower", output_type="pt", **result.settings_of(i)).images
        torch.testing.assert_close(again[0], result.images[i], rtol=0, atol=1e-4)


def test_slerp_keeps_noise_noise():
    a, b = (image_noise(image_generator(s), (4, 32, 32))[None] for s in (1, 2))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.4), a)
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    for amount in (0.25, 0.5):
        angle = torch.tensor(amount * torch.pi / 2)
        expected = 3 * torch.stack([angle.cos(), angle.sin()])[None]
        torch.testing.assert_close(slerp(x, y, amount), expected)
    assert abs(slerp(a, b, 0.5).std().item() - 1) < 0.03  # lerp would leave 0.71


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 7, "guidance_scale": 2.0, "sampler": "euler", "height": 24},
        {"eta": 0.5, "guidance_rescale": 0.3, "timestep_spacing": "trailing"},
        {"sampler": "ddpm", "variance": "fixed_large", "clip_skip": 1},
        {"guidance_interval": (0.5, 5.0), "dynamic_threshold": (0.9, 2.0), "prompt_weights": False},
        {"timesteps": [900, 500, 20], "long_prompts": "chunk"},
        {"sigmas": [10.0, 3.0, 0.5], "sampler": "heun"},
        {"variation_seed": 8, "variation_strength": 0.2},
    ],
)
def test_settings_draw_the_picture_again(tiny_pipeline, options):
    usual = {"num_inference_steps": STEPS, "seed": 3, "output_type": "pt"}
    first = tiny_pipeline("a (red:1.3) flower, " * 9, **usual | options)
    for name, value in options.items():
        said = first.settings_of(0)[name]
        assert (list(said) if isinstance(value, (list, tuple)) else said) == (
            list(value) if isinstance(value, (list, tuple)) else value
        )
    again = tiny_pipeline("a (red:1.3) flower, " * 9, output_type="pt", **first.settings_of(0))
    assert torch.equal(again.images, first.images)
    plain = tiny_pipeline("a (red:1.3) flower, " * 9, **usual)
    if plain.images.shape == first.images.shape:
        assert (plain.images - first.images).abs().max() > 1e-3


def test_timesteps_and_sigmas_of_the_caller(tiny_pipeline):
    """The grid that a spacing makes, spelt out, draws the same."""
    expected = draw(tiny_pipeline, sampler="euler", timestep_spacing="leading")
    sigmas = SAMPLERS["euler"].grid(tiny_pipeline.schedule, STEPS, "leading").tolist()
    for grid in (sigmas, sigmas[:-1]):
        again = draw(tiny_pipeline, sampler="euler", sigmas=grid, timestep_spacing="leading")
        torch.testing.assert_close(again, expected)
    expected = draw(tiny_pipeline, sampler="ddim")
    again = draw(tiny_pipeline, sampler="ddim", timesteps=[751, 501, 251, 1])
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_long_and_short_prompts_share_a_call(tiny_pipeline):
    """Whatever their lengths, pictures are those that are drawn alone."""
    prompts = ["a red flower", "blue " * 100, "three (pink:1.4) roses", "a tree, " * 90]
    options = {"long_prompts": "chunk", "negative_prompt": "grey " * 80}
    together = draw(tiny_pipeline, prompts, **options)
    for i, prompt in enumerate(prompts):
        alone = draw(tiny_pipeline, prompt, seed=3 + i, **options)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    cut = draw(tiny_pipeline, prompts[1], seed=4, negative_prompt="grey " * 80)
    assert (cut[0] - together[1]).abs().max() > 1e-3


def test_weights_are_read_unless_told_otherwise(tiny_pipeline):
    weighted, plain = draw(tiny_pipeline, "a (red:1.5) rose"), draw(tiny_pipeline, "a red rose")
    assert (weighted - plain).abs().max() > 1e-3
    literal = draw(tiny_pipeline, "a (red:1.5) rose", prompt_weights=False)
    escaped = draw(tiny_pipeline, r"a \(red:1.5\) rose")
    torch.testing.assert_close(literal, escaped)


def test_outpainting_pads_to_whole_latents():
    picture, mask = outpainting(PHOTO, left=5, top=2, right=3, factor=4)
    assert picture.size == mask.size == (40, 36)
    pixels, keeps = np.asarray(picture), np.asarray(mask) == 0
    np.testing.assert_array_equal(pixels[2:34, 5:37], np.asarray(PHOTO))
    assert keeps[2:34, 5:37].all() and keeps.sum() == 32 * 32
    np.testing.assert_array_equal(pixels[2:34, 0], np.asarray(PHOTO)[:, 0])
    for sides in ({}, {"left": -4, "right": 8}):
        with pytest.raises(ConfigError, match="outpainting by"):
            outpainting(PHOTO, **sides)


def test_interpolation_goes_through_its_keys(tiny_pipeline):
    prompts, seeds, options = ["a red rose", "a blue tulip"], [3, 8], {"num_inference_steps": STEPS}
    frames = list(interpolate(tiny_pipeline, prompts, seeds, 5, batch_size=2, **options))
    pixels = [np.asarray(frame).astype(int) for frame in frames]
    for frame, prompt, seed in ((0, prompts[0], 3), (4, prompts[1], 8)):
        key = tiny_pipeline(prompt, seed=seed, **options).images[0]
        assert np.abs(pixels[frame] - np.asarray(key)).max() <= 1
    way = [np.abs(pixels[i] - pixels[0]).mean() for i in range(5)]
    assert 0 < way[1] < way[4] and len(frames) == 5
    half = slerp(*(image_noise(image_generator(s), (4, 8, 8))[None] for s in seeds), 0.5)
    contexts = tiny_pipeline.text_encoder.encode(prompts).mean(0, keepdim=True)
    middle = tiny_pipeline(prompt_embeds=contexts, latents=half, **options).images[0]
    assert np.abs(pixels[2] - np.asarray(middle)).max() <= 1


def test_noise_is_not_used_twice_on_the_way(tiny_pipeline):
    """A stochastic sampler goes on after the starting noise: its first key is that picture."""
    options = {"sampler": "euler_a", "num_inference_steps": STEPS}
    frames = list(interpolate(tiny_pipeline, ["a rose"], [3, 8], 3, **options))
    key = tiny_pipeline("a rose", seed=3, **options).images[0]
    assert np.abs(np.asarray(frames[0]).astype(int) - np.asarray(key)).max() <= 1


def test_the_negative_prompts_of_the_keys_count(tiny_pipeline):
    """Read as the prompts are: here, literally."""
    options = {"num_inference_steps": STEPS, "prompt_weights": False}
    negatives = ["(grey:1.9) stone", "tree"]
    frames = interpolate(tiny_pipeline, ["rose"], [3, 3], 2, negative_prompts=negatives, **options)
    for frame, negative in zip(frames, negatives, strict=True):
        key = tiny_pipeline("rose", negative_prompt=negative, seed=3, **options).images[0]
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(key)).max() <= 1
    weighed = tiny_pipeline("rose", negative_prompt=negatives[0], seed=3, num_inference_steps=STEPS)
    literal = tiny_pipeline("rose", negative_prompt=negatives[0], seed=3, **options)
    assert weighed.images[0].tobytes() != literal.images[0].tobytes()


def test_a_loop_ends_where_it_began(tiny_pipeline):
    options = {"num_inference_steps": STEPS, "loop": True}
    frames = list(interpolate(tiny_pipeline, ["a rose"], [3, 8, 11], 6, **options))
    for frame, seed in ((0, 3), (2, 8), (4, 11)):
        key = tiny_pipeline("a rose", seed=seed, num_inference_steps=STEPS).images[0]
        assert np.abs(np.asarray(frames[frame]).astype(int) - np.asarray(key)).max() <= 1
    for wrong in ((["a", "b"], [1, 2, 3], 5), (["a"], [1], 5), (["a"], [1, 2], 1)):
        with pytest.raises(ConfigError, match="give two keys or more"):
            interpolate(tiny_pipeline, *wrong)


def test_strips(tiny_pipeline):
    strip = step_strip(tiny_pipeline, "a rose", [1, 3], seed=4)
    single = [tiny_pipeline("a rose", seed=4, num_inference_steps=n).images[0] for n in (1, 3)]
    np.testing.assert_array_equal(np.asarray(strip), np.asarray(image_grid(single, columns=2)))
    options = {"sampler": "dpmpp_2m", "num_inference_steps": 5}
    strip = denoising_strip(tiny_pipeline, "a rose", 3, seed=4, **options)
    assert strip.size == (3 * 34 - 2, 2 * 34 - 2)
    last = strip.crop((68, 34, 100, 66))  # the last x0 is the picture
    final = tiny_pipeline("a rose", seed=4, **options).images[0]
    assert np.abs(np.asarray(last).astype(int) - np.asarray(final)).max() <= 1
    noise = image_noise(image_generator(4), (4, 8, 8))[None]
    first = tiny_pipeline.decode(noise)[0]
    assert np.abs(np.asarray(strip.crop((0, 0, 32, 32))).astype(int) - np.asarray(first)).max() <= 1
    with pytest.raises(ConfigError, match="6 columns of 5 steps"):
        denoising_strip(tiny_pipeline, "a rose", 6, seed=4, **options)


@pytest.mark.parametrize("task", ["decode", "encode"])
def test_a_half_precision_vae_that_overflows_does_it_in_float32(tiny_pipeline, caplog, task):
    """Its first layer's output exceeds float16's 65504; a group normalisation takes that back."""
    pipe = LatentDiffusionPipeline(**make_pipeline().components)
    first = pipe.vae.decoder.conv_in if task == "decode" else pipe.vae.encoder.conv_in
    first.weight.data.mul_(30000 / first.weight.abs().max())
    pipe.vae.half()
    before = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    exact = copy.deepcopy(pipe.vae).float()
    latents = image_noise(image_generator(0), (4, 8, 8))[None] * 3
    with caplog.at_level(logging.WARNING, logger="ldm.pipeline"), torch.no_grad():
        if task == "decode":
            result = pipe.decode(latents, "pt")
            raw = exact.unscale(latents).half().float()
            expected = (exact.decode(raw) / 2 + 0.5).clamp(0, 1)
        else:
            pixels = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)[None] / 127.5 - 1
            result = pipe.encode(pixels)
            expected = exact.scale(exact.encode(pixels).mode())
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    assert "overflows in torch.float16" in caplog.text
    after = pipe.vae.state_dict()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in after
    )


def test_an_overflow_changes_no_other_picture_of_the_batch():
    """Only the picture that overflows goes in float32."""
    pipe = LatentDiffusionPipeline(**make_pipeline().components)
    pipe.vae.half()
    usual = torch.stack([image_noise(image_generator(s), (4, 8, 8)) for s in (1, 2)])
    alone = pipe.decode(usual, "pt")
    huge = torch.full((1, 4, 8, 8), 1e6)  # beyond float16 itself
    together = pipe.decode(torch.cat([usual[:1], huge, usual[1:]]), "pt")
    torch.testing.assert_close(together[[0, 2]], alone, rtol=0, atol=1e-6)
    assert together.isfinite().all()


def test_latents_that_are_not_finite_are_refused(tiny_pipeline):
    with pytest.raises(ConfigError, match="picture 0 of the batch: the U-Net's numbers"):
        tiny_pipeline.decode(torch.full((1, 4, 8, 8), torch.nan))


def test_offloaded_parts_are_on_the_device_while_they_work(tiny_pipeline, monkeypatch):
    pipe = make_pipeline()
    expected = draw(tiny_pipeline, image=PHOTO)
    pipe.enable_model_cpu_offload("cpu")  # where the plain networks compute
    names = {id(pipe.unet): "unet", id(pipe.vae): "vae", id(pipe.text_encoder): "text"}
    moves, move = [], torch.nn.Module.to

    def spy(module, *args, **options):
        if id(module) in names:
            moves.append((names[id(module)], str(args[0])))
        return move(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    pipe._offload = torch.device("cpu", 0)  # the same place under a name of its own
    torch.testing.assert_close(draw(pipe, image=PHOTO), expected, rtol=0, atol=1e-4)
    there, back = "cpu:0", "cpu"
    assert [m for m in moves if m[0] == "unet"] == [("unet", there), ("unet", back)]
    assert moves[::2] == [(name, there) for name, _ in moves[::2]]
    assert moves[1::2] == [(name, back) for name, _ in moves[::2]]
    assert {name for name, _ in moves} == {"unet", "vae", "text"}
    pipe.to("cpu")
    assert pipe._offload is None
    with pytest.raises(ConfigError, match="cannot move the model there"):
        pipe.enable_model_cpu_offload("cuda:77")


def test_another_dtype_keeps_the_offload():
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload("cpu")
    assert pipe.to(torch.bfloat16)._offload is not None and pipe.dtype == torch.bfloat16
    assert pipe.to("cpu")._offload is None


def test_slices_and_tiles_are_the_whole(tiny_pipeline, monkeypatch):
    pipe = LatentDiffusionPipeline(**tiny_pipeline.components)
    latents = torch.stack([image_noise(image_generator(s), (4, 16, 16)) for s in range(3)])
    whole, sizes = pipe.decode(latents, "pt"), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda x: (sizes.append(x.shape), decode(x))[1])
    pipe.enable_vae_slicing()
    torch.testing.assert_close(pipe.decode(latents, "pt"), whole, rtol=0, atol=1e-5)
    assert sizes == [(1, 4, 16, 16)] * 3
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling(tile=2)
    torch.testing.assert_close(pipe.decode(latents, "pt"), whole, rtol=0, atol=1e-5)
    assert len(sizes) == 3  # in bands the VAE's own decode is not called
    pipe.disable_vae_tiling()
    torch.testing.assert_close(pipe.decode(latents, "pt"), whole)
    assert sizes[3:] == [(3, 4, 16, 16)]
    with pytest.raises(ConfigError, match="tile is 0"):
        pipe.enable_vae_tiling(tile=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5, "image": PHOTO}, "strength is 1.5"),
        ({"strength": -0.1, "image": PHOTO}, "strength is -0.1"),
        ({"strength": 0.1, "image": PHOTO}, "strength 0.1 of 4 steps leaves none"),
        ({"strength": 0.5}, "strength is given but no image"),
        ({"mask_image": box(0, 0, 8, 8)}, "mask_image is given but no image"),
        ({"image": PHOTO, "mask_image": box(0, 0, 8, 8, (16, 16))}, "mask_image is 16x16 and"),
        ({"image": [PHOTO, PHOTO]}, "2 images for 1 pictures"),
        (
            {
                "prompt": ["a", "b"],
                "image": [PHOTO, PHOTO.resize((16, 32))],
                "mask_image": box(0, 0, 8, 8),
            },
            "mask_image is 32x32 and image 16x32",
        ),
        ({"image": []}, "image must be a PIL image"),
        ({"image": "a.png"}, "image must be a PIL image"),
        ({"image": PHOTO, "mask_image": ["a.png"]}, "image must be a PIL image"),
        ({"image": torch.zeros(1, 3, 32, 30)}, "image is 30x32 and the picture 28x32"),
        ({"image": torch.zeros(1, 3, 32, 32) - 1}, "image has values from -1 to -1"),
        ({"image": torch.zeros(1, 2, 32, 32)}, "image has shape"),
        ({"image": PHOTO, "mask_image": torch.zeros(1, 3, 32, 32)}, "mask_image has shape"),
        ({"timesteps": [5, 900]}, "timesteps must descend"),
        ({"timesteps": [1000, 5]}, "timesteps begin at 1000; the schedule ends at 999"),
        ({"sigmas": []}, "sigmas must descend"),
        ({"sigmas": [0.0]}, "sigmas must descend"),
        ({"sigmas": [3.0, -1.0]}, "sigmas must descend"),
        ({"sigmas": [3.0], "timesteps": [9]}, "timesteps or sigmas"),
        ({"sigmas": [3.0, 1.0], "image": PHOTO, "strength": 0.2}, "leaves none"),
        ({"guidance_rescale": 1.2}, "guidance_rescale is 1.2"),
        ({"long_prompts": "chunks"}, "no long_prompts 'chunks'; did you mean 'chunk'"),
        ({"variation_strength": 2.0}, "variation_strength is 2.0"),
        ({"variation_strength": 0.2}, "give both variation_seed and variation_strength"),
        ({"variation_seed": 2}, "give both variation_seed and variation_strength"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_interval": (3.0, 3.0)}, "guidance_interval is 3.0 to 3.0"),
        ({"dynamic_threshold": (2.0, 1.0)}, "dynamic_threshold is 2.0 and 1.0"),
        ({"variance": "fixed"}, "no variance 'fixed'"),
        ({"sigmas": [float("inf"), 1.0]}, "sigmas must descend"),
        ({"seed": "many"}, "seed is 'many'; give a whole number"),
        ({"image": Path("a.png")}, "image must be a PIL image"),
        ({"image": np.zeros((32, 32))}, "image has shape"),
        ({"image": torch.zeros(0, 3, 32, 32)}, "image has shape"),
        ({"image": torch.zeros(1, 4, 8, 8), "height": 64}, "image has latents of shape"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 50, 32)}, "contexts have .*50, 77"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 77, 32)}, "prompt_embeds have shape"),
    ],
)
def test_errors_are_one_line_that_names_the_argument(tiny_pipeline, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        draw(tiny_pipeline, **options)
    assert "\n" not in str(error.value)


def test_an_inpainting_model_needs_both(inpainting_pipeline):
    for options in ({}, {"image": PHOTO}):
        with pytest.raises(ConfigError, match="inpainting model: give image and mask_image"):
            draw(inpainting_pipeline, **options)
    with pytest.raises(ConfigError, match="the image's pixels, not its latents"):
        draw(inpainting_pipeline, image=torch.zeros(1, 4, 8, 8), mask_image=box(0, 0, 8, 8))


def test_inpainting_reaches_sigma_0_of_any_schedule():
    """`set_alpha_to_one` false leaves the last sigma above 0 and its noise in what is painted."""
    pipe = make_pipeline(ScheduleConfig(set_alpha_to_one=False))
    image = to_pil(torch.zeros(1, 3, 32, 32))[0]
    kept = draw(pipe, image=image, mask_image=box(0, 0, 4, 4), output_type="latent")
    known = pipe.encode(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    assert torch.equal(kept[..., 1:, 1:], known[..., 1:, 1:])
