"""The clip stage against transformers' CLIPModel and open_clip's tokenizer."""

import pytest
import torch
from clips import their_tokenizer
from train_helpers import (
    CLIP,
    first_batch,
    metrics,
    own_processes,
    prepared,
    prepared_run,
    run,
    weights,
)

from ldm.checkpoint.folder import load_text_encoder
from ldm.checkpoint.tokenizer import clip_tokenizer
from ldm.data.order import Place
from ldm.data.sources import Subset
from ldm.training.clip import MEAN, STD
from ldm.training.stop import Stop

WORDS = [
    "a red flower", "the cat and the dog on a white wall", "two yellow tulips in the grass",
    "photo of a woman", "Black  Night!", "i'm 10 years old, it's new",
]  # fmt: skip


@pytest.fixture(scope="module")
def options(pictures):
    return {"train_data_dir": str(pictures), "train_batch_size": 8}


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    return run("clip", **options, output_dir=tmp_path_factory.mktemp("clip") / "run")


def test_loss_is_that_of_transformers(options):
    stage, data, _ = prepared("clip", **options)
    batch = first_batch(stage, data)
    pixels = (batch["pixels"] + 1) / 2
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = their_tokenizer(stage.tokenizer)(
        batch["caption"], padding="max_length", return_tensors="pt"
    )
    theirs = stage.clip(input_ids=tokens.input_ids, pixel_values=pixels.float(), return_loss=True)
    figures = stage.loss("clip", batch, 0)
    torch.testing.assert_close(figures["loss"], theirs.loss, rtol=1e-5, atol=1e-6)
    own = torch.arange(8)
    accuracy = (theirs.logits_per_image.argmax(1) == own).float().mean()
    assert figures["accuracy"] == accuracy
    validation = stage.validate(batch)
    torch.testing.assert_close(validation["loss"].mean(), theirs.loss, rtol=1e-5, atol=1e-6)
    assert validation["accuracy"].mean() == accuracy


def test_temperature_is_bounded(options):
    """Logits are at most 100 times a cosine (Radford et al. 2021, section 2.5)."""
    stage, data, _ = prepared("clip", **options)
    batch, losses = first_batch(stage, data), []
    for logit_scale in (torch.tensor(100.0).log(), torch.tensor(200.0).log()):
        stage.clip.logit_scale.data = logit_scale
        losses.append(stage.loss("clip", batch, 0)["loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_text_tower_has_its_own_rate(options, tmp_path):
    """AdamW's first step moves every parameter by its rate (Kingma & Ba 2015, section 2.1)."""
    one = options | {"lr_warmup_steps": 0, "adam_weight_decay": 0.0, "use_ema": False}
    stage, *_ = prepared("clip", **one)
    before = {name: p.detach().clone() for name, p in stage.clip.named_parameters()}
    run("clip", **one, text_encoder_lr=1e-4, max_train_steps=1, output_dir=tmp_path / "run")
    after = weights(tmp_path / "run" / "checkpoint-1" / "training_state")
    for name in ("text_model.encoder.layers.0.mlp.fc1.weight", "visual_projection.weight"):
        moved = (after[f"clip.safetensors:{name}"] - before[name]).abs().max().item()
        expected = 1e-4 if name.startswith("text") else 1e-3
        assert moved == pytest.approx(expected, rel=1e-2), name


def test_folders_open_in_transformers(trained, options):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTextModel

    clip, info = CLIPModel.from_pretrained(trained / "clip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    average = weights(trained / "checkpoint-4" / "training_state")
    for name, parameter in clip.named_parameters():
        assert torch.equal(parameter, average[f"clip.average.safetensors:{name}"]), name
    text, info = CLIPTextModel.from_pretrained(trained / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(trained / "tokenizer")
    ids = tokenizer(WORDS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (len(WORDS), 77)
    clip.eval(), text.eval()
    with torch.no_grad():
        expected = clip.text_model(ids).last_hidden_state
        assert torch.equal(text(ids).last_hidden_state, expected)
        ours = load_text_encoder(trained)
        torch.testing.assert_close(ours.encode(WORDS), expected, rtol=1e-5, atol=1e-6)
    # the saved preprocessor makes of a picture what the stage has trained on
    stage, data, _ = prepared("clip", **options)
    sample = data[0].image
    theirs = CLIPImageProcessor.from_pretrained(trained / "clip")(sample, return_tensors="pt")
    mine = (stage.dataset(data, validation=True)[Place(0)]["pixels"] + 1) / 2
    mine = ((mine - stage.mean) / stage.std)[0]
    torch.testing.assert_close(theirs["pixel_values"][0], mine.float(), rtol=1e-4, atol=1e-4)


def test_saving_leaves_the_model_in_training(options, tmp_path):
    stage, _, _ = prepared("clip", **options)
    stage.clip.train()
    stage.save(tmp_path)
    assert all(p.requires_grad for p in stage.clip.parameters())
    assert all(module.training for module in stage.clip.modules())


@pytest.mark.parametrize("vocab_size", [6144, 49408])
def test_frequent_words_have_the_ids_of_clip(vocab_size):
    """The same tokens, by the same numbers, as open_clip's; but for the two markers at the end."""
    from open_clip.tokenizer import SimpleTokenizer

    full, mine = SimpleTokenizer(), clip_tokenizer(vocab_size)
    assert mine.bpe.get_vocab_size() == vocab_size
    for text in WORDS:
        expected = full.encode(" ".join(text.lower().split()))
        ids = mine.rows([text])[0].tolist()
        assert ids[0] == vocab_size - 2 and ids[-1] == vocab_size - 1
        if vocab_size == 49408 or all(token < vocab_size - 2 for token in expected):
            assert ids[1:-1] == expected, text
    frequent = [t for t in WORDS if max(full.encode(t.lower())) < 6142]
    assert len(frequent) >= 3  # the comparison above took place


@pytest.mark.parametrize(
    "text", ["붉은 꽃 한 송이", "a flower 🌺🌻", "čtyři žluté růže", "pneumonoultra"]
)
def test_every_text_can_be_written(text):
    tokenizer = clip_tokenizer(CLIP.vocab_size)
    ids = [i for i, _ in tokenizer.tokenize(text)]
    assert max(ids) < CLIP.vocab_size - 2  # no token stands for "unknown"
    assert tokenizer.bpe.decode(ids).replace("</w>", " ").strip() == text


def test_accuracy_rises_above_chance(options, tmp_path):
    """8 pictures, one batch: chance is 1 in 8."""
    own = options | {"max_train_samples": 8, "max_train_steps": 40, "learning_rate": 5e-3}
    rows = metrics(run("clip", **own, output_dir=tmp_path / "run", adam_weight_decay=0.0))
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert min(accuracy[-3:]) >= 0.75 and max(losses[-3:]) < 0.5 * losses[0]


def test_bf16_keeps_float32_weights(options, tmp_path):
    output = run("clip", **options, output_dir=tmp_path / "run", mixed_precision="bf16")
    state = weights(output / "checkpoint-4" / "training_state")
    assert {t.dtype for t in state.values()} == {torch.float32}
    exact = metrics(run("clip", **options, output_dir=tmp_path / "exact"))
    losses = [[row["loss"] for row in log if "loss" in row] for log in (metrics(output), exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_a_finished_checkpoint_elsewhere_is_published(trained, options, tmp_path):
    """Nothing is left to train, and the model is in the output folder all the same."""
    checkpoint = trained / "checkpoint-4"
    output = run("clip", **options, output_dir=tmp_path, resume_from_checkpoint=str(checkpoint))
    for part in ("clip", "text_encoder"):
        file = f"{part}/model.safetensors"
        assert (output / file).read_bytes() == (trained / file).read_bytes()


def test_validation_batches_are_equal(options, monkeypatch):
    """One caption left over would always be the right one."""
    from ldm.training import validation

    sizes = []
    monkeypatch.setattr(validation, "BATCH", 4)
    with own_processes():
        made = prepared_run("clip", **options)
        held = Subset(made.validation_data, range(5))
        validate = made.stage.validate
        monkeypatch.setattr(
            made.stage, "validate", lambda b: sizes.append(len(b["caption"])) or validate(b)
        )
        figures, _, _ = validation.run_validation(made.accelerator, made.state, held, Stop())
    assert sizes == [2, 3]
    assert 0 <= figures["accuracy"] <= 1 and figures["loss"] > 0
