"""What the scripts share: one-line errors, and options read from YAML and the command line.

Imports neither torch nor anything else that takes time: `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from ldm.errors import ConfigError, LdmError, suggest

Config = TypeVar("Config")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a script's `main`; an error that the user can mend is one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except LdmError as error:
        line = " ".join(str(error).split())  # names out of files may hold anything
        print(f"error: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not be loaded here
            raise
        hint = "try --cpu_offload, --vae_tiling, --dtype bf16, or a smaller --batch_size"
        print(f"error: the GPU's memory is full; {hint}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone; say nothing more to it
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(ArgumentParser):
    """argparse's; but a mistake is one line, and it names the nearest option or choice."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        choice = re.search(
            r"argument --(\w+)\S*: invalid choice: '(.*)' \(choose from (.*)\)", message
        )
        if choice:
            names = re.findall(r"\w+", choice[3])
            raise ConfigError(f"no {choice[1]} '{choice[2]}'; {suggest(choice[2], names)}")
        unknown = re.search(r"unrecognized arguments: (-[\w-]+)", message)
        near = get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f"did you mean '{near[0]}'?" if near else "--help lists the options"
        raise ConfigError(f"{message}; {hint}")


def parse_config(
    config_class: type[Config],
    arguments: Sequence[str],
    prog: str,
    default_file: Path | None = None,
) -> Config:
    """Read a dataclass from `--config FILE` and `--key value` options, the later ones winning.

    Args:
        config_class: a dataclass; its docstring's Attributes are the help.
        arguments: of the command line.
        prog: the command, for the help.
        default_file: read instead where the command line has no `--config`.

    Raises:
        ConfigError: an unknown key (the line names the nearest one) or a value of another type.
    """
    import jsonargparse
    from jsonargparse import ActionConfigFile, ArgumentError

    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options")
    parser.add_class_arguments(config_class)
    named = any(word.split("=")[0] == "--config" for word in arguments)
    if default_file and not named:
        arguments = ["--config", str(default_file), *arguments]
    try:
        values = parser.instantiate(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), config_class)) from None
    return config_class(**{f.name: values[f.name] for f in fields(config_class)})  # type: ignore


def _one_line(message: str, config_class: type) -> str:
    unknown = re.search(
        r"Option '(.+?)' is not accepted|unrecognized arguments: --([\w.]+)", message
    )
    if unknown:
        name = unknown[1] or unknown[2]
        known = list(_keys(config_class))
        if unknown[1] and (parent := re.search(r'Parser key "(\w+)"', message)):
            name = f"{parent[1]}.{name}"
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "--help lists the options"
        return f"unknown option '{name}'; {hint}"
    message = " ".join(message.split())
    if missing := re.search(r"File does not exist: '(.+)'|Path is not a file: '(.+)'", message):
        return f"no file {missing[1] or missing[2]}; --config wants a YAML file of options"
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    wrong = re.search(r"Expected a (.+?)\. Got value: (.*?)(?: - |$)", message)
    if keys and wrong:  # the innermost key stands nearest to what is expected of it
        kind = re.sub(r"<class '(\w+)'>", r"\1", wrong[1]).replace("typing.Literal", "one of ")
        return f"{'.'.join(dict.fromkeys(keys))} is {wrong[2]}; it must be {kind}"
    return f"{message}; --help lists the options"


def _keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    """All options of a dataclass, nested ones with dots."""
    for name, kind in get_type_hints(config_class).items():
        yield prefix + name
        for part in (kind, *get_args(kind)):
            if is_dataclass(part):
                yield from _keys(part, f"{prefix}{name}.")
