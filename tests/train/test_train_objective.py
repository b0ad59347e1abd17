"""What the unet stage trains towards: its noises, timesteps, classes and schedules."""

import json
from dataclasses import replace
from math import sqrt

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from tiny import randomize
from torch._dynamo.utils import counters
from train_helpers import UNET, first_batch, make_stage_config, metrics, prepared, run

from ldm.config import ScheduleConfig
from ldm.data.order import Place
from ldm.errors import ConfigError, DataError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import Draws
from ldm.training.loop import make_stage

CLASSES = {"unet": replace(UNET, num_class_embeds=4), "class_column": "folder"}
LEARNED = {
    "unet": replace(UNET, num_class_embeds=4, out_channels=8),
    "schedule": ScheduleConfig(variance_type="learned_range"),
    "class_column": "folder",
}


@pytest.fixture(scope="module")
def classes(pictures, tmp_path_factory):
    """The pictures in three folders, a class each, by the rest of their number."""
    folder = tmp_path_factory.mktemp("classes")
    for file in sorted(pictures.glob("*.png")):
        below = folder / f"kind {int(file.stem) % 3}"
        below.mkdir(exist_ok=True)
        Image.open(file).save(below / file.name)
        (below / f"{file.stem}.txt").write_text(file.with_suffix(".txt").read_text())
    return folder


@pytest.fixture(scope="module")
def options(tiny_model_folder, classes):
    return {
        "pretrained_model_name_or_path": str(tiny_model_folder),
        "train_data_dir": str(classes),
        "unet": None,
    }


def test_noises(options):
    """noise_offset moves whole channels; input_perturbation shows another noise; each its draw."""
    stage, data, validation = prepared(
        "unet", **options, noise_offset=0.2, input_perturbation=0.1, seed=5
    )
    place = Place(3, 2)
    item = stage.dataset(data, validation=False)[place]
    noise, offset, other = (
        torch.from_numpy(Draws(5, purpose, 3, 2).normal(*shape))
        for purpose, shape in (
            ("noise", (4, 8, 8)), ("noise_offset", (4, 1, 1)), ("input_perturbation", (4, 8, 8)),
        )
    )  # fmt: skip
    torch.testing.assert_close(item["noise"], noise + 0.2 * offset)
    torch.testing.assert_close(item["seen_noise"], noise + 0.2 * offset + 0.1 * other)
    check = stage.dataset(validation, validation=True)[Place(3)]
    plain = torch.from_numpy(Draws(5, "noise", 3).normal(4, 8, 8))
    assert torch.equal(check["noise"], plain) and "seen_noise" not in check


def test_the_loss_has_the_options(options):
    """Each changes the training loss, and none the validation loss."""
    plain, data, _ = prepared("unet", **options)
    batch = first_batch(plain, data)
    validated, losses = plain.validate(batch)["loss"], {plain.loss("unet", batch, 0)["loss"].item()}
    for own in (
        {"loss_type": "l1"},
        {"loss_type": "huber"},
        {"loss_type": "huber", "huber_c": 1.0},
    ):
        stage, _, _ = prepared("unet", **options, **own)
        assert torch.equal(stage.validate(batch)["loss"], validated)
        losses.add(stage.loss("unet", batch, 0)["loss"].item())
    assert len(losses) == 4
    seen = batch | {"seen_noise": batch["noise"] + 0.5}
    assert plain.loss("unet", seen, 0)["loss"].item() not in losses


def test_stratified_timesteps(options):
    """One in each quarter of the schedule, where the sample's own draw puts it; else uniform."""
    stage, data, validation = prepared("unet", **options, stratified_timesteps=True, seed=5)
    items, slots = stage.dataset(data, validation=False), []
    for step in range(40):
        ranks = Draws(5, "strata", step).permutation(4)
        found = []
        for slot in range(4):
            place = Place((step * 4 + slot) % 16, step // 4, step, slot)
            u = Draws(5, "timestep", place.index, place.visit).uniform(1)[0]
            assert (t := items[place]["t"]) == int(1000 * (ranks[slot] + u) / 4)
            found.append(t)
        assert sorted(t // 250 for t in found) == [0, 1, 2, 3]
        slots.append(found)
    # Every slot sees the whole schedule: a mean of 40 uniform draws, within 4 deviations.
    for mean in torch.tensor(slots).float().mean(0):
        assert abs(mean / 1000 - 0.5) < 4 * sqrt(1 / 12 / 40)
    check = stage.dataset(validation, validation=True)[Place(2)]
    assert check["t"] == int(1000 * Draws(5, "timestep", 2).uniform(1)[0])


@pytest.mark.parametrize(("empty", "null"), [(0.3, 0.3), (0.1, 0.5), (1.0, 0.2)])
def test_captions_and_classes_are_dropped_together(options, empty, null):
    own = {**CLASSES, "proportion_empty_prompts": empty, "class_dropout_prob": null}
    stage, data, validation = prepared("unet", **options | own, seed=5)
    items = stage.dataset(data, validation=False)
    for index in range(16):
        place = Place(index, 1)
        item, u = items[place], Draws(5, "dropout", index, 1).uniform(1)[0]
        assert item["caption"] == ("" if u < empty else data[index].caption)
        assert item["class_label"] == (3 if u < null else data.label(index))
        assert data.label(index) == int(data.key(index).split("/")[-1][:2]) % 3
    checks = stage.dataset(validation, validation=True)
    for i in range(6):
        assert checks[Place(i)]["class_label"] == validation.label(i)
        assert checks[Place(i)]["caption"] == ("" if empty == 1 else validation.caption(i))


def test_the_class_reaches_the_network(options):
    """The loss is that of the labels given; its gradient comes to their rows alone."""
    stage, data, _ = prepared("unet", **options | CLASSES | {"proportion_empty_prompts": 1.0})
    torch.nn.init.normal_(stage.unet.conv_out.weight)
    for module in stage.unet.modules():  # no residual branch is silent
        if hasattr(module, "conv2"):
            torch.nn.init.normal_(module.conv2.weight, std=0.1)
    batch = first_batch(stage, data) | {"class_label": torch.tensor([2, 2, 0, 3])}
    stage.loss("unet", batch, 0)["loss"].backward()
    rows = stage.unet.class_embedding.weight.grad.abs().sum(1)
    assert [bool(row) for row in rows] == [True, False, True, True]


@pytest.mark.parametrize(
    ("own", "error", "words"),
    [
        ({"validation_class_labels": (3,)}, ConfigError, r"are \[3\]; give classes from 0 to 2"),
        ({"validation_class_labels": (0, 1)}, ConfigError, "one for all validation_prompts or"),
        ({"class_column": None}, ConfigError, "num_class_embeds 4; set class_column"),
        ({"unet": UNET}, ConfigError, "class_column is set, but the U-Net has no num_class_embeds"),
        (
            {"unet": replace(UNET, num_class_embeds=3)},
            DataError,
            "class is 2, .* there are 0 to 1",
        ),
    ],
)
def test_classes_that_do_not_fit(options, own, error, words):
    with pytest.raises(error, match=words) as caught:
        stage, data, _ = prepared("unet", **options | CLASSES | {"class_dropout_prob": 0.0} | own)
        items = stage.dataset(data, validation=False)
        for i in range(len(data)):
            items[Place(i)]
    assert "\n" not in str(caught.value)


def test_a_run_with_classes_and_a_learned_variance(options, tmp_path):
    """From scratch to a model that draws; the variance has learnt, the sample grids know both."""
    own = options | LEARNED | {
        "validation_class_labels": (1,), "learning_rate": 1e-2, "lr_warmup_steps": 0,
        "vlb_weight": 0.1, "stratified_timesteps": True,
    }  # fmt: skip
    output = run("unet", **own, output_dir=tmp_path / "run")
    pipeline = LatentDiffusionPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.schedule.config.variance_type == "learned_range"
    assert pipeline.unet.conv_out.bias[4:].abs().min() > 1e-3  # it began at 0
    options = {"seed": 1, "sampler": "ddpm", "output_type": "latent"}
    one, other = (pipeline("a red rose", class_labels=c, **options).images for c in (0, 2))
    assert not torch.equal(one, other) and one.isfinite().all()
    losses = [row["loss"] for row in metrics(output) if "loss" in row]
    assert len(losses) == 4 and max(losses) < 10


def test_what_the_sample_grids_draw(options):
    data_s_own, _, validation = prepared(
        "unet", **options | CLASSES | {"validation_prompts": (), "proportion_empty_prompts": 1.0}
    )
    assert data_s_own.prompts == [""] * 4
    assert data_s_own.labels == [validation.label(i) for i in range(4)]
    mine, _, _ = prepared("unet", **options | CLASSES, validation_class_labels=(2,))
    assert (mine.prompts, mine.labels) == (["a red rose"], [2])


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_switching_a_model_to_zero_terminal_snr(options, tmp_path, prediction):
    """On from an epsilon model: target, sample grids and the saved schedule are all the new one."""
    own = options | {"prediction_type": prediction, "rescale_betas_zero_snr": True}
    stage, data, _ = prepared("unet", **own, seed=1)
    batch = first_batch(stage, data)
    batch["t"][0] = 999
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**betas, rescale_betas_zero_snr=True)
    with torch.no_grad():
        x0 = stage._latents(batch)
        x_t = scheduler.add_noise(x0, batch["noise"], batch["t"])
        output = stage.unet(x_t, batch["t"], stage._context(batch))
        velocity = scheduler.get_velocity(x0, batch["noise"], batch["t"])
        target = velocity if prediction == "v_prediction" else x0
        expected = (output - target).square().mean((1, 2, 3))
        torch.testing.assert_close(stage.validate(batch)["loss"], expected, rtol=1e-3, atol=0)
    folder = tmp_path / "model"
    stage.save(folder)
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == prediction and saved["rescale_betas_zero_snr"] is True
    assert saved["timestep_spacing"] == "trailing"
    opened = LatentDiffusionPipeline.from_pretrained(folder)
    assert opened.schedule.config == stage.schedule.config
    theirs = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert theirs.alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    "own",
    [
        {"rescale_betas_zero_snr": True},
        {"unet": UNET, "schedule": ScheduleConfig(rescale_betas_zero_snr=True)},
        {"unet": UNET, "schedule": ScheduleConfig(2, trained_betas=(0.5, 1.0)),
         "num_inference_steps": 2},
    ],
)  # fmt: skip
def test_epsilon_of_pure_noise_is_refused(options, own):
    with pytest.raises(ConfigError, match="epsilon does not go with zero terminal SNR") as error:
        make_stage("unet", make_stage_config("unet", options | own))
    assert "\n" not in str(error.value)


def test_a_compiled_network_has_the_same_loss(options):
    """As the loop compiles it, in one graph; a backend without a C++ compiler."""
    small = replace(UNET, block_out_channels=(16,), cross_attention=(False,))
    stage, data, _ = prepared("unet", **options | {"unet": small})
    randomize(stage.unet)
    batch = first_batch(stage, data)

    def gradients():
        stage.unet.zero_grad()
        loss = stage.loss("unet", batch, 0)["loss"]
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in stage.unet.parameters()]

    eager = gradients()
    stage.unet.compile(backend="aot_eager", fullgraph=True)
    before = counters["stats"]["unique_graphs"]
    compiled = gradients()
    assert counters["stats"]["unique_graphs"] == before + 1
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
