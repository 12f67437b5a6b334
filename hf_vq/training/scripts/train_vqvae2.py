"""Train VQ-VAE-2's hierarchical tokenizer (Razavi et al. 2019) on a folder of images, parquet files or a Hub data set.

hf-vq train vqvae2 CONFIG.yaml [--argument value ...]
accelerate launch -m hf_vq.training.scripts.train_vqvae2 CONFIG.yaml [--argument value ...]
"""

from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from hf_vq import VQVAE2Model
from hf_vq.evaluation.hierarchy import reconstruct_by_levels
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.objectives.perceptual import PerceptualNetwork
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_numbers, parse_arguments
from hf_vq.training.scripts.train_vqvae import VQVAEArguments, build_model, train_tokenizer
from hf_vq.training.validation import validate_tokenizer


@dataclass
class VQVAE2Arguments(VQVAEArguments):
    """The model, as in VQ-VAE but for its levels; the defaults are the paper's."""

    residual_hidden_size: int = 64
    downsample_factor: int = field(default=8, metadata={"help": "Pixels a code of the top level; 32 for 3 levels."})
    num_levels: int = field(default=2, metadata={"help": "The paper has 2, and 3 for 1024 pixels."})
    level_dropout: float = field(
        default=0.0, metadata={"help": "Share of the training images that are decoded from upper levels alone."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, at_least_1_integer=("num_levels",), share=("level_dropout",))


@torch.no_grad()
def validate(
    run: TrainingRun, tokenizer: VQVAE2Model, dataset: Dataset, perceptual: PerceptualNetwork | None
) -> dict[str, float]:
    """The figures and the picture of every tokenizer, and one of what each level holds."""
    images = torch.stack([dataset[i]["pixel_values"] for i in range(min(12, len(dataset)))]).to(run.device)
    rows = [images, *reconstruct_by_levels(tokenizer, images)]
    run.log_images("levels", torch.cat(rows), columns=len(images))
    return validate_tokenizer(run, tokenizer, dataset, perceptual)


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, VQVAE2Arguments), argv)
    run = TrainingRun(run_args)
    levels = {"num_levels": args.num_levels, "level_dropout": args.level_dropout}
    tokenizer = build_model(args, data_args.resolution, VQVAE2Model, **levels)
    train_tokenizer(run, data_args, args, tokenizer, validate)


if __name__ == "__main__":
    main()
