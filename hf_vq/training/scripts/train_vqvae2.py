"""Train VQ-VAE-2's hierarchical tokenizer (Razavi et al. 2019) on a folder of images, parquet files or a Hub data set.

hf-vq train vqvae2 CONFIG.yaml [--argument value ...]
accelerate launch -m hf_vq.training.scripts.train_vqvae2 CONFIG.yaml [--argument value ...]
"""

from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from hf_vq import VQImageProcessor, VQVAE2Model
from hf_vq.evaluation.hierarchy import reconstruct_by_levels
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset, pixel_variance
from hf_vq.training.fine_tuning import train_part
from hf_vq.training.objectives.perceptual import PerceptualNetwork
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_numbers, parse_arguments
from hf_vq.training.scripts.train_vqvae import VQVAEArguments, build_distances, build_model, training_loss
from hf_vq.training.sharing import save_trained
from hf_vq.training.validation import draw_atlas, validate_tokenizer


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
    tokenizer = build_model(args, data_args.resolution, VQVAE2Model, **levels).to(memory_format=torch.channels_last)
    data_args.check_multiple_of(max(tokenizer.config.downsample_factors))
    run_args.check_codebook(tokenizer.config.num_embeddings)
    perceptual, judge = build_distances(args, data_args.size, run.device)

    dataset = load_image_dataset(data_args, "train", augment=True, seed=run_args.seed, channels=args.in_channels)
    validation = load_image_dataset(
        data_args, "validation", class_names=dataset.class_names, channels=args.in_channels
    )

    if args.model_name_or_path is None and args.data_variance is None:
        tokenizer.config.data_variance = pixel_variance(validation)
    train_part(tokenizer, args.train)
    model = run.add_model("model", tokenizer, ema=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = run.add_optimizer("optimizer", torch.optim.Adam(parameters, lr=run_args.learning_rate))

    run.on_validation(lambda: validate(run, tokenizer, validation, judge))
    run.start()
    for batch in run.batches(dataset):
        tokenizer.set_training_step(run.global_step, run_args.max_train_steps)
        with run.accumulate(model):
            images = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
            output = model(images)
            loss, metrics = training_loss(output, images, perceptual, args.perceptual_weight)
            run.backward(loss)
            run.step(optimizer)
            run.log(metrics)
            run.log_codes(output.indices, tokenizer.config.num_embeddings)
        run.finish_step()

    with run.trained_model("model") as trained:
        if run.is_main_process:
            processor = VQImageProcessor(size=data_args.resolution, num_channels=args.in_channels)
            draw_atlas(run, trained, validation)
            save_trained(run, trained, "tokenizer", data_args, processor)
    run.finish()


if __name__ == "__main__":
    main()
