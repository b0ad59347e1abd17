"""One process or two, in one piece or two, in one go or three: the same training."""

import json
from pathlib import Path

import pytest
import torch
from train_helpers import metrics, run_all, weights

STEPS = 6
RESUME = {"resume_from_checkpoint": "latest"}
WAYS = {
    "one": {},
    "two": {"world": 2},
    "again": {"world": 2},
    "pieces": {"pieces": 2},
    "two-pieces": {"world": 2, "pieces": 2},
}
RUNS = {"unet": "unet", "vae": "vae", "gan": "vae", "clip": "clip"}
CASES = [  # the last two see a batch as a whole
    (run, way) for run in RUNS for way in WAYS if "pieces" not in way or run in ("unet", "vae")
]


@pytest.fixture(scope="module")
def output(tiny_model_folder, pictures, tmp_path_factory) -> Path:
    """All runs, in float64; names are STAGE-WAY. 17 pictures, which nothing divides."""
    folder = tmp_path_factory.mktemp("processes")
    common = {
        "train_data_dir": str(pictures), "max_train_samples": 17, "validation_split": 0.2,
        "max_train_steps": STEPS, "checkpointing_steps": 2, "checkpoints_total_limit": None,
        "validation_steps": STEPS, "lr_warmup_steps": 3, "random_flip": True,
    }  # fmt: skip
    unet = {"pretrained_model_name_or_path": str(tiny_model_folder), "unet": None}
    # AdamW divides a gradient by its size: where it is nearly 0, rounding is what is learnt.
    owns = {"unet": unet, "gan": {"disc_start": 2, "adam_epsilon": 1e-6}}
    plan = []
    for run, way in CASES:
        options = common | owns.get(run, {}) | {"output_dir": str(folder / f"{run}-{way}")}
        options["gradient_accumulation_steps"] = WAYS[way].get("pieces", 1)
        plan.append((RUNS[run], options, _how(folder, f"{run}-{way}", WAYS[way])))
    for run, stage in RUNS.items():
        # killed after steps 3 and 5, each time gone on with on another number of processes
        options = common | owns.get(run, {}) | {"output_dir": str(folder / f"{run}-resumed")}
        for world, kill_at in ((1, 3), (2, 5), (1, None)):
            how = {"world": world} | ({"kill_at": kill_at} if kill_at else {})
            plan.append((stage, options, _how(folder, f"{run}-resumed-{world}-{kill_at}", how)))
            options = options | RESUME
    run_all(plan)
    return folder


def _how(folder: Path, name: str, how: dict) -> dict:
    return how | {"double": True, "record": str(folder / f"{name}.jsonl")}


def _records(folder: Path, name: str) -> dict[tuple[int, int], dict]:
    """What was read and done, by step and slot; the same by whomever."""
    found = {}
    for line in (folder / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["slot"] < 0:
            found.setdefault((row["step"], -1), []).append(row)
        else:
            assert found.setdefault((row["step"], row["slot"]), row) == row
    return found


@pytest.mark.parametrize(("run", "way"), CASES)
def test_the_same_samples_and_draws(output, run, way):
    """Ids, timesteps, noises, pixels and rates of every step; on as many processes as asked for."""
    ours, one = _records(output, f"{run}-{way}"), _records(output, f"{run}-one")
    assert sorted(ours) == [(s, slot) for s in range(STEPS) for slot in range(-1, 4)]
    for (step, slot), row in ours.items():
        if slot >= 0:
            assert row == one[step, slot]
        else:
            world = WAYS[way].get("world", 1)
            assert [r["world"] for r in row] == [world] * world
            assert {str(r["rates"]) for r in row} == {str(one[step, slot][0]["rates"])}
    visits = [row["visit"] for (_, slot), row in ours.items() if slot >= 0]
    assert set(visits) == {0, 1}  # a batch straddled two epochs


@pytest.mark.parametrize(
    ("run", "way"), [*(c for c in CASES if c[1] != "one"), *((run, "resumed") for run in RUNS)]
)
def test_the_same_weights(output, run, way):
    """Weights and averages to 1e-12 of the largest of them, in float64, and moments to 1e-11.

    Not of each tensor: the gradient of a key's bias is 0, and what is there is rounding.
    """
    ours, one = (
        weights(output / f"{run}-{name}" / f"checkpoint-{STEPS}" / "training_state")
        for name in (way, "one")
    )
    assert sorted(ours) == sorted(one)
    begun = weights(output / f"{run}-one" / "checkpoint-2" / "training_state")
    scales: dict[tuple, float] = {}
    for name, tensor in one.items():
        scales[_kind(name)] = max(scales.get(_kind(name), 0), float(tensor.abs().max()))
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64 or name.endswith(".step")
        worst = float((ours[name] - tensor).abs().max()) / scales[_kind(name)]
        assert worst < (1e-11 if "optimizer" in name else 1e-12), (name, worst)
    moved = [n for n in begun if ".optimizer" not in n and not torch.equal(begun[n], one[n])]
    assert len(moved) > 20  # something was learnt that could have differed


def _kind(name: str) -> tuple[str, str]:
    file, _, tensor = name.partition(":")
    return file, tensor.rsplit(".", 1)[1] if "optimizer" in file else ""


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_repeat_themselves_bit_for_bit(output, run):
    ours, theirs = (
        weights(output / f"{run}-{way}" / f"checkpoint-{STEPS}") for way in ("two", "again")
    )
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(output / f"{run}-two") == metrics(output / f"{run}-again")


@pytest.mark.parametrize("run", RUNS)
def test_the_same_figures(output, run):
    """Losses and validations of all steps, of which a resumed run has each once."""
    one = metrics(output / f"{run}-one")
    for way in [way for other, way in CASES if other == run] + ["resumed"]:
        for ours, theirs in zip(metrics(output / f"{run}-{way}"), one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), way
