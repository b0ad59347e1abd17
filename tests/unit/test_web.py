"""The page draws what the pipeline draws, and says what it was made with."""

import numpy as np

from ldm.web import page


def test_the_button_draws_what_the_pipeline_draws(tiny_pipeline):
    (draw,) = {f.fn for f in page(tiny_pipeline, "tiny").fns.values()}
    pictures, said = draw("a red flower", "", 2, 5, 3, 2.0, "euler")
    expected = tiny_pipeline(
        "a red flower", num_images_per_prompt=2, seed=5, num_inference_steps=3,
        guidance_scale=2.0, sampler="euler",
    ).images  # fmt: skip
    assert [label for _, label in pictures] == ["seed 5", "seed 6"]
    for (picture, _), image in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(image))
    assert said.startswith("a red flower: num inference steps 3, sampler euler")


def test_an_empty_seed_is_a_random_one(tiny_pipeline):
    (draw,) = {f.fn for f in page(tiny_pipeline, "tiny").fns.values()}
    pictures, _ = draw("a red flower", "", 1, None, 1, 1.0, "ddim")
    assert len(pictures) == 1
