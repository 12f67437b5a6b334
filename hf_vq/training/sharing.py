"""The end of a run: the trained model in a folder of its own, with a card that states its figures, and on the Hub."""

import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..hub import push_saved, save_for_sharing
from ..hub_cards import model_card
from .checkpointing import atomic_folder, last_good_checkpoint
from .data.image_datasets import DataArguments
from .disk_space import write_failures_named


if TYPE_CHECKING:
    from .run import TrainingRun


def validation_figures(output_dir: Path) -> dict[str, float]:
    """The last validation of a run, from its metrics.jsonl; empty if there was none."""
    figures = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = {name.removeprefix("validation/"): v for name, v in row.items() if name.startswith("validation/")}
        figures = found or figures
    return figures


def training_card(
    run: "TrainingRun",
    model: nn.Module | DiffusionPipeline,
    data: DataArguments,
    license: str = "unknown",
) -> ModelCard:
    """The card of what a run has trained, for those who have hf_vq: its data, its command, its last pictures and the
    figures of its last validation.
    """
    program = sys.argv[0] if sys.argv[0].startswith("hf-vq ") else f"python {_without_folders(sys.argv[0])}"
    command = " ".join([program, *(shlex.quote(_without_folders(argument)) for argument in sys.argv[1:])])
    name = run.arguments.hub_model_id or f"user/{run.output_dir.name}"
    source = data.dataset_name_or_path
    figures = {
        name: value
        for name, value in validation_figures(run.output_dir).items()
        if not name.startswith(("num_", "images_per", "seconds")) and math.isfinite(value)
    }
    description = f"Trained for {run.global_step} steps of {run.arguments.train_batch_size} samples."
    is_hub_id = not Path(source).exists()
    return model_card(
        model,
        name,
        license=license,
        dataset=source if is_hub_id else f"the folder `{Path(source).name}`",
        dataset_id=source if is_hub_id else None,
        metrics=figures,
        split=data.validation_name,
        description=description,
        command=command,
        with_code=False,
        pictures={file: f"{Path(file).stem}, at the end of the run" for file in newest_pictures(run.output_dir)},
    )


def newest_pictures(output_dir: Path) -> dict[str, Path]:
    """The last picture of each kind that a run has drawn, by the name that it gets beside the model."""
    found = {}
    for path in sorted((output_dir / "pictures").glob("*.png")):
        name, _, step = path.stem.rpartition("-")
        if name and step.isdigit():
            found[f"{name}.png"] = path
    return found


def _without_folders(argument: str) -> str:
    """An argument of a command, in which an absolute path, which is one of this machine, is its last part only."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def _bytes_of(model: nn.Module | DiffusionPipeline) -> int:
    parts = model.components.values() if isinstance(model, DiffusionPipeline) else [model]
    tensors = [value for part in parts if isinstance(part, nn.Module) for value in part.state_dict().values()]
    return sum(value.numel() * value.element_size() for value in tensors)


def save_trained(
    run: "TrainingRun",
    model: nn.Module | DiffusionPipeline,
    name: str,
    data: DataArguments,
    image_processor: BaseImageProcessor | None = None,
) -> Path:
    """Writes `output_dir/name`, complete or not at all, and pushes it if the arguments say so. Main process only.

    Args:
        run (`TrainingRun`): finished, within its `trained_model`.
        model: a model or a pipeline of hf_vq, with the weights that are to be shared.
        name: of the folder.
        data: what it was trained on, for the card.
        image_processor: saved with a model; with a pipeline, beside its tokenizer.

    Raises:
        OSError: the disk is full; the checkpoints are there.
        RuntimeError: the push failed; the folder is there.

    The folder is for those who have hf_vq; what is pushed carries its code, and each has the card that says so.
    """
    card = training_card(run, model, data, run.arguments.hub_license)
    path, rest = run.output_dir / name, last_good_checkpoint(run.output_dir)
    with write_failures_named(path, "the trained model", _bytes_of(model), rest), atomic_folder(path) as folder:
        save_for_sharing(folder, model, card, image_processor, with_code=False)
        for file, picture in newest_pictures(run.output_dir).items():
            shutil.copyfile(picture, folder / file)
    if run.arguments.push_to_hub:
        try:
            push_saved(run.output_dir / name, model, run.arguments.hub_model_id)
        except Exception as error:  # whatever it is, the model is there
            raise RuntimeError(
                f"the model is saved in {run.output_dir / name}, but was not pushed to "
                f"{run.arguments.hub_model_id!r}: {error} "
                "The same command pushes it again, without training."
            ) from error
    return run.output_dir / name
