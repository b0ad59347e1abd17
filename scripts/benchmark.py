"""Measure ldm against diffusers on this machine: `python scripts/benchmark.py txt2img`.

Both open the same model, and take turns, each in a process of its own; first it is checked that
they compute the same. Needs diffusers: `pip install -e ".[test]"`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import _ours  # noqa: F401

from ldm.benchmark.cases import add_options, as_dict, jobs
from ldm.benchmark.measure import measure
from ldm.benchmark.report import axis_of, lines, markdown, plot, read_results
from ldm.cli import Parser, run
from ldm.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    parser = Parser("benchmark.py", description=__doc__)
    add_options(parser)
    options = parser.parse_args(arguments)
    wanted = jobs(options)
    files = [Path(name) for name in options.cases if name.endswith(".json")]
    results = [result for file in files for result in read_results(file)]
    if wanted and find_spec("diffusers") is None:
        raise ConfigError('diffusers is not installed; run: pip install -e ".[test]"')
    if options.plot:  # before hours of measuring
        axis_of([*results, *map(as_dict, wanted)])
    command = f"python scripts/benchmark.py {shlex.join(arguments)}"
    for job in wanted:
        with TemporaryDirectory() as temporary:
            place = Path(temporary)
            result = measure(job, place, options.work_dir or place, say)
        results.append(result | {"command": command})
        if options.json:  # after each: the next one may take hours
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        print("\n".join(lines(result)))
    if options.markdown:
        print("\n".join(markdown(results)))
    if options.plot:
        plot(results, options.plot)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
