"""The Gradio page: a prompt in, pictures out, with the settings that made them said below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from PIL.Image import Image

from ldm.config import SamplerName
from ldm.errors import ConfigError
from ldm.pipeline import LatentDiffusionPipeline

if TYPE_CHECKING:
    from gradio import Blocks


def page(pipeline: LatentDiffusionPipeline, title: str) -> Blocks:
    """The page of a model; `.launch()` serves it.

    Args:
        pipeline: the model, where it is to draw.
        title: what to call it.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ConfigError('the web page needs gradio: pip install "ldm-kit[web]"') from None
    steps = pipeline.defaults["num_inference_steps"]
    scale = pipeline.defaults["guidance_scale"]

    def draw(
        prompt: str,
        negative: str,
        count: int,
        seed: int | None,
        steps: int,
        scale: float,
        sampler: Any,
    ) -> tuple[list[tuple[Image, str]], str]:
        try:
            result = pipeline(
                prompt,
                negative_prompt=negative,
                num_images_per_prompt=int(count),
                seed=int(seed) if seed is not None and seed >= 0 else None,
                num_inference_steps=int(steps),
                guidance_scale=scale,
                sampler=sampler,
            )
        except ConfigError as error:
            raise gr.Error(str(error)) from None
        pictures = [
            (image, f"seed {seed}") for image, seed in zip(result.images, result.seeds, strict=True)
        ]
        said = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in result.settings.items()
        )
        return pictures, f"{prompt}: {said}"

    with gr.Blocks(title=title) as blocks:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a red flower", label="Prompt", autofocus=True)
                negative = gr.Textbox(label="Negative prompt")
                button = gr.Button("Draw", variant="primary")
                count = gr.Slider(1, 16, 4, step=1, label="Pictures")
                seed = gr.Number(42, precision=0, label="Seed of the first picture; -1 is random")
                number = gr.Slider(1, 200, steps, step=1, label="Steps")
                guidance = gr.Slider(1, 20, scale, step=0.5, label="Guidance scale")
                sampler = gr.Dropdown(list(get_args(SamplerName)), value="ddim", label="Sampler")
            with gr.Column():
                gallery = gr.Gallery(label="Pictures", columns=2, object_fit="contain")
                settings = gr.Textbox(label="Made with", interactive=False)
        inputs = [prompt, negative, count, seed, number, guidance, sampler]
        gr.on([button.click, prompt.submit], draw, inputs, [gallery, settings])
    return blocks
