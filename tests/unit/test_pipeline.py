"""A picture is a function of (model, prompt, seed, settings) and of nothing else."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ConfigError
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import image_noise

COLORS = ("red", "blue", "pink", "white", "black", "grey", "green", "brown")
PROMPTS = [f"a {color} flower" for color in COLORS]
STEPS = 4


def draw(pipe, prompt="a red flower", **options):
    """Pictures b H W 3 in [0, 1], and the latents that the sampler met, start included: s b ..."""
    seen = []

    def watch(pipe, step, timestep, state):
        seen.append(state["latents"].clone())
        return state

    call = {"num_inference_steps": STEPS, "output_type": "np", "callback_on_step_end": watch}
    return pipe(prompt, **call | options).images, seen


@pytest.fixture
def noises(monkeypatch):
    """Every noise that a call draws, by generator."""
    drawn = {}

    def spy(generator, shape):
        noise = image_noise(generator, shape)
        drawn.setdefault(generator.initial_seed(), []).append(noise)
        return noise

    monkeypatch.setattr("ldm.inputs.image_noise", spy)  # the start
    monkeypatch.setattr("ldm.pipeline.image_noise", spy)  # what samplers add
    return drawn


STOCHASTIC = [("ddpm", {}), ("euler_a", {}), ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.4})]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [*STOCHASTIC, ("ddim", {}), ("euler", {}), ("heun", {}), ("dpmpp_2m", {})],
)
def test_a_seed_draws_the_same_alone_and_in_any_batch(tiny_pipeline, noises, sampler, options):
    settings = {"sampler": sampler, **options}
    alone, _ = draw(tiny_pipeline, PROMPTS[5], seed=105, **settings)
    noise_alone = noises.pop(105)
    assert len(noise_alone) == (1 if (sampler, options) not in STOCHASTIC else len(noise_alone))
    assert (len(noise_alone) > 2) == ((sampler, options) in STOCHASTIC)
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(105))
    assert torch.equal(noise_alone[0], expected)

    ways = {
        "a batch of 8": (PROMPTS, list(range(100, 108)), 5, {}),
        "another place": (PROMPTS[5:] + PROMPTS[:5], [105, 106, 107, *range(100, 105)], 0, {}),
        "one at a time": (PROMPTS, list(range(100, 108)), 5, {"batch_size": 1}),
        "three at a time": (PROMPTS, list(range(100, 108)), 5, {"batch_size": 3}),
    }
    for way, (prompts, seeds, place, how) in ways.items():
        noises.clear()
        images, _ = draw(tiny_pipeline, prompts, seed=seeds, **settings, **how)
        assert all(map(torch.equal, noises[105], noise_alone)), way
        assert len(noises[105]) == len(noise_alone), way
        np.testing.assert_allclose(images[place], alone[0], rtol=0, atol=1e-4, err_msg=way)
    assert np.abs(images[4] - alone[0]).max() > 0.05  # other seeds draw other pictures


def test_image_i_has_seed_plus_i(tiny_pipeline):
    together = tiny_pipeline(
        ["a", "b"], seed=7, num_images_per_prompt=2, output_type="np", num_inference_steps=STEPS
    )
    assert together.seeds == [7, 8, 9, 10]
    for i, prompt in enumerate("aabb"):
        alone, _ = draw(tiny_pipeline, prompt, seed=7 + i)
        np.testing.assert_allclose(together.images[i], alone[0], rtol=0, atol=1e-4)
    again, _ = draw(tiny_pipeline, ["a", "a", "b", "b"], generator=generators(7, 8, 9, 10))
    np.testing.assert_allclose(again, together.images, rtol=0, atol=1e-4)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_any_integer_is_a_seed(tiny_pipeline):
    expected, _ = draw(tiny_pipeline, ["a", "b"], seed=7)
    np.testing.assert_array_equal(draw(tiny_pipeline, ["a", "b"], seed=np.int64(7))[0], expected)
    np.testing.assert_array_equal(draw(tiny_pipeline, ["a", "b"], seed=range(7, 9))[0], expected)


def test_the_random_seed_is_told(tiny_pipeline):
    first = tiny_pipeline("a", output_type="np", num_inference_steps=STEPS)
    other = tiny_pipeline("a", output_type="np", num_inference_steps=STEPS)
    assert first.seeds != other.seeds and len(first.seeds) == 1
    again, _ = draw(tiny_pipeline, "a", seed=first.seeds[0])
    np.testing.assert_allclose(again, first.images, rtol=0, atol=1e-4)


def test_one_generator_for_all_is_drawn_from_in_turn(tiny_pipeline):
    rng = torch.Generator().manual_seed(3)
    latents = torch.stack([image_noise(rng, (4, 8, 8)) for _ in range(2)])
    expected, _ = draw(tiny_pipeline, ["a", "b"], latents=latents)
    images, _ = draw(tiny_pipeline, ["a", "b"], generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_callback_stops(tiny_pipeline, sampler):
    """The picture is then what the sampler had reached: the latents of the last callback."""
    calls = []

    def stop(pipe, step, timestep, state):
        calls.append((step, timestep, state["latents"].clone()))
        pipe._interrupt = step == 1
        return {}

    latents = tiny_pipeline(
        ["a", "b"],
        seed=1,
        sampler=sampler,
        num_inference_steps=STEPS,
        callback_on_step_end=stop,
        output_type="latent",
    ).images
    assert [step for step, _, _ in calls] == [0, 1]
    assert 999 >= calls[0][1] > calls[1][1] > 0
    torch.testing.assert_close(latents, calls[1][2])
    _, whole = draw(tiny_pipeline, ["a", "b"], seed=1, sampler=sampler)
    assert len(whole) == STEPS  # the stop does not outlive its call
    torch.testing.assert_close(latents, whole[1])


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_callback_replaces_latents(tiny_pipeline, sampler):
    """Replaced in the last step, its latents are the result; replaced by themselves, nothing is."""
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def replace(pipe, step, timestep, state):
        return {"latents": other} if step == STEPS - 1 else {"latents": state["latents"].clone()}

    options = {"seed": 1, "sampler": sampler, "output_type": "latent"}
    images, _ = draw(tiny_pipeline, callback_on_step_end=replace, **options)
    torch.testing.assert_close(images, other)

    def copy(pipe, step, timestep, state):
        return {"latents": state["latents"].clone()}

    copied, _ = draw(tiny_pipeline, callback_on_step_end=copy, **options)
    plain, _ = draw(tiny_pipeline, **options)
    torch.testing.assert_close(copied, plain, rtol=1e-4, atol=1e-4)


def test_a_callback_may_change_latents_in_place(tiny_pipeline):
    def zero(pipe, step, timestep, state):
        state["latents"].zero_()
        return state

    images, _ = draw(tiny_pipeline, seed=1, output_type="latent", callback_on_step_end=zero)
    assert torch.equal(images, torch.zeros(1, 4, 8, 8))


def test_a_callback_may_replace_latents_as_it_stops(tiny_pipeline):
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def stop(pipe, step, timestep, state):
        pipe._interrupt = step == 1
        return {"latents": other}

    images, _ = draw(tiny_pipeline, seed=1, output_type="latent", callback_on_step_end=stop)
    torch.testing.assert_close(images, other)


def test_a_callback_stops_the_batches_after_it(tiny_pipeline):
    def stop(pipe, step, timestep, state):
        pipe._interrupt = True
        return {}

    images, _ = draw(
        tiny_pipeline, ["a", "b", "c"], seed=1, batch_size=2, callback_on_step_end=stop
    )
    assert len(images) == 2


def test_output_types_agree(tiny_pipeline):
    kinds = {k: draw(tiny_pipeline, ["a", "b"], seed=5, output_type=k)[0] for k in OUTPUTS}
    array, tensor, latents = kinds["np"], kinds["pt"], kinds["latent"]
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    levels = np.stack([np.asarray(image) for image in kinds["pil"]])
    assert isinstance(kinds["pil"][0], Image.Image) and levels.dtype == np.uint8
    np.testing.assert_allclose(levels, array * 255, rtol=0, atol=0.5 + 1e-4)
    vae = tiny_pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)


OUTPUTS = ("pil", "np", "pt", "latent")


def test_prompt_embeds_are_prompts(tiny_pipeline):
    encode = tiny_pipeline.text_encoder.encode
    expected, _ = draw(tiny_pipeline, ["a", "b"], negative_prompt="grey", seed=5)
    images, _ = draw(
        tiny_pipeline,
        None,
        prompt_embeds=encode(["a", "b"]),
        negative_prompt_embeds=encode(["grey"]),
        seed=5,
    )
    np.testing.assert_array_equal(images, expected)


def test_negative_prompts_by_one_and_by_list(tiny_pipeline):
    both, _ = draw(tiny_pipeline, ["a", "b"], negative_prompt=["grey", "tree"], seed=5)
    for i, (prompt, negative) in enumerate([("a", "grey"), ("b", "tree")]):
        alone, _ = draw(tiny_pipeline, prompt, negative_prompt=negative, seed=5 + i)
        np.testing.assert_allclose(both[i], alone[0], rtol=0, atol=1e-4)
    assert np.abs(both[0] - draw(tiny_pipeline, "a", seed=5)[0][0]).max() > 0.01
    empty, _ = draw(tiny_pipeline, "a", negative_prompt="", seed=5)
    np.testing.assert_array_equal(empty, draw(tiny_pipeline, "a", seed=5)[0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_closed_form(tiny_pipeline, monkeypatch, scale):
    """One Euler step from sigma to 0 is x0 of uncond + scale (cond - uncond); to 1, of cond."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule, unet = tiny_pipeline.schedule, tiny_pipeline.unet
    widths, network = [], unet.forward
    monkeypatch.setattr(
        unet, "forward", lambda x, t, c, *rest: (widths.append(len(c)), network(x, t, c, *rest))[1]
    )
    x0, _ = draw(
        tiny_pipeline,
        sampler="euler",
        num_inference_steps=1,
        latents=latents,
        guidance_scale=scale,
        output_type="latent",
        timestep_spacing="karras",
    )
    assert widths == ([1] if scale <= 1 else [2])
    cond, uncond = (
        network(latents, torch.tensor([999.0]), tiny_pipeline.text_encoder.encode([words]))
        for words in ("a red flower", "")
    )
    alpha, rate = schedule.rates(torch.tensor([999]))
    epsilon = (uncond + max(scale, 1) * (cond - uncond)).detach()
    torch.testing.assert_close(
        x0, ((latents - rate * epsilon) / alpha).float(), rtol=1e-4, atol=1e-3
    )


def test_words_beyond_the_limit_are_logged(tiny_pipeline, caplog):
    long = " ".join(["flower"] * 200 + ["zebra"])
    with caplog.at_level(logging.WARNING, logger="ldm.pipeline"):
        draw(tiny_pipeline, "short", seed=1)
        assert not caplog.records
        draw(tiny_pipeline, long, seed=1)
    (record,) = caplog.records
    assert "77 tokens" in record.message and record.message.endswith("flower zebra")


def test_settings_tell_the_defaults(tiny_pipeline):
    made = tiny_pipeline("a", seed=1, output_type="latent")
    assert made.settings == {
        "num_inference_steps": 4,
        "sampler": "ddim",
        "timestep_spacing": "leading",
        "guidance_scale": 3.0,
        "width": 32,
        "height": 32,
    }
    assert made.images is made[0]


def test_lower_precision_draws_nearly_the_same(tiny_model_folder):
    options = {"torch_dtype": torch.bfloat16}
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model_folder, **options)
    pipe.set_progress_bar_config(disable=True)
    expected = LatentDiffusionPipeline.from_pretrained(tiny_model_folder)
    expected.set_progress_bar_config(disable=True)
    assert pipe.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    half, _ = draw(pipe, seed=1, guidance_scale=1.0)
    full, _ = draw(expected, seed=1, guidance_scale=1.0)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).mean() < 0.02


def test_components_and_saving_twice(tiny_pipeline, tmp_path):
    copy = LatentDiffusionPipeline(**tiny_pipeline.components)
    copy.set_progress_bar_config(disable=True)
    copy.save_pretrained(tmp_path)
    copy.save_pretrained(tmp_path)  # over itself
    again = LatentDiffusionPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert again.defaults == {"num_inference_steps": 4, "guidance_scale": 3.0}
    np.testing.assert_array_equal(draw(again, seed=3)[0], draw(tiny_pipeline, seed=3)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    ]  # fmt: skip


CUDA = torch.device("cuda")  # its generators cannot be made where there is no GPU
CONTEXT = torch.zeros(2, 77, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "width is 30; .* multiple of 4"),
        ({"height": 0}, "height is 0"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"sampler": "eulr"}, "sampler 'eulr'; did you mean 'euler'"),
        ({"timestep_spacing": "kerras"}, "spacing 'kerras'; did you mean 'karras'"),
        ({"num_inference_steps": 0}, "0 steps; give at least 1"),
        ({"num_inference_steps": 2000}, "2000 steps are too many"),
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt_embeds": CONTEXT}, "give prompt or prompt_embeds"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": None, "prompt_embeds": CONTEXT[0]}, "prompt_embeds .* shape"),
        ({"prompt": None, "prompt_embeds": CONTEXT[..., :5]}, "prompt_embeds .* shape"),
        ({"negative_prompt_embeds": CONTEXT}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt_embeds": CONTEXT[..., :5]}, "negative_prompt_embeds .* shape"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
        ({"generator": torch.Generator()}, "seed or generator"),
        ({"seed": None, "generator": generators(1, 2)}, "2 generators for 1 pictures"),
        ({"seed": None, "generator": [SimpleNamespace(device=CUDA)]}, "generator is on cuda"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"seed": -2}, "seed is -2"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed is 9223372036854775808"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents .* \(1, 4, 8, 9\).* \(1, 4, 8, 8\)"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"clip_skip": 2}, "clip_skip is 2"),
        ({"clip_skip": -1}, "clip_skip is -1"),
    ],
)
def test_errors_are_one_line_that_names_the_argument(tiny_pipeline, options, message):
    call = {"prompt": "a", "seed": 1, "num_inference_steps": 2} | options
    with pytest.raises(ConfigError, match=message) as error:
        tiny_pipeline(**call)
    assert "\n" not in str(error.value)


def test_options_reach_their_sampler(tiny_pipeline):
    """Both posterior variances of DDPM, and DDIM's eta, change what they should, no more."""
    small, large = (
        draw(tiny_pipeline, seed=1, sampler="ddpm", variance=v)[1]
        for v in ("fixed_small", "fixed_large")
    )
    assert not torch.allclose(small[0], large[0])
    euler = [draw(tiny_pipeline, seed=1, sampler="euler", eta=e)[1] for e in (0.0, 1.0)]
    torch.testing.assert_close(euler[0], euler[1], rtol=0, atol=0)


def test_settings_say_what_is_not_as_usual(tiny_pipeline):
    def said(**options):
        usual = {"num_inference_steps": STEPS, "seed": 1}
        return tiny_pipeline("a", **usual | options).settings

    plain = said()
    assert said(sampler="euler", eta=1.0).keys() == plain.keys()  # euler knows no eta
    assert said(eta=0.5) == plain | {"eta": 0.5}
    assert said(guidance_rescale=0.7) == plain | {"guidance_rescale": 0.7}
    large = said(sampler="ddpm", variance="fixed_large")
    assert large["variance"] == "fixed_large" and "variance" not in plain
    assert said(sampler="ddpm")["variance"] == "fixed_small"  # the model's own


def test_parts_that_do_not_fit_are_refused(tiny_pipeline):
    """Such as the eight channels of a model that follows instructions, before anything is drawn."""
    parts = tiny_pipeline.components
    for change, words in (
        ({"in_channels": 8}, "takes 8 channels and gives 4, but the VAE's latents have 4"),
        ({"out_channels": 3}, "takes 4 channels and gives 3"),
        ({"cross_attention_dim": 20}, "unet.cross_attention_dim is 20 but"),
    ):
        unet = UNet(replace(tiny_pipeline.unet.config, **change))
        with pytest.raises(ConfigError, match=words):
            LatentDiffusionPipeline(**parts | {"unet": unet})


def test_to_takes_what_a_module_takes(tiny_pipeline, tiny_model_folder):
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model_folder)
    assert pipe.to(torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    exact, rounded = draw(tiny_pipeline, seed=1)[0], draw(pipe, seed=1)[0]
    np.testing.assert_allclose(exact, rounded, atol=0.05)


def test_an_interrupted_call_has_a_seed_for_each_picture(tiny_pipeline):
    def stop(pipe, step, timestep, state):
        pipe._interrupt = True
        return state

    result = tiny_pipeline(PROMPTS, seed=3, batch_size=2, callback_on_step_end=stop)
    assert (len(result.images), result.seeds) == (2, [3, 4])
