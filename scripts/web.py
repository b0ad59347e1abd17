"""Serve a model as a web page on this machine: `python scripts/web.py [--model flowers]`."""

from __future__ import annotations

from collections.abc import Sequence

import _ours  # noqa: F401

from ldm.checkpoint.locate import locate_model
from ldm.cli import Parser, run
from ldm.drawing import find_device
from ldm.settings import within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("web.py", description=__doc__)
    parser.add_argument("--model", default="flowers", help="bundled, a folder, a single file, or a"
        " name on the hub")  # fmt: skip
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=within(0, 65535), default=7860)
    options = parser.parse_args(arguments)
    model = locate_model(options.model)
    device = find_device(options.device)

    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.web import page

    pipeline = LatentDiffusionPipeline.from_pretrained(model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    page(pipeline, f"ldm: {model.name}").launch(
        server_name=options.host, server_port=options.port, share=False
    )


if __name__ == "__main__":
    run(main)
