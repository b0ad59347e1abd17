"""Turn a model folder into a single file, or back: `python scripts/convert.py MODEL OUT`.

OUT is a single file where it ends in .safetensors, else a folder in the diffusers layout. Every
tensor keeps its bits and its dtype, unless --dtype says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import _ours  # noqa: F401

from ldm.checkpoint.locate import locate_model
from ldm.cli import Parser, run
from ldm.config import Prediction
from ldm.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    parser = Parser("convert.py", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .safetensors or .ckpt file, a folder, or a hub name")
    add("out", metavar="OUT", type=Path, help="a .safetensors file or a folder, to be written")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights; as stored by default")
    add("--prediction_type", choices=get_args(Prediction), help="of a file that does not say")
    add("--config", type=Path, help="the YAML that came with a file; by default the one beside it")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--ema", action="store_true", default=None, help="keep only the EMA weights")
    which("--non_ema", dest="ema", action="store_false", help="keep only the raw weights")
    add("--variant", help="of a folder's files, such as fp16")
    add("--overwrite", action="store_true", help="replace OUT, of a folder the model's own files")
    options = parser.parse_args(arguments)
    model, out = locate_model(options.model, variant=options.variant), options.out
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ConfigError(f"{out} would be a pickle, which ldm does not write; use .safetensors")
    if out.exists() and not options.overwrite:
        raise ConfigError(f"{out} exists; choose another name, or give --overwrite")
    single = out.suffix == ".safetensors"
    if out.exists() and not (out.is_file() if single else (out / "model_index.json").is_file()):
        raise ConfigError(f"{out} exists and is no model of that kind; choose another name")
    if model.is_dir() and (options.prediction_type or options.config):
        raise ConfigError(f"{model} is a folder, which says it; leave out what single files need")

    import torch

    from ldm.checkpoint.folder import load_folder, save_folder
    from ldm.checkpoint.io import atomic_folder, to_dtype
    from ldm.checkpoint.single_file import load_single_file, save_single_file

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype, ema, told = dtypes.get(options.dtype), options.ema, options.prediction_type
    if model.is_dir():
        parts = load_folder(model, variant=options.variant, ema=ema, dtype=dtype)
    else:
        parts = load_single_file(
            model, prediction_type=told, config=options.config, ema=ema, dtype=dtype
        )
    parts = parts._replace(left_over=to_dtype(parts.left_over, dtype))
    try:
        if single:
            save_single_file(parts, out)
        else:
            # beside a model that stands there, files of others may too: they stay
            with nullcontext(out) if out.exists() else atomic_folder(out) as folder:
                save_folder(parts, folder)
    except OSError as error:
        raise ConfigError(f"cannot write {out} ({error.strerror}); choose another place") from None
    print(f"{out}  {parts.schedule.config.prediction_type}")


if __name__ == "__main__":
    run(main)
