"""Reading original checkpoints safely and strictly, and writing what they become."""

import argparse
import pickle
import re
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import nn


# Classes of trainers that old checkpoints name beside their weights. Each becomes an empty stand-in: the trainer need not
# be installed, and none of its code runs.
TRAINER_CLASSES = (
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.gpu_stats_monitor.GPUStatsMonitor",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)


class _StandIn:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        """Its state is of no use."""


def _stand_in(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    return type(class_name, (_StandIn,), {"__module__": module})


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint: a safetensors file, or a pickle with or without a `state_dict` entry.

    Raises:
        ValueError: as `load_pickle`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    checkpoint = load_pickle(path)
    state_dict = checkpoint.get("state_dict", checkpoint)
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def load_pickle(path: str | Path):
    """What a file of `torch.save` holds.

    Raises:
        ValueError: if it holds anything but tensors, plain containers and `TRAINER_CLASSES`; no code from it runs.
    """
    with torch.serialization.safe_globals([_stand_in(name) for name in TRAINER_CLASSES]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if found is None:
                raise
            raise ValueError(
                f"`checkpoint` {path} holds an object of the class {found[1]}, which is not on the list that is safe to "
                "read; save its state_dict alone."
            ) from error


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


def load_exactly(model: nn.Module, state_dict: dict) -> None:
    """Load `state_dict`, which must pass `check_keys`, into `model`, which may be on the meta device."""
    check_keys(model, state_dict)
    model.load_state_dict({key: value.contiguous() for key, value in state_dict.items()}, assign=True)
    still_empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if still_empty:
        raise RuntimeError(f"{type(model).__name__} has tensors that no checkpoint holds: {still_empty[:5]}.")


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


def push_folder(folder: str | Path, repo_id: str) -> str:
    """Uploads the folder in one commit and returns the commit's address."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload converted weights").commit_url
