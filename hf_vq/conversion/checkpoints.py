"""Original weights under our names: splitting, dropping with a reason, strict loading; and what every converter's
command has: its arguments, its errors, and the folder that it writes.
"""

import argparse
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..hub import save_with_code
from ..models.autoencoders.image_processing_vq import VQImageProcessor


def split_by_prefix(state_dict: dict, prefixes: tuple[str, ...]) -> dict[str, dict]:
    """The keys of each prefix, without it.

    Raises:
        ValueError: for a key that has none of the prefixes.
    """
    parts = {prefix: {} for prefix in prefixes}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"`checkpoint` has the key {key}, which starts with none of {prefixes}.")
        parts[prefix][key.removeprefix(prefix)] = value
    return parts


def drop_keys(state_dict: dict, reasons: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """What is left, and for each dropped key why: `reasons` has a reason for each beginning of a key."""
    dropped = {key: reason for key in state_dict for beginning, reason in reasons.items() if key.startswith(beginning)}
    return {key: value for key, value in state_dict.items() if key not in dropped}, dropped


def check_keys(model: nn.Module, state_dict: dict) -> None:
    """A `ValueError` unless `model` uses every key of `state_dict`, lacks none, and has their shapes."""
    own = model.state_dict()
    problems = [f"lacks {key}" for key in own if key not in state_dict]
    problems += [f"has the unknown key {key}" for key in state_dict if key not in own]
    problems += [
        f"has {key} of shape {tuple(value.shape)} in place of {tuple(own[key].shape)}"
        for key, value in state_dict.items()
        if key in own and value.shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"`checkpoint` does not fit {type(model).__name__}: it {'; it '.join(problems[:5])}{more}.")


def check_agrees(name: str, configured: Any, found: Any, argument: str = "config") -> None:
    """A `ValueError` if an option of the configuration contradicts the weights."""
    if configured != found or isinstance(configured, bool) != isinstance(found, bool):
        raise ValueError(f"`{argument}` has {name}={configured!r}, but the weights in `checkpoint` are of {found!r}.")


def load_exactly(model: nn.Module, state_dict: dict) -> None:
    """Load `state_dict`, which must pass `check_keys` and be finite, into `model`, which may be on the meta device."""
    check_keys(model, state_dict)
    own = model.state_dict()
    for key, value in state_dict.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise ValueError(
                f"`checkpoint` has {key} of {type(model).__name__} in {value.dtype} in place of {own[key].dtype}."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"`checkpoint` has values that are not finite in {key} of {type(model).__name__}.")
    model.load_state_dict({key: value.contiguous() for key, value in state_dict.items()}, assign=True)
    still_empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if still_empty:
        raise RuntimeError(f"{type(model).__name__} has tensors that no checkpoint holds: {still_empty[:5]}.")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and the folder that is written
# ---------------------------------------------------------------------------------------------------------------------

# Arguments of the converters: an error about anything else is about an option of the configuration.
ARGUMENTS = (
    "checkpoint codec_config config data_variance discriminator layout mapping null_class_id output part "
    "source tokenizer top bottom live verify".split()
)


@contextmanager
def errors_name(**files: str | Path | None) -> Iterator[None]:
    """Puts the path into a `ValueError` from inside that names one of the arguments `files` without it, and the
    configuration's before one about an option, such as those of our own configurations. Of what else is in `files`,
    errors are left as they are.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        named = re.match(r"`(?:--)?(\w+)`", text)
        argument = named[1] if named else None
        path = files.get(argument)
        if path is not None and str(path) not in text:
            raise ValueError(f"`{argument}` {path}{text[named.end() :]}") from error
        if argument not in (*ARGUMENTS, *files) and files.get("config") is not None:
            raise ValueError(f"`config` {files['config']}: {text}") from error
        raise


@contextmanager
def written_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write to, whose content comes into `output` once all of it is written.

    Raises:
        ValueError: `output` is a file, or cannot be written.
    """
    output = Path(output)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"`output` {output} must be a folder, but {existing} is a file.")
    try:
        folder = output.parent / f".{output.name}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"`output` {output} cannot be written: {error.strerror}.") from error
    try:
        yield folder
        if output.exists() and any(output.iterdir()):
            shutil.copytree(folder, output, dirs_exist_ok=True)
        else:
            folder.replace(output)
    except OSError as error:
        raise ValueError(f"`output` {output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_script(main: Callable[[], None]) -> None:
    """Runs a converter as a script: an error that a user can mend is one line, and the exit code 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(1)


def read_tokenizer(folder: str | Path, kind: type = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The text tokenizer in a folder; a `ValueError` if there is none that can be read."""
    if not Path(folder).is_dir():
        raise ValueError(f"`tokenizer` must be a folder with a vocabulary, got {folder}, which is none.")
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # whatever a damaged vocabulary makes the library stumble over
        raise ValueError(f"`tokenizer` {folder} holds no tokenizer of transformers that can be read.") from error


def save_tokenizer(tokenizer: PreTrainedModel, folder: str | Path) -> None:
    """Writes a tokenizer with its image processor, if it has one."""
    save_with_code(tokenizer, folder)
    save_image_processor(tokenizer, folder)


def save_image_processor(tokenizer: PreTrainedModel, folder: str | Path) -> None:
    """Writes the image processor of a tokenizer of grey or colour images; others, such as label maps, have none."""
    channels = tokenizer.config.in_channels
    if channels in (1, 3):
        save_with_code(VQImageProcessor(size=tokenizer.config.resolution, num_channels=channels), folder)


def check_part(part: str | None, known: tuple[str, ...]) -> None:
    """A `ValueError` unless `part` is None or one of those that the files make."""
    if part is not None and part not in known:
        raise ValueError(f"`part` must be one of {', '.join(known)}: the files make no other, got {part!r}.")


def print_dropped(dropped: dict[str, str]) -> None:
    """One line for each reason."""
    for reason, count in Counter(dropped.values()).items():
        keys = [key for key, other in dropped.items() if other == reason]
        print(f"dropped {keys[0]}{f' and {count - 1} more' if count > 1 else ''}: {reason}")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every converter has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", required=True, help="the original file")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--push_to_hub", metavar="REPO", help='also upload the folder, to "user/name"')
    return parser
