"""Every engine computes what the plain modules do, and gives their weights back to the bit."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import UNET, VAE, make_pipeline, randomize

from ldm.checkpoint.folder import load_folder
from ldm.engine import Engine, onednn
from ldm.engine.cpu import KIT, FastGroupNorm, FastUpsample, prepare
from ldm.errors import ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.layers import Upsample
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline

UNETS = {
    "plain": UNET,
    "linear projections": replace(UNET, use_linear_projection=True),
    "attention in the second level only": replace(UNET, cross_attention=(False, True)),
    "deep": replace(UNET, layers_per_block=2, transformer_layers_per_block=2),
    "classes": replace(UNET, num_class_embeds=4),
}


@pytest.fixture(params=[True, False], ids=["oneDNN", "without oneDNN"])
def operators(request, monkeypatch):
    """Both ways of computing: with torch's private operators, and without."""
    if not request.param:
        monkeypatch.setattr(onednn, "available", lambda dtype: False)
    else:
        assert onednn.available(torch.float32)


def make(kind, config, dtype=torch.float32):
    torch.manual_seed(1)
    network = kind(config)
    randomize(network)
    for parameter in network.parameters():  # or rounding would grow from layer to layer
        parameter.data *= 0.7
    return network.eval().requires_grad_(False).to(dtype)


def set_sizes(monkeypatch, large):
    """Compute as large or as small networks are."""
    monkeypatch.setattr(onednn, "_LARGE", 0 if large else 2**40)


def inputs(config, *, b=1, k=1, size=(8, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, config.in_channels, *size, generator=generator)
    t = 1000 * torch.rand(b, generator=generator)
    context = torch.randn(k * b, 7, config.cross_attention_dim, generator=generator)
    return x.to(dtype), t, context.to(dtype)


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_unet_equals_the_plain_one(config, large, operators, monkeypatch):
    set_sizes(monkeypatch, large)
    unet = make(UNet, config)
    fast = prepare(deepcopy(unet))
    for b, k, size in (
        (1, 1, (8, 8)),
        (1, 2, (8, 8)),
        (3, 2, (8, 12)),
        (2, 1, (7, 5)),
        (2, 2, (9, 8)),
    ):
        x, t, context = inputs(config, b=b, k=k, size=size)
        for times in (t, torch.full_like(t, 321.5), t[0]):
            assert distance(fast(x, times, context), unet(x, times, context)) < 1e-5
        if config.num_class_embeds:
            labels = torch.arange(k * b) % config.num_class_embeds
            assert distance(fast(x, t, context, labels), unet(x, t, context, labels)) < 1e-5
            assert distance(fast(x, t, context, labels), unet(x, t, context)) > 1e-3


@torch.no_grad()
def test_kept_text_is_that_of_the_context(operators):
    """Keys and values are those of the numbers in the context, whichever tensor holds them."""
    unet = make(UNet, UNET)
    fast = prepare(deepcopy(unet))
    x, t, context = inputs(UNET)
    first = fast(x, t, context)
    context *= -1
    changed = fast(x, t, context)
    assert distance(changed, unet(x, t, context)) < 1e-5 < 1e-2 < distance(changed, first)
    assert torch.equal(fast(x, t, -context), first)


@torch.no_grad()
def test_threads_may_draw_at_the_same_time(monkeypatch):
    """Weights are packed when they are first used, and anew for other shapes and contexts."""
    set_sizes(monkeypatch, True)
    unet = make(UNet, UNET)
    batches = [inputs(UNET, b=b, k=2, size=size) for b in (1, 2) for size in ((8, 8), (8, 12))]
    expected = [unet(*batch) for batch in batches]
    for _ in range(5):
        fast = prepare(deepcopy(unet))
        with ThreadPoolExecutor(len(batches)) as threads:
            found = list(threads.map(fast, *zip(*batches * 4, strict=True)))
        for a, b in zip(found, expected * 4, strict=True):
            assert distance(a, b) < 1e-5


@torch.no_grad()
def test_threads_may_draw_their_first_at_the_same_time():
    """The weights move once."""
    unet = make(UNet, UNET)
    batch = inputs(UNET, k=2)
    expected = unet(*batch)
    for _ in range(10):
        engine = Engine(deepcopy(unet), "fast", own=True)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda own: own.ready()(*batch), [engine] * 4))
        assert all(distance(each, expected) < 1e-5 for each in found)
        assert weights_equal(engine.lend(), unet)


def weights_equal(network, other):
    there = other.state_dict()
    return all(torch.equal(tensor, there[name]) for name, tensor in network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    "owner, method, number",
    [
        (FastUpsample, "__init__", 1),  # while the fast form is made
        (onednn.Packed, "take", 1),
        (onednn.Packed, "take", 9),
        (onednn.GatedLinear, "take", 2),
        (onednn.Linear, "arrange", 1),  # in the middle of the first call
        (onednn.Linear, "arrange", 7),
        (onednn.Conv2d, "pack", 1),
        (onednn.Conv2d, "pack", 4),
        (onednn.Packed, "give_back", 1),
        (onednn.Packed, "give_back", 12),
        (onednn.GatedLinear, "give_back", 2),
    ],
)
@pytest.mark.parametrize("then", ["a picture", "a release"])
def test_who_is_interrupted_loses_no_weight(owner, method, number, then, monkeypatch):
    """By Ctrl-C, or for want of memory: all weights are there, and so is the next picture."""
    set_sizes(monkeypatch, True)
    unet, batch = make(UNet, UNETS["deep"]), inputs(UNET, k=2)
    expected, plain, calls = unet(*batch), getattr(owner, method), 0
    engine = Engine(deepcopy(unet), "fast", own=True)

    def interrupted(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return plain(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted)
        engine.ready()(*batch)
        engine.release()
    if then == "a picture":
        assert distance(engine.ready()(*batch), expected) < 1e-5
    engine.release()
    assert weights_equal(engine.network, unet)


@torch.no_grad()
def test_halves_of_guidance_share_what_no_text_has_touched(monkeypatch):
    """Until the first cross-attention a picture is computed once, not once a context."""
    fast = prepare(make(UNet, UNET))
    rows = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: rows.append(len(q)) or plain(q, k, v)
    )
    fast(*inputs(UNET, b=3, k=2))
    assert rows[0] == 3 and set(rows[1:]) == {6}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_plain_network(dtype, operators):
    unet, exact = make(UNet, UNETS["deep"], dtype), make(UNet, UNETS["deep"], dtype).double()
    fast = prepare(deepcopy(unet))
    x, t, context = inputs(UNET, b=4, k=2, size=(16, 16), dtype=dtype)
    expected = exact(x.double(), t, context.double())
    error, usual = (
        (network(x, t, context) - expected).square().mean().sqrt() for network in (fast, unet)
    )
    assert 0 < error < 1.1 * usual


@torch.no_grad()
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_autoencoder_equals_the_plain_one(large, operators, monkeypatch):
    set_sizes(monkeypatch, large)
    vae = make(AutoencoderKL, VAE)
    fast = prepare(deepcopy(vae))
    latents = torch.randn(2, VAE.latent_channels, 6, 8)
    images = vae.decode(latents)
    assert distance(fast.decode(latents), images) < 1e-5
    ours, plain = fast.encode(images), vae.encode(images)
    assert distance(ours.mean, plain.mean) < 1e-5
    assert distance(ours.logvar, plain.logvar) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_writes_over_nothing_that_is_read_again(dtype, operators):
    """With and without shortcuts, and of pictures whose normalisation is the more exact one."""
    config = replace(VAE, block_out_channels=(16, 32, 32), layers_per_block=2)
    vae = make(AutoencoderKL, config, dtype)
    exact, fast = deepcopy(vae).double(), prepare(deepcopy(vae))
    images, latents = torch.randn(2, 3, 80, 72).to(dtype), torch.randn(2, 4, 20, 18).to(dtype)
    for method, given in (
        (lambda own, images: own.encode(images).mean, images),
        (lambda own, latents: own.decode(latents), latents),
    ):
        before = given.clone()
        found, true = method(fast, given), method(exact, given.double())
        assert torch.equal(given, before)
        assert distance(found, true) < 1.1 * distance(method(vae, given), true) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("kind, config", [(UNet, UNETS["deep"]), (AutoencoderKL, VAE)])
def test_weights_move_there_and_back(kind, config, large, dtype, operators, monkeypatch):
    set_sizes(monkeypatch, large)
    network = make(kind, config, dtype)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    engine = Engine(network, "fast", own=True)
    work = engine.ready()
    with torch.no_grad():
        work(*inputs(config, dtype=dtype)) if kind is UNet else work.decode(
            torch.randn(1, 4, 4, 4, dtype=dtype)
        )
    left = sum(p.numel() for p in network.parameters())
    assert left < 0.2 * sum(tensor.numel() for tensor in before.values())
    assert engine.lend() is network
    assert network.state_dict().keys() == before.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@torch.no_grad()
def test_normalisation_of_large_pictures():
    """Of numbers far from zero, channels-last, where torch's own loses digits."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 16)
    randomize(norm)
    x = (torch.randn(2, 16, 192, 160) + 6).to(memory_format=torch.channels_last)
    exact = deepcopy(norm).double()(x.double().contiguous())
    assert distance(FastGroupNorm(norm)(x), exact) < 1e-5 < distance(norm(x), exact)
    kept = x.clone()
    for silu in (False, True):
        fast = FastGroupNorm(norm, silu=silu)
        expected = fast(x)
        assert torch.equal(x, kept)
        assert torch.equal(fast(x.clone(), inplace=True), expected)
    flat = torch.full_like(x, 100.3)
    assert distance(FastGroupNorm(norm)(flat), norm.bias.view(1, 16, 1, 1).expand_as(x)) < 0.1


def test_an_upsampling_of_any_size():
    """Four small convolutions are the large one, to a few units of the last place."""
    torch.manual_seed(0)
    upsample = Upsample(5).double()
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        plain = deepcopy(upsample).to(dtype)
        fast = FastUpsample(plain, KIT)
        for h, w in ((1, 1), (4, 3), (8, 8)):
            x = torch.randn(2, 5, h, w, dtype=dtype)
            with torch.no_grad():
                assert distance(fast(x), plain(x)) < bound
                assert distance(fast(x, (2 * h, 2 * w)), plain(x)) < bound
                assert torch.equal(fast(x, (2 * h - 1, 2 * w)), plain(x, (2 * h - 1, 2 * w)))


# What holds for the pipeline.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


def open_model(folder, engine="fast"):
    pipeline = LatentDiffusionPipeline.from_pretrained(folder, engine=engine)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts="a rose", **options):
    return pipeline(prompts, seed=5, num_inference_steps=4, output_type="pt", **options).images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.1, 5.0)},
        {"sampler": "heun", "guidance_rescale": 0.5},
        {"prompts": ["a rose", "two tulips", ""]},
        {"height": 40, "width": 24},
    ],
)
def test_pictures_of_the_engines_are_the_same(folder, options):
    fast, plain = (draw(open_model(folder, engine), **options) for engine in ("fast", "plain"))
    assert (fast - plain).abs().max() < 1e-4


def test_weights_changed_by_anyone_are_drawn_with(folder):
    """Whatever a user does to the networks, and by whatever reference, the picture follows."""
    pipeline, plain = open_model(folder), open_model(folder, "plain")
    before = draw(pipeline)
    weight = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    for change in (
        lambda w: w.data.mul_(3),
        lambda w: w.data.neg_(),
        lambda w: torch.nn.init.zeros_(w),
        lambda w: setattr(w, "data", torch.randn_like(w)),
        lambda w: w.data.copy_(w.flip(0)),
        lambda w: w.data.copy_(w.flip(1)),
        lambda w: w.data.copy_(torch.cat([w[1:2], w[:1], w[2:]])),
    ):
        change(weight)
        plain.unet.load_state_dict(pipeline._unet.state_dict())
        after = draw(pipeline)
        assert (after - draw(plain)).abs().max() < 1e-4 < 1e-3 < (after - before).abs().max()
        before = after


def test_networks_are_whole_for_whoever_asks(folder, tmp_path):
    """After drawing, weights are saved, hashed, moved and shared as if never taken."""
    pipeline, plain = open_model(folder), open_model(folder, "plain")
    hashes, picture = plain.component_hashes(), draw(pipeline)
    assert pipeline.component_hashes() == hashes
    draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert open_model(tmp_path).component_hashes() == hashes
    draw(pipeline)
    x, t, context = inputs(UNET)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, t, context), plain.unet(x, t, context))
    draw(pipeline)
    again = LatentDiffusionPipeline(**pipeline.components)
    assert torch.equal(draw(again), draw(pipeline))
    half = draw(pipeline.to(torch.bfloat16))
    assert 0 < (half - picture).abs().mean() < 0.05
    pipeline.enable_vae_tiling(4)
    pipeline.to(torch.float32)


def test_saving_lends_nothing(folder, tmp_path):
    """A model that is saved goes on with its weights in memory once."""
    pipeline = open_model(folder)
    draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    draw(pipeline)
    assert not pipeline._unet.mid_block.resnets[0].conv1.weight.numel()  # with the engine


def test_weights_that_share_memory_stay_where_they_are(folder):
    """As an old checkpoint may have them: what one layer gives away, the other would miss."""
    parts = load_folder(folder)
    first, second = (r.conv1 for r in parts.unet.mid_block.resnets)
    second.weight.data = first.weight.data
    fast, plain = (LatentDiffusionPipeline._of(parts, engine) for engine in ("fast", "plain"))
    for pipeline in (fast, plain):
        pipeline.set_progress_bar_config(disable=True)
    assert (draw(plain) - draw(fast)).abs().max() < 1e-4
    assert first.weight.numel() and first.weight.data_ptr() == second.weight.data_ptr()


def test_another_padding_is_computed_with(folder):
    """As for pictures whose sides meet, before the first one and after."""
    fast, plain = open_model(folder), open_model(folder, "plain")
    before, networks = draw(fast), [fast.unet, fast.vae, plain.unet, plain.vae]
    draw(fast)
    for network in networks:
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.padding_mode = "circular"
    after = draw(fast)
    assert (after - draw(plain)).abs().max() < 1e-4 < 1e-3 < (after - before).abs().max()


def test_autocast_does_not_reach_an_engine(folder):
    pipeline = open_model(folder)
    expected = draw(pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        network, batch = pipeline._engines["unet"].ready(), inputs(UNET)
        with torch.no_grad():
            found = network(*batch)
    with torch.no_grad():
        assert torch.equal(found, network(*batch))
    assert torch.equal(draw(pipeline), expected)


def test_copies_and_other_engines(folder):
    """A pipeline that has drawn can be copied, and told to compute otherwise."""
    pipeline = open_model(folder)
    expected = draw(pipeline)
    twin = deepcopy(pipeline)
    assert torch.equal(draw(twin), expected)
    twin.unet.conv_in.weight.data.zero_()
    assert torch.equal(draw(pipeline), expected)
    assert not torch.equal(draw(twin), expected)
    pipeline.engine = "plain"
    assert pipeline._engines["unet"].ready() is pipeline._unet
    assert 0 < (draw(pipeline) - expected).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="no engine 'quick'"):
        pipeline.engine = "quick"
    assert pipeline.engine == "plain"


def test_a_callback_may_ask_for_the_networks(folder):
    def callback(pipeline, step, timestep, state):
        assert pipeline.unet.conv_in.weight.numel()
        return state

    expected = draw(open_model(folder))
    assert torch.equal(draw(open_model(folder), callback_on_step_end=callback), expected)


@pytest.mark.parametrize("dtype, worst, mean", [("float32", 1e-4, 1e-5), ("bfloat16", 1, 2 / 255)])
def test_a_picture_is_the_same_alone_and_anywhere_in_a_batch(folder, dtype, worst, mean):
    pipeline = open_model(folder).to(getattr(torch, dtype))
    prompts = [f"{n} roses" for n in range(8)]
    batch = draw(pipeline, prompts)
    turned = pipeline(
        prompts[::-1], seed=list(range(5, 13))[::-1], num_inference_steps=4, output_type="pt"
    ).images.flip(0)
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=5 + i, num_inference_steps=4, output_type="pt").images[0]
        for other in (batch[i], turned[i]):
            assert (alone - other).abs().max() <= worst
            assert (alone - other).abs().mean() <= mean


def test_layers_hooks_and_methods_of_others_are_computed_with(folder):
    """A network that somebody has put something into works as it is."""
    pipeline = open_model(folder)
    before, calls = draw(pipeline), []
    attention = pipeline.unet.mid_block.attentions[0]
    hook = attention.register_forward_hook(lambda *args: calls.append(1))
    assert (draw(pipeline) - before).abs().max() < 1e-4 and len(calls) == 4
    hook.remove()

    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    attention.proj_out = torch.nn.Sequential(attention.proj_out, Double())
    assert (draw(pipeline) - before).abs().max() > 1e-3


def test_an_engine_that_does_not_exist_is_one_line(folder):
    with pytest.raises(ConfigError, match="no engine 'fats'; did you mean 'fast'"):
        open_model(folder, "fats")
