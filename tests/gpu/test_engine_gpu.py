"""The GPU engine against the plain network: numbers, batches, recordings, waiting."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny import UNET, VAE, make_pipeline, randomize
from torch import Tensor

from ldm.engine import compiled
from ldm.engine.gpu import Graphed, prepare
from ldm.engine.quantized import quantized
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.layers import GroupNorm
from ldm.models.unet import UNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    """No TF32 in convolutions, which has three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def make_unet(dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNET)
    randomize(unet)
    for parameter in unet.parameters():  # or rounding would grow from layer to layer
        parameter.data *= 0.7
    return unet.eval().to("cuda", dtype)


def make_args(
    pictures: int = 2, side: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and two contexts a picture."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(pictures, 4, side, side, generator=generator)
    context = torch.randn(2 * pictures, 7, 32, generator=generator)
    t = torch.linspace(999, 1, pictures)
    return x.to("cuda", dtype), t.cuda(), context.to("cuda", dtype)


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    expected = expected.float()
    worst = (result.float() - expected).abs().max() / expected.abs().max()
    assert worst <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_as_near_to_the_exact_result_as_the_plain_network(dtype: torch.dtype) -> None:
    args = make_args(dtype=dtype)
    exact = make_unet().double()(*(arg.double() for arg in args))
    engine, own = prepare(make_unet(dtype)), distance(make_unet(dtype)(*args), exact)
    for _ in range(2):  # recorded, and replayed
        assert distance(engine(*args), exact) <= 1.2 * own


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@torch.no_grad()
def test_threads_get_their_own_results() -> None:
    unet = make_unet()
    plain, engine = deepcopy(unet), prepare(unet)
    x, t, context = make_args()
    calls = [(x * (i + 1), t / (i + 1), context.flip(i % 3)) for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda args: engine(*args), calls * 4))
    for args, result in zip(calls * 4, results, strict=True):
        assert_close(result, plain(*args), 1e-4)


@torch.no_grad()
def test_autocast_does_not_reach_a_recording() -> None:
    unet, args = make_unet(), make_args()
    engine, expected = prepare(unet), unet(*args)
    with torch.autocast("cuda", torch.float16):
        recorded = engine(*args)
    for result in (recorded, engine(*args)):
        assert result.dtype == torch.float32
        assert_close(result, expected, 1e-4)


@torch.no_grad()
def test_each_replay_sees_its_own_inputs_and_its_result_lasts() -> None:
    unet = make_unet()
    plain, engine = deepcopy(unet), prepare(unet)
    calls = [make_args(pictures, side) for pictures, side in [(1, 8), (2, 8), (1, 16), (1, 8)]]
    calls[-1] = (2 * calls[0][0], calls[0][1] / 3, -calls[0][2])
    results = [engine(*args) for args in calls]
    for args, result in zip(calls, results, strict=True):
        assert_close(result, plain(*args), 1e-4)


@torch.no_grad()
def test_timesteps_may_lie_on_the_cpu() -> None:
    unet = make_unet()
    x, t, context = make_args()
    expected = unet(x, t, context)
    assert_close(prepare(unet)(x, t.cpu(), context), expected, 1e-4)


@torch.no_grad()
def test_weights_that_change_in_place_count() -> None:
    unet = make_unet()
    engine, args = prepare(unet), make_args()
    before = engine(*args)
    for parameter in unet.conv_out.parameters():
        parameter.mul_(-2)
    assert_close(engine(*args), -2 * before, 1e-4)


@torch.no_grad()
def test_a_forgotten_shape_is_recorded_again() -> None:
    unet = make_unet()
    engine = Graphed(unet, keep=1)
    for args in (make_args(1), make_args(2), make_args(1)):
        assert_close(engine(*args), unet(*args), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_autoencoder_s_ways(way: str) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE).eval().cuda()
    x = torch.randn(2, *((3, 32, 32) if way == "encode" else (4, 8, 8))).cuda()

    def numbers(model: object) -> Tensor:
        result = getattr(model, way)(x)
        return result.mean if way == "encode" else result

    expected = numbers(vae)
    assert_close(numbers(prepare(vae)), expected, 1e-4)


@torch.no_grad()
def test_compiled_and_recorded() -> None:
    unet = make_unet()
    args = make_args()
    expected, engine = unet(*args), compiled.prepare(unet)
    for _ in range(2):  # built and recorded, and replayed
        assert_close(engine(*args), expected, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_eight_bits(how: str) -> None:
    """The bundled model's prediction, to the error that quantized.py states."""
    from ldm.pipeline import LatentDiffusionPipeline

    unet = LatentDiffusionPipeline.from_pretrained("flowers").unet.to("cuda", torch.bfloat16)
    x, context = torch.randn(8, 4, 16, 16), torch.randn(16, 77, 128)
    args = (x.to("cuda", torch.bfloat16), torch.linspace(1, 999, 8).cuda())
    args = (*args, context.to("cuda", torch.bfloat16))
    expected = unet(*args)
    assert 0 < distance(quantized(unet, how)(*args), expected) < 0.05  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_given_features_and_gradients_as_it_computes(dtype: torch.dtype) -> None:
    """Channels-last there and back, and of the same numbers as torch's own normalisation."""
    torch.manual_seed(0)
    norm = GroupNorm(4, 16).to("cuda", dtype)
    randomize(norm)
    x = torch.randn(2, 16, 8, 6, device="cuda", dtype=dtype)
    ours = x.to(memory_format=torch.channels_last).requires_grad_()
    theirs = x.clone().requires_grad_()
    out, expected = norm(ours), torch.nn.GroupNorm.forward(norm, theirs)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ours.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "unipc", "lms"])
def test_a_step_never_waits_for_the_gpu(sampler: str) -> None:
    """torch refuses whatever synchronises while the second picture's steps run."""
    pipe = make_pipeline().to("cuda")
    options: Any = {
        "seed": 1,
        "sampler": sampler,
        "output_type": "latent",
        "num_inference_steps": 4,
    }
    pipe("a rose", **options)
    mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode
    refused = []

    def on_step(pipeline: object, step: int, timestep: float, state: object) -> dict[str, Tensor]:
        refused.append(torch.cuda.get_sync_debug_mode() == 2)
        mode("error" if step < 3 else "default")
        return {}

    try:
        pipe("a rose", **options, callback_on_step_end=on_step)
    finally:
        mode("default")
    assert refused == [False, True, True, True]  # the steps after the first ran under it


def test_a_picture_is_the_same_alone_and_in_a_batch() -> None:
    pipe = make_pipeline().to("cuda")
    options: Any = {"output_type": "latent", "num_inference_steps": 4}
    together = pipe(["a rose"] * 3, seed=[5, 6, 7], **options).images
    for place, seed in enumerate([5, 6, 7]):
        alone = pipe("a rose", seed=seed, **options).images
        assert_close(alone, together[place : place + 1], 1e-4)


def test_engines_draw_the_same_picture() -> None:
    pictures = []
    for engine in ("plain", "fast"):
        pipe = make_pipeline()
        parts: Any = pipe.components | {"engine": engine}
        pipe = type(pipe)(**parts).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        images = pipe("a rose", seed=3, num_inference_steps=4, output_type="pt").images
        pictures.append(images)
    assert_close(pictures[1], pictures[0], 1e-3)
