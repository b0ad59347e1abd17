"""The unet stage against diffusers' noise, torch's AdamW and closed forms."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clips import their_tower
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate
from train_helpers import UNET, first_batch, make_config, metrics, prepared, run, weights

from ldm.config import UNetConfig
from ldm.data.order import Place, Shuffled
from ldm.errors import CheckpointError, ConfigError, DataError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.rng import Draws
from ldm.training.config import learning_rate_at


@pytest.fixture(scope="module")
def options(tiny_model_folder, pictures):
    return {
        "pretrained_model_name_or_path": str(tiny_model_folder),
        "train_data_dir": str(pictures),
        "unet": None,  # the tiny model's own, which is not zero at its end
        "proportion_empty_prompts": 0.3,
    }


def reference_loss(unet, stage, batch):
    """As diffusers' text-to-image example has it, from pixels and captions."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    with torch.no_grad():
        posterior = stage.vae.encode(batch["pixels"])
        x0 = posterior.mean + (posterior.logvar / 2).exp() * batch["posterior_noise"]
        x0 = x0 * stage.vae.config.scaling_factor
        ids = stage.text_encoder.token_ids(batch["caption"])
        context = their_tower(stage.text_encoder.tower.model)(ids).last_hidden_state
    x_t = scheduler.add_noise(x0, batch["noise"], batch["t"])
    return F.mse_loss(unet(x_t, batch["t"], context), batch["noise"])


def test_loss_is_the_epsilon_objective(options):
    stage, data, _ = prepared("unet", **options)
    batch = first_batch(stage, data)
    expected = reference_loss(stage.unet, stage, batch)
    torch.testing.assert_close(stage.loss("unet", batch, 0)["loss"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(stage.validate(batch)["loss"].mean(), expected, rtol=1e-5, atol=0)


SHAPES = {"enable_bucket": True, "min_bucket_reso": 16, "bucket_reso_steps": 8}


@pytest.mark.parametrize("own", [{}, {"random_flip": True}, {"random_flip": True} | SHAPES])
def test_cached_losses_are_uncached_losses(options, pictures, tmp_path, own):
    """Over three epochs, in which most pictures are seen from both sides."""
    (tmp_path / "oblong").mkdir()
    for number, file in enumerate(sorted(pictures.glob("*.png"))):
        size = (40, 24) if number % 2 else (24, 40)
        Image.open(file).resize(size).save(tmp_path / "oblong" / file.name)
        shutil.copy(file.with_suffix(".txt"), tmp_path / "oblong")
    own = options | own | {"train_data_dir": str(tmp_path / "oblong")}
    fresh, data, held_out = prepared("unet", **own)
    cached, _, _ = prepared("unet", **own, cache_latents=True, latent_cache_dir=tmp_path / "cache")
    cached.vae.encode = cached.text_encoder.encode = None
    shapes = set()
    for step in range(3 * len(data) // 4):
        one, other = (first_batch(stage, data, step=step) for stage in (fresh, cached))
        with torch.no_grad():
            expected, found = fresh.loss("unet", one, step), cached.loss("unet", other, step)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        shapes.add(tuple(one["pixels"].shape[2:]))
    assert shapes == ({(40, 24), (24, 40)} if "enable_bucket" in own else {(32, 32)})
    batches = [
        default_collate([stage.dataset(held_out, validation=True)[Place(i)] for i in range(6)])
        for stage in (fresh, cached)
    ]
    with torch.no_grad():
        expected, found = fresh.validate(batches[0]), cached.validate(batches[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_cache_is_written_once_and_shared(options, tmp_path, monkeypatch):
    own = options | {"random_flip": True, "cache_latents": True, "validation_steps": 2}
    workers = {"dataloader_num_workers": 2}
    first = metrics(run("unet", **own, **workers, output_dir=tmp_path / "first"))
    monkeypatch.setattr("ldm.models.autoencoder.AutoencoderKL.encode", None)
    own |= {"latent_cache_dir": tmp_path / "first" / "latents"}
    assert metrics(run("unet", **own, output_dir=tmp_path / "again")) == first


def test_a_bad_picture_is_the_same_cached(options, pictures, tmp_path):
    """Another one stands in, and it is told of; or the run ends, before its first step."""
    shutil.copytree(pictures, tmp_path / "pictures")
    own = options | {"train_data_dir": str(tmp_path / "pictures"), "random_flip": True}
    caching = {"cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
    fresh, data, _ = prepared("unet", **own, on_bad_sample="skip")
    for index in (1, 2):
        file = tmp_path / "pictures" / data.key(index)
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"^{data.key(1)}: .*damaged or cut short"):
        prepared("unet", **own, **caching)
    cached, same, _ = prepared("unet", **own, **caching, on_bad_sample="skip")
    places = [Place(index, visit) for index in range(4) for visit in range(3)]
    one, other = (
        default_collate([samples.read(place) for place in places])
        for samples in (
            fresh.samples(data, validation=False),
            cached.samples(same, validation=False),
        )
    )
    assert [line.split(":")[0] for line in one["bad"]] == [
        data.key(place.index) if place.index in (1, 2) else "" for place in places
    ]
    assert other["bad"] == one["bad"] and torch.equal(other["noise"], one["noise"])
    with torch.no_grad():
        losses = fresh.validate(one), cached.validate(other)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_cache_of_another_vae_is_refused(options, tiny_model_folder, tmp_path):
    own = options | {"cache_latents": True, "latent_cache_dir": tmp_path / "cache"}
    prepared("unet", **own)
    shutil.copytree(tiny_model_folder / "vae", tmp_path / "other" / "vae")
    file = next((tmp_path / "other" / "vae").glob("*.safetensors"))
    tensors = {name: tensor + 1e-6 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="cache/train was made with another VAE "):
        prepared("unet", **own, pretrained_vae_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(
        CheckpointError, match="another preprocessing .32 pixels, lanczos then, 32 p"
    ):
        prepared("unet", **own, random_flip=True)


def test_buckets_that_the_vae_does_not_divide_are_refused(options):
    own = {"enable_bucket": True, "min_bucket_reso": 16, "bucket_reso_steps": 6}
    with pytest.raises(ConfigError, match="bucket_reso_steps 6 is not a multiple of 4"):
        prepared("unet", **options, **own)


@pytest.mark.parametrize("cached", [False, True])
def test_draws_have_the_address_of_their_sample(options, cached, tmp_path):
    """(seed, purpose, sample, visit), on whatever step; captions are dropped by it, too."""
    own = options | {"seed": 5, "cache_latents": cached, "latent_cache_dir": tmp_path}
    stage, data, _ = prepared("unet", **own)
    for step in (0, 7):  # 16 samples in batches of 4: step 7 is of the second visit
        batch = first_batch(stage, data, step=step)
        for row, place in enumerate(Shuffled(5, 4, len(data)).batch(step)):
            index, visit = place.index, place.visit
            assert visit == (0 if step == 0 else 1)
            noise = Draws(5, "noise", index, visit).normal(4, 8, 8)
            assert batch["noise"][row].numpy().tobytes() == noise.tobytes()
            noise = Draws(5, "posterior", index, visit).normal(4, 8, 8)
            assert batch["posterior_noise"][row].numpy().tobytes() == noise.tobytes()
            assert batch["t"][row] == int(Draws(5, "timestep", index, visit).uniform(1)[0] * 1000)
            dropped = Draws(5, "dropout", index, visit).uniform(1)[0] < 0.3
            caption = "" if dropped else data[index].caption
            if cached:
                expected = stage.text_encoder.encode([caption])[0]
                torch.testing.assert_close(batch["context"][row], expected, rtol=1e-4, atol=1e-5)
            else:
                assert batch["caption"][row] == caption


def test_caption_dropout_rate(options, tmp_path):
    """Binomial: 1600 visits at 0.3 stray by more than 4 standard deviations once in 16000 runs."""
    own = options | {"cache_latents": True, "latent_cache_dir": tmp_path}
    stage, data, validation = prepared("unet", **own)
    items = stage.dataset(data, validation=False)
    empty = stage.text_encoder.encode([""])[0]

    def is_empty(item):
        return torch.allclose(item["context"], empty, rtol=1e-5, atol=1e-6)

    drops = [is_empty(items[Place(i, visit)]) for i in range(16) for visit in range(100)]
    assert abs(sum(drops) / 1600 - 0.3) < 4 * (0.3 * 0.7 / 1600) ** 0.5
    checks = stage.dataset(validation, validation=True)
    assert not any(is_empty(checks[Place(i)]) for i in range(6))


@pytest.mark.parametrize("clipping", [1e-3, 1e9])
def test_steps_are_those_of_adamw(options, clipping, tmp_path):
    """Three optimizer steps by hand: loss, clipping, learning rate, AdamW, average."""
    own = options | {
        "max_train_steps": 3, "max_grad_norm": clipping, "adam_weight_decay": 0.1,
        "adam_beta2": 0.98, "adam_epsilon": 1e-5, "lr_scheduler": "linear", "lr_warmup_steps": 2,
    }  # fmt: skip
    output = run("unet", **own, output_dir=tmp_path / "run")
    stage, data, _ = prepared("unet", **own)
    unet = stage.unet.train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), betas=(0.9, 0.98), eps=1e-5, weight_decay=0.1, fused=False, foreach=False
    )
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    losses = []
    for step in range(3):
        loss = reference_loss(unet, stage, first_batch(stage, data, step=step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in unet.parameters()]).norm()
        assert (norm > clipping) == (clipping < 1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.5, 1.0, 1.0)[step]
            assert group["lr"] == learning_rate_at(stage.config, step)
        for parameter in unet.parameters():
            parameter.grad *= min(1.0, clipping / (norm + 1e-6))
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        for name, p in unet.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    logged = metrics(output)
    assert [row["loss"] for row in logged[:3]] == pytest.approx(losses, rel=1e-4)
    saved = weights(output / "checkpoint-3" / "training_state")
    for name, p in unet.named_parameters():
        weight = saved[f"unet.safetensors:{name}"]
        torch.testing.assert_close(weight, p.detach(), rtol=1e-3, atol=2e-5)
        mean = saved[f"unet.average.safetensors:{name}"]
        torch.testing.assert_close(mean, average[name], rtol=1e-3, atol=2e-5)


def test_every_checkpoint_draws_what_its_average_draws(options, tmp_path):
    own = options | {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2}
    output = run("unet", **own, output_dir=tmp_path / "run", checkpoints_total_limit=None)
    stage, _, _ = prepared("unet", **own)
    pictures = []
    for folder in (output / "checkpoint-2", output / "checkpoint-4", output):
        pipeline = LatentDiffusionPipeline.from_pretrained(folder, engine="plain")
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.defaults["num_inference_steps"] == 2
        pictures.append(pipeline("a red rose", seed=3, output_type="pt").images)
        state = (folder if folder != output else output / "checkpoint-4") / "training_state"
        saved = weights(state)
        average = {
            name.split(":")[1]: t for name, t in saved.items() if name.startswith("unet.average")
        }
        stage.unet.load_state_dict(average)
        ours = stage._pipeline(stage.unet)
        ours.set_progress_bar_config(disable=True)
        assert torch.equal(ours("a red rose", seed=3, output_type="pt").images, pictures[-1])
    assert not torch.equal(pictures[0], pictures[1])  # it has learnt in between
    assert torch.equal(pictures[1], pictures[2])


def test_bf16_keeps_float32_weights(options, tmp_path):
    own = options | {"max_train_steps": 3, "validation_steps": 3}
    exact = metrics(run("unet", **own, output_dir=tmp_path / "fp32"))
    output = run("unet", **own, output_dir=tmp_path / "bf16", mixed_precision="bf16")
    rough = metrics(output)
    for row, other in zip(rough, exact, strict=True):
        assert row == pytest.approx(other, rel=0.05)
    assert [row["loss"] for row in rough[:3]] != [row["loss"] for row in exact[:3]]  # it was bf16
    tensors = weights(output / "checkpoint-3")
    assert {t.dtype for name, t in tensors.items() if "position_ids" not in name} == {torch.float32}
    state = {n: t for n, t in tensors.items() if n.startswith("training_state/unet.safetensors")}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in state.values())


def test_validation_is_of_the_average_and_the_same_every_time(options, tmp_path):
    """Learning rate next to zero: weights stay, and so does the validation loss."""
    still = options | {"learning_rate": 1e-30, "adam_weight_decay": 0.0, "validation_steps": 1}
    rows = metrics(run("unet", **still, output_dir=tmp_path / "still"))
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 4 and len(set(losses)) == 1
    assert len({row["loss"] for row in rows if "loss" in row}) == 4
    moving = options | {"learning_rate": 1e-2, "lr_warmup_steps": 0, "validation_steps": 3}
    output = run("unet", **moving, max_train_steps=3, output_dir=tmp_path / "moving")
    stage, _, validation = prepared("unet", **moving)
    items = stage.dataset(validation, validation=True)
    batch = default_collate([items[Place(i)] for i in range(len(validation))])
    found = {}
    for kind in ("unet.average", "unet"):
        saved = weights(output / "checkpoint-3" / "training_state")
        start = f"{kind}.safetensors:"
        state = {n.removeprefix(start): t for n, t in saved.items() if n.startswith(start)}
        stage.unet.load_state_dict(state)
        with torch.no_grad():
            found[kind] = stage.validate(batch)["loss"].mean().item()
    logged = metrics(output)[-1]["validation_loss"]
    assert logged == pytest.approx(found["unet.average"], rel=1e-4)
    assert logged != pytest.approx(found["unet"], rel=1e-2)


def test_min_snr_weighs_the_training_loss_only(options):
    plain, data, _ = prepared("unet", **options)
    weighed, _, _ = prepared("unet", **options, snr_gamma=5.0)
    batch = first_batch(plain, data)
    losses = plain.validate(batch)["loss"]
    assert torch.equal(weighed.validate(batch)["loss"], losses)
    abar = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).alphas_cumprod[batch["t"]]
    snr = abar / (1 - abar)
    expected = (losses * snr.clamp(max=5.0) / snr).mean()
    torch.testing.assert_close(weighed.loss("unet", batch, 0)["loss"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cross_attention_dim": 16}, "the text encoder's width is 32"),
        ({"in_channels": 9}, "unet.in_channels is 9"),
        ({"out_channels": 3}, "takes 4 channels and gives 3"),
        ({"sample_size": 64}, "latents of 32 pixels have side 8"),
    ],
)
def test_parts_that_do_not_fit_are_named(options, changes, words):
    unet: UNetConfig = replace(UNET, **changes)
    with pytest.raises(ConfigError, match=words):
        prepared("unet", **options | {"unet": unet})


def test_frozen_on_purpose_stays_frozen(options, tmp_path, monkeypatch):
    from ldm.training.unet import UNetStage

    make = UNetStage.__init__

    def freeze(self, config):
        make(self, config)
        self.unet.conv_in.requires_grad_(False)

    monkeypatch.setattr(UNetStage, "__init__", freeze)
    output = run("unet", **options, output_dir=tmp_path / "run")
    saved = weights(output / "checkpoint-4" / "training_state")
    stage, _, _ = prepared("unet", **options)
    assert torch.equal(saved["unet.safetensors:conv_in.weight"], stage.unet.conv_in.weight)
    assert not torch.equal(saved["unet.safetensors:conv_out.weight"], stage.unet.conv_out.weight)


def test_going_on_with_another_run_is_refused(options, tmp_path):
    own = options | {"output_dir": tmp_path / "run", "max_train_steps": 1}
    run("unet", **own)
    with pytest.raises(ConfigError, match="holds checkpoints already; add --resume"):
        run("unet", **own)
    with pytest.raises(CheckpointError, match="learning_rate was 0.001, is 0.002"):
        run("unet", **own | {"learning_rate": 2e-3}, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="data was .* samples, .*, is .* samples"):
        run("unet", **own | {"train_data_dir": "flowers"}, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("file", "key", "value", "line"),
    [
        ("vae/config.json", "scaling_factor", 0.7, "vae settings was .*0.4.*, is .*0.7"),
        ("text_encoder/config.json", "hidden_act", "gelu", "text_encoder settings was"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02, "schedule was .*, is .*0.02"),
    ],
)
def test_going_on_with_another_frozen_model_is_refused(
    options, tmp_path, tiny_model_folder, file, key, value, line
):
    """Of the same weights, at the same place."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    own = options | {"pretrained_model_name_or_path": str(folder), "unet": None}
    own |= {"output_dir": tmp_path / "run", "max_train_steps": 1}
    run("unet", **own)
    content = json.loads((folder / file).read_text())
    assert content[key] != value
    (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(CheckpointError, match=line) as error:
        run("unet", **own | {"max_train_steps": 2}, resume_from_checkpoint="latest")
    assert "\n" not in str(error.value)


def test_no_pickle_anywhere(options, tmp_path):
    """Only formats that hold data: with trackers on, as by default."""
    own = options | {"max_train_steps": 2, "validation_steps": 1, "report_to": "tensorboard"}
    output = run("unet", **own, output_dir=tmp_path / "run")
    files = [f for f in output.rglob("*") if f.is_file()]
    data = {".json", ".jsonl", ".safetensors", ".png", ".txt", ".yml"}
    named = [f for f in files if "tfevents" not in f.name and f.name != ".lock"]
    assert {f.suffix for f in named} <= data
    assert (output / ".lock").stat().st_size == 0
    events = [f for f in files if "tfevents" in f.name]
    assert events
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(events[0].parent)).Reload()
    logged = [row["loss"] for row in metrics(output) if "loss" in row]
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(logged)


def test_divergence_is_told_and_not_saved(options, tmp_path, capsys):
    own = options | {"learning_rate": 1e30, "lr_warmup_steps": 0, "max_train_steps": 20}
    with pytest.raises(ConfigError, match="the training diverges") as error:
        run("unet", **own, output_dir=tmp_path / "run", validation_steps=6)
    assert "\n" not in str(error.value)
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(rows) == 11 and rows[-1]["loss"] is None
    assert "no sample grid: " in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_unknown_and_absent_trackers(options, tmp_path, monkeypatch, capsys):
    from ldm.training import log

    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        run("unet", **options, output_dir=tmp_path / "a", report_to="tensorbord")
    monkeypatch.setattr(log, "get_available_trackers", lambda: [])
    config = make_config("unet", **options, output_dir=tmp_path, report_to="tensorboard")
    assert log.find_tracker(config) is None
    assert "tensorboard is not installed" in capsys.readouterr().out


def test_a_damaged_picture_is_one_line_from_a_worker_too(options, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:200])
    own = options | {"train_data_dir": str(folder), "dataloader_num_workers": 1}
    with pytest.raises(DataError, match=r"^\d\d.png: .*damaged or cut short.*$") as error:
        run("unet", **own, output_dir=tmp_path / "run")
    assert "\n" not in str(error.value)


def test_validation_loss_falls(options, tmp_path):
    """From scratch, on 8 pictures, 60 steps, latents cached."""
    own = options | {
        "unet": UNET, "cache_latents": True, "max_train_samples": 8, "max_train_steps": 60,
        "train_batch_size": 8, "learning_rate": 4e-3, "ema_decay": 0.8, "validation_steps": 20,
    }  # fmt: skip
    rows = metrics(run("unet", **own, output_dir=tmp_path / "run"))
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert rows[0]["loss"] == pytest.approx(1, abs=0.1)  # a new network predicts zero
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0]
