"""The vae stage against closed forms, autograd by hand and diffusers' AutoencoderKL."""

import pytest
import torch
from train_helpers import (
    VAE,
    first_batch,
    metrics,
    own_processes,
    prepared,
    prepared_run,
    run,
    weights,
)

from ldm.checkpoint.folder import load_vae
from ldm.data.order import Place
from ldm.models.discriminator import PatchDiscriminator


@pytest.fixture(scope="module")
def options(pictures):
    return {"train_data_dir": str(pictures), "kl_scale": 0.01, "disc_scale": 0.5, "disc_start": 2}


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """Four steps, the discriminator in the last two, without and with checkpoints between."""
    output = tmp_path_factory.mktemp("vae") / "run"
    return run("vae", **options, output_dir=output, checkpointing_steps=2)


def terms(stage, batch):
    """Reconstruction, KL and adversarial loss, a pixel at a time, in float64."""
    posterior = stage.vae.encode(batch["pixels"])
    latents = posterior.mean + posterior.logvar.exp().sqrt() * batch["noise"]
    images = stage.vae.decode(latents)
    reconstruction = (images - batch["pixels"]).abs().mean()
    normal = torch.distributions.Normal(posterior.mean, posterior.logvar.exp().sqrt())
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(normal, standard).sum() / batch["pixels"].numel()
    return images, reconstruction, kl


def test_loss_terms(options):
    stage, data, _ = prepared("vae", **options)
    batch = first_batch(stage, data)
    figures = stage.loss("vae", batch, step=0)
    images, reconstruction, kl = terms(stage, batch)
    torch.testing.assert_close(figures["reconstruction"], reconstruction, rtol=1e-5, atol=0)
    torch.testing.assert_close(figures["kl"], kl, rtol=1e-4, atol=0)
    torch.testing.assert_close(figures["loss"], reconstruction + 0.01 * kl, rtol=1e-5, atol=0)
    assert set(figures) == {"loss", "reconstruction", "kl"}
    torch.testing.assert_close(batch["reconstruction"], images.detach(), rtol=1e-4, atol=1e-5)
    squared, _, _ = prepared("vae", **options, rec_loss="l2")
    expected = (images - batch["pixels"]).square().mean()
    ours = squared.loss("vae", batch, step=0)["reconstruction"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_adaptive_weight(options):
    """Esser et al. 2021, eq. 7: the ratio of two gradients at the last layer, by backward()."""
    stage, data, _ = prepared("vae", **options)
    batch = first_batch(stage, data)
    last, norms = stage.vae.decoder.conv_out.weight, []
    for which in ("reconstruction", "adversarial"):
        images, reconstruction, kl = terms(stage, batch)
        adversarial = -stage.players["discriminator"](images).mean()
        stage.vae.zero_grad()
        (reconstruction if which == "reconstruction" else adversarial).backward()
        norms.append(last.grad.norm())
    weight = norms[0] / (norms[1] + 1e-4)
    assert 1e-2 < weight < 1e4  # neither end of its range
    figures = stage.loss("vae", batch, step=2)
    torch.testing.assert_close(figures["adversarial"], adversarial, rtol=1e-4, atol=1e-6)
    expected = reconstruction + 0.01 * kl + 0.5 * weight * adversarial
    torch.testing.assert_close(figures["loss"], expected, rtol=1e-4, atol=1e-5)


def test_discriminator_loss_is_the_hinge(options):
    stage, data, _ = prepared("vae", **options)
    batch = first_batch(stage, data)
    stage.loss("vae", batch, step=2)
    figures = stage.loss("discriminator", batch, step=2)
    judge = stage.players["discriminator"]
    real, fake = judge(batch["pixels"]), judge(batch["reconstruction"])
    zero = torch.zeros(())
    hinge = (torch.maximum(zero, 1 - real).mean() + torch.maximum(zero, 1 + fake).mean()) / 2
    torch.testing.assert_close(figures["loss"], hinge, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(figures["real"], real.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(figures["fake"], fake.mean(), rtol=1e-4, atol=1e-6)


def test_players_leave_each_others_gradients_alone(options):
    """The loop's gradients are those of each player's own loss, and nothing besides."""
    with own_processes():
        made = prepared_run("vae", **options)
        stage, data = made.stage, made.data
        batch = first_batch(stage, data)
        expected = {}
        for name, module in stage.players.items():
            own = list(module.parameters())
            loss = stage.loss(name, batch, step=2)["loss"]
            expected[name] = torch.autograd.grad(loss, own)
        made.state.step = 2
        made._gradients(["vae", "discriminator"], [batch])
    for name, module in stage.players.items():
        for parameter, gradient in zip(module.parameters(), expected[name], strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
            assert parameter.requires_grad
    stage, _, _ = prepared("vae", **options)
    stage.loss("vae", batch, step=2)["loss"].backward(inputs=list(stage.vae.parameters()))
    assert all(p.grad is None for p in stage.players["discriminator"].parameters())


def test_discriminator_joins_at_its_step(trained, options):
    names = {}
    for step in (2, 4):
        state = weights(trained / f"checkpoint-{step}" / "training_state")
        names[step] = {n for n in state if n.startswith("discriminator.optimizer")}
        if step == 2:
            stage, _, _ = prepared("vae", **options)
            for name, weight in stage.players["discriminator"].state_dict().items():
                assert torch.equal(state[f"discriminator.safetensors:{name}"], weight)
    count = len(list(PatchDiscriminator().parameters()))
    assert names[2] == set() and len(names[4]) == 3 * count
    steps = weights(trained / "checkpoint-4" / "training_state")
    assert steps["discriminator.optimizer.safetensors:conv_in.weight.step"] == 2
    assert steps["vae.optimizer.safetensors:encoder.conv_in.weight.step"] == 4
    has = ["discriminator_loss" in row for row in metrics(trained) if "loss" in row]
    assert has == [False, False, True, True]


def test_scaled_latents_have_unit_variance(trained, options):
    stage, data, _ = prepared("vae", **options)
    vae = load_vae(trained / "vae")
    assert vae.config.scaling_factor != VAE.scaling_factor
    items = stage.dataset(data, validation=True)
    batch = [items[Place(i)] for i in range(len(data))]
    pixels = torch.stack([item["pixels"] for item in batch])
    noise = torch.stack([item["noise"] for item in batch])
    with torch.no_grad():
        scaled = vae.scale(vae.encode(pixels).sample(noise))
    assert scaled.double().std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_scale_is_measured_over_all_of_sorted_data(options, monkeypatch):
    """A data set that begins with pictures all alike still gets the spread of the whole."""
    import ldm.training.vae as module

    stage, data, _ = prepared("vae", **options)
    asked = []
    fetch = module.VaeData.__getitem__
    monkeypatch.setattr(module, "SCALE_SAMPLES", 4)
    monkeypatch.setattr(
        module.VaeData, "__getitem__", lambda self, at: asked.append(at) or fetch(self, at)
    )
    stage._latent_std()
    assert len(data) == 16 and [place.index for place in asked] == [0, 4, 8, 12]


def test_folder_opens_in_diffusers(trained, options):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(trained / "vae")
    ours = load_vae(trained / "vae")
    stage, data, _ = prepared("vae", **options)
    pixels = first_batch(stage, data)["pixels"]
    with torch.no_grad():
        encoded, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
        torch.testing.assert_close(encoded.mean, expected.mean, rtol=1e-4, atol=1e-5)
        image = theirs.decode(expected.mean).sample
        torch.testing.assert_close(ours.decode(encoded.mean), image, rtol=1e-4, atol=1e-5)
    assert theirs.config.scaling_factor == ours.config.scaling_factor
    average = weights(trained / "checkpoint-4" / "training_state")
    saved = weights(trained / "vae")
    for name in dict(ours.named_parameters()):
        key = f"diffusion_pytorch_model.safetensors:{name}"
        assert torch.equal(saved[key], average[f"vae.average.safetensors:{name}"])


def test_validation_figures(options):
    stage, data, _ = prepared("vae", **options)
    pixels = first_batch(stage, data)["pixels"]
    figures = stage.validate({"pixels": pixels})
    with torch.no_grad():
        images = stage.vae.decode(stage.vae.encode(pixels).mean).clamp(-1, 1)
    eight_bit = (images / 2 + 0.5) - (pixels / 2 + 0.5)  # in [0, 1], where the peak is 1
    psnr = -10 * torch.log10((eight_bit**2).flatten(1).mean(1))
    torch.testing.assert_close(figures["psnr"], psnr, rtol=1e-4, atol=0)
    expected = (images - pixels).abs().flatten(1).mean(1)
    torch.testing.assert_close(figures["loss"], expected, rtol=1e-4, atol=0)


def test_decoder_only_leaves_latents_and_scale(trained, options, tmp_path):
    own = options | {"pretrained_model_name_or_path": str(trained), "decoder_only": True}
    output = run("vae", **own, output_dir=tmp_path / "run")
    before, after = load_vae(trained / "vae"), load_vae(output / "vae")
    assert after.config == before.config
    old = before.state_dict()
    changed = {name for name, w in after.state_dict().items() if not torch.equal(w, old[name])}
    expected = {n for n in old if n.startswith(("decoder.", "post_quant_conv."))}
    assert changed == expected


def test_validation_loss_falls(pictures, tmp_path):
    """An autoencoder on 8 pictures, 60 steps."""
    options = {"max_train_samples": 8, "max_train_steps": 60, "validation_steps": 20}
    options |= {"learning_rate": 4e-3, "ema_decay": 0.8, "train_data_dir": str(pictures)}
    rows = metrics(run("vae", **options, output_dir=tmp_path / "run"))
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 3 and losses[2] < 0.75 * losses[0]


def test_bf16_keeps_float32_weights(options, tmp_path):
    own = options | {"max_train_steps": 4, "validation_steps": 4}
    output = run("vae", **own, output_dir=tmp_path / "run", mixed_precision="bf16")
    assert {t.dtype for t in weights(output / "checkpoint-4").values()} == {torch.float32}
    exact = metrics(run("vae", **own, output_dir=tmp_path / "exact"))
    for row, other in zip(metrics(output), exact, strict=True):
        assert row["step"] == other["step"]
        for name in {"reconstruction", "kl", "validation_loss"} & set(row):
            assert row[name] == pytest.approx(other[name], rel=0.1), name
