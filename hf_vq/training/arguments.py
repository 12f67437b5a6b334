"""Arguments of the training scripts: dataclasses, filled from a YAML or JSON file, the command line, or both."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser


class _ArgumentParser(HfArgumentParser):
    """Takes the help of a dataclass's field as it is written, where argparse would see a format in "5%"."""

    def add_argument(self, *names, **options):
        if isinstance(options.get("help"), str):
            options["help"] = options["help"].replace("%", "%%")
        return super().add_argument(*names, **options)


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """One instance of each dataclass.

    The first argument may be a YAML or JSON file with values; what follows on the command line overrides it.

    Args:
        dataclass_types: the dataclasses; their field names must differ.
        argv: the command line without the program's name; `None` takes that of this process.

    Raises:
        ValueError: the file has a key that no dataclass has, or is not a mapping.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _ArgumentParser(tuple(dataclass_types))
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file = Path(argv.pop(0))
        text = file.read_text()
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        values = {} if values is None else values  # a YAML file of comments only
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}: it must hold names with their values.")
        actions = {action.dest: action for action in parser._actions}
        unknown = sorted(set(values) - set(actions))
        if unknown:
            raise ValueError(f"{file} has unknown keys {unknown}; known are {sorted(set(actions) - {'help'})}.")
        for key, value in values.items():
            actions[key].required = False
            # a number in exponent form, such as 1e-4, is a string in YAML: argparse converts strings only
            actions[key].default = value
    return parser.parse_args_into_dataclasses(argv)


def parse_mapping(name: str, value: str | dict) -> dict:
    """The mapping that the argument `name` holds: JSON from a command line, or a mapping from a file already."""
    example = f'{name}={value!r}: it must be a JSON object, for example {{"levels": [8, 8, 8]}}.'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{example} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(example)
    return value
