"""The arguments that every training run takes, and how a script reads its own.

Arguments are dataclasses, filled from a YAML or JSON file, from the command line, or from both.
"""

import difflib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from ..argument_checks import check_integer, check_real
from ..models.checked_loading import read_json_file


# The smallest value of each argument that is an integer.
_SMALLEST = {
    0: ("lr_warmup_steps", "validation_steps", "dataloader_num_workers"),
    1: (
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "logging_steps",
        "codebook_patience",
    ),
}


@dataclass
class RunArguments:
    """How a run trains; the same for every example."""

    output_dir: str = field(metadata={"help": "Where checkpoints, metrics.jsonl, logs and pictures go."})
    seed: int = field(default=0, metadata={"help": "Seeds the initial weights, the data order and the augmentation."})
    max_train_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the whole run."})
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "End the run after so many minutes of training, all restarts together."}
    )
    train_batch_size: int = field(
        default=32, metadata={"help": "Samples per optimizer step over all processes and accumulated micro-batches."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches that a batch is cut into."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler: str = field(
        default="constant",
        metadata={"help": "Schedule.", "choices": ["constant", "constant_with_warmup", "cosine", "linear"]},
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises from 0."})
    max_grad_norm: float | None = field(default=1.0, metadata={"help": "Clip gradients at this norm; 0: do not."})
    mixed_precision: str = field(default="no", metadata={"help": "Autocast.", "choices": ["no", "bf16", "fp16"]})
    ema_decay: float = field(default=0.0, metadata={"help": "Decay of the average of the weights; 0: none."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Save a checkpoint every so many steps."})
    checkpointing_minutes: float | None = field(
        default=None, metadata={"help": "Save one also when so many minutes have passed since the last."}
    )
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})
    resume_from_checkpoint: str = field(
        default="latest", metadata={"help": '"latest" (if there is one), "none", or the path of a checkpoint.'}
    )
    logging_steps: int = field(default=50, metadata={"help": "Write mean metrics every so many steps."})
    validation_steps: int = field(default=500, metadata={"help": "Validate every so many steps; 0: only at the end."})
    report_to: str = field(
        default="none", metadata={"help": "Tracker.", "choices": ["none", "tensorboard", "trackio", "wandb"]}
    )
    run_name: str = field(default="hf_vq", metadata={"help": "Name of the run, or project, in the tracker."})
    min_codebook_perplexity: float = field(
        default=1.05,
        metadata={
            "help": "Stop when the metric codebook_perplexity stays below this; 0: never. See codebook_patience."
        },
    )
    codebook_patience: int = field(
        default=5, metadata={"help": "Consecutive metric rows with a perplexity below the minimum that stop the run."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read data ahead."})
    fsdp: str = field(
        default="no",
        metadata={
            "help": "Shard parameters, gradients, optimizer and averages over the processes (FSDP2).",
            "choices": ["no", "full_shard"],
        },
    )
    compile: bool = field(default=False, metadata={"help": "Compile the models with torch.compile."})
    deterministic: bool = field(default=False, metadata={"help": "Only deterministic kernels (slower on a GPU)."})
    cpu: bool = field(default=False, metadata={"help": "Train on the CPU even if there is a GPU."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the trained model to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to push to."})
    hub_license: str = field(default="unknown", metadata={"help": "Licence of the weights, by its name on the Hub."})

    def __post_init__(self):
        for name, choices in (
            ("lr_scheduler", ("constant", "constant_with_warmup", "cosine", "linear")),
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("fsdp", ("no", "full_shard")),
            ("report_to", ("none", "tensorboard", "trackio", "wandb")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for minimum, names in _SMALLEST.items():
            for name in names:
                setattr(self, name, check_integer(name, getattr(self, name), minimum))
        self.seed = check_integer("seed", self.seed, 0, 2**32 - 1)  # numpy's generators take no other
        self.learning_rate = check_real("learning_rate", self.learning_rate, above=0.0)
        self.ema_decay = check_real("ema_decay", self.ema_decay, minimum=0.0, below=1.0)
        self.min_codebook_perplexity = check_real("min_codebook_perplexity", self.min_codebook_perplexity, minimum=0.0)
        if self.max_grad_norm is not None:
            self.max_grad_norm = check_real("max_grad_norm", self.max_grad_norm, minimum=0.0)
        if self.checkpoints_total_limit is not None:
            self.checkpoints_total_limit = check_integer("checkpoints_total_limit", self.checkpoints_total_limit, 1)
        for name in ("max_train_minutes", "checkpointing_minutes"):
            if getattr(self, name) is not None:
                setattr(self, name, check_real(name, getattr(self, name), above=0.0))
        for name in ("output_dir", "run_name", "resume_from_checkpoint"):
            if not isinstance(getattr(self, name), (str, PathLike)) or not str(getattr(self, name)):
                raise ValueError(f"`{name}` must be a text that is not empty, got {getattr(self, name)!r}.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ValueError(
                f'lr_warmup_steps={self.lr_warmup_steps} has no effect with lr_scheduler="constant": '
                'choose "constant_with_warmup", "cosine" or "linear".'
            )
        self._check_hub()

    def check_codebook(self, num_embeddings: int) -> None:
        """Refuses a `min_codebook_perplexity` that no codebook of this size can reach."""
        if self.min_codebook_perplexity > num_embeddings:
            raise ValueError(
                f"`min_codebook_perplexity` must be at most {num_embeddings}, the number of codes, got "
                f"{self.min_codebook_perplexity}."
            )

    def _check_hub(self) -> None:
        """What would fail when the trained model is pushed."""
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f'`hub_model_id` must be a name such as "user/name": {error}') from error
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError('push_to_hub=True needs hub_model_id, for example "user/name".')
        if self.push_to_hub and get_token() is None:
            raise ValueError("push_to_hub=True needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")


def learning_rate_factor(arguments: RunArguments, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0), as a fraction of the highest."""
    if arguments.lr_scheduler != "constant" and step < arguments.lr_warmup_steps:
        return (step + 1) / (arguments.lr_warmup_steps + 1)
    if arguments.lr_scheduler.startswith("constant"):
        return 1.0
    rest = max(1, arguments.max_train_steps - arguments.lr_warmup_steps)
    progress = min(1.0, (step - arguments.lr_warmup_steps) / rest)
    return 1.0 - progress if arguments.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


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
        SystemExit: with the code 2, for wrong usage: an argument that does not exist, a file that is not there.
        OSError: the file holds something else.
        ValueError: the file has a key that no dataclass has, is not a mapping, or has a value of another kind than
            the field's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _ArgumentParser(tuple(dataclass_types))
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file = Path(argv.pop(0))
        if not file.is_file():
            parser.exit(2, f"{parser.prog}: error: the file of arguments `{file}` does not exist\n")
        values = _read_values(file, dataclass_types)
        for action in parser._actions:  # a switch that is on by default has two
            if action.dest in values:
                action.required = False
                # a number in exponent form, such as 1e-4, is a string in YAML: argparse converts strings only
                action.default = values[action.dest]
    *found, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.8)
        hint = f"did you mean {close[0]}?" if close else "--help lists those there are"
        parser.exit(2, f"{parser.prog}: error: unrecognized arguments: {' '.join(unknown)}; {hint}\n")
    return tuple(found)


def _read_values(file: Path, dataclass_types: Sequence[type]) -> dict[str, Any]:
    """The values in a YAML or JSON file, each of the kind of its field."""
    if file.suffix == ".json":
        values = read_json_file(file)
    else:
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"`{file}` must be a YAML file, got one that cannot be read: {reason[:300]}") from error
    values = {} if values is None else values  # a YAML file of comments only
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}: it must hold names with their values.")
    known = {item.name: (item, get_type_hints(kind)[item.name]) for kind in dataclass_types for item in fields(kind)}
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise ValueError(f"{file} has unknown keys {unknown}; known are {sorted(known)}.")
    return {key: _of_kind(f"{file}: `{key}`", value, *known[key]) for key, value in values.items()}


def _of_kind(name: str, value: Any, item: Any, hint: Any) -> Any:
    """A value of a file for the field `item` of the type `hint`; one entry stands for a list of it.

    Raises:
        ValueError: it is of another kind, or not one of the field's choices.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is list:
        (entry,) = get_args(kind)
        entries = [_of_kind(name, one, item, entry) for one in (value if isinstance(value, list) else [value])]
        try:
            return [entry(one) for one in entries]
        except ValueError as error:
            raise ValueError(f"{name} must be a list of {entry.__name__}, got {value!r}.") from error
    accepted = {bool: (bool, str), int: (int, str), float: (int, float, str), str: (str,)}[kind]
    is_mapping = isinstance(value, dict) and item.default == "{}"  # of a field that takes JSON from a command line
    if not is_mapping and (not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)):
        words = {bool: "true or false", int: "an int", float: "a number", str: "a text (quoted where it is a number)"}
        raise ValueError(f"{name} must be {words[kind]}, got {value!r}.")
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {value!r}.")
        return value.lower() == "true"
    if kind is str and not value:
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}.")
    choices = item.metadata.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def check_numbers(
    arguments: Any,
    *,
    at_least_0: Sequence[str] = (),
    positive: Sequence[str] = (),
    share: Sequence[str] = (),
    below_1: Sequence[str] = (),
    at_least_0_integer: Sequence[str] = (),
    at_least_1_integer: Sequence[str] = (),
    finite: Sequence[str] = (),
) -> None:
    """Refuses the numbers of a dataclass that are out of range, NaN or infinite, when the run starts; None is passed
    over.

    Args:
        arguments: the dataclass.
        at_least_0, positive, share, below_1, finite: names of real numbers: at least 0, above 0, in [0, 1], in [0, 1),
            or any finite one.
        at_least_0_integer, at_least_1_integer: names of whole numbers.

    Raises:
        ValueError: naming the argument.
    """
    reals = [(at_least_0, {"minimum": 0}), (positive, {"above": 0}), (share, {"minimum": 0, "maximum": 1})]
    reals += [(below_1, {"minimum": 0, "below": 1}), (finite, {})]
    integers = [(at_least_0_integer, {"minimum": 0}), (at_least_1_integer, {"minimum": 1})]
    for check, groups in ((check_real, reals), (check_integer, integers)):
        for names, limits in groups:
            for name in names:
                if getattr(arguments, name) is not None:
                    check(name, getattr(arguments, name), **limits)


def check_guidance(guidance_scale: float, condition_dropout: float) -> None:
    """Refuses guidance of the validation picture by a null condition that is never trained."""
    if guidance_scale != 1 and condition_dropout == 0:
        raise ValueError(
            f"`guidance_scale` must be 1 with condition_dropout=0, which never trains the null condition, got "
            f"{guidance_scale}."
        )


def check_smallest_side(what: str, size: Sequence[int], least: int) -> None:
    """Refuses images of `size` (H, W) that are too small for `what`."""
    if min(size) < least:
        raise ValueError(f"resolution={size}: {what} needs at least {least} pixels in each direction.")


def check_agrees(name: str, value: Any, found: Any, source: str | Path) -> None:
    """Refuses an argument that contradicts the model it starts from."""
    if value != found:
        raise ValueError(f"{name}={value}: it must be {found}, as in {source}.")


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
