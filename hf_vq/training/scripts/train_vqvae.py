"""Train a VQ-VAE tokenizer (van den Oord et al. 2017) on a folder of images, parquet files or a Hub data set.

hf-vq train vqvae CONFIG.yaml [--argument value ...]
accelerate launch -m hf_vq.training.scripts.train_vqvae CONFIG.yaml [--argument value ...]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hf_vq import VQImageProcessor, VQVAEModel
from hf_vq.evaluation.reconstruction import SSIM_WINDOW
from hf_vq.models.autoencoders.modeling_tokenizer import VQTokenizerModel
from hf_vq.models.modeling_outputs import VQModelOutput
from hf_vq.models.quantizers.build import QUANTIZERS
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset, pixel_variance
from hf_vq.training.fine_tuning import PARTS, train_part
from hf_vq.training.objectives.perceptual import PerceptualNetwork, build_perceptual
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import (
    check_agrees,
    check_numbers,
    check_smallest_side,
    parse_arguments,
    parse_mapping,
)
from hf_vq.training.sharing import save_trained
from hf_vq.training.trained_tokenizers import load_starting_tokenizer
from hf_vq.training.validation import draw_atlas, validate_tokenizer


@dataclass
class VQVAEArguments:
    """The model; the defaults are the paper's."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this tokenizer, or that of this pipeline; the sizes and the quantizer are its own."
        },
    )
    train: str = field(
        default="all",
        metadata={"help": "What is trained: all, or the decoder on frozen codes.", "choices": list(PARTS)},
    )
    hidden_size: int = 128
    residual_hidden_size: int = 32
    num_residual_layers: int = 2
    downsample_factor: int = 4
    embed_dim: int = 64
    num_embeddings: int = 512
    commitment_cost: float = 0.25
    quantizer: str = field(default="ema", metadata={"help": "How codes are chosen.", "choices": list(QUANTIZERS)})
    in_channels: int = field(default=3, metadata={"help": "Channels of the images: 1 grey, 3 RGB, 4 RGBA."})
    quantizer_kwargs: str = field(default="{}", metadata={"help": "Its further arguments, a mapping or JSON."})
    data_variance: float | None = field(
        default=None, metadata={"help": "Variance of the pixels; measured on the first 1000 images if not given."}
    )
    perceptual: str = field(
        default="none",
        metadata={"help": "Distance beside the squared error: none (the paper), lpips, mobilenet_v2, or a file."},
    )
    perceptual_weight: float = 1.0
    validation_perceptual: str | None = field(
        default=None,
        metadata={"help": "Network for the perceptual figure of validation; by default that of the loss."},
    )

    def __post_init__(self):
        self.quantizer_kwargs = parse_mapping("quantizer_kwargs", self.quantizer_kwargs)
        check_numbers(
            self,
            at_least_0=("commitment_cost", "perceptual_weight"),
            positive=("data_variance",),
            at_least_1_integer=(
                *("in_channels", "hidden_size", "residual_hidden_size", "embed_dim", "num_embeddings"),
                "downsample_factor",
            ),
            at_least_0_integer=("num_residual_layers",),
        )


def build_model(
    args: VQVAEArguments,
    resolution: int | Sequence[int],
    model_class: type[VQTokenizerModel] = VQVAEModel,
    **options: int | float,
) -> VQTokenizerModel:
    """The tokenizer that the arguments name, or a new one of their sizes.

    Args:
        model_class, options: of a relative of VQ-VAE, with what its configuration has beside.
    """
    if args.model_name_or_path is not None:
        tokenizer = load_starting_tokenizer(args.model_name_or_path, model_class)
        check_agrees("in_channels", args.in_channels, tokenizer.config.in_channels, args.model_name_or_path)
        return tokenizer
    config = model_class.config_class(
        resolution=resolution,
        in_channels=args.in_channels,
        hidden_size=args.hidden_size,
        residual_hidden_size=args.residual_hidden_size,
        num_residual_layers=args.num_residual_layers,
        downsample_factor=args.downsample_factor,
        embed_dim=args.embed_dim,
        num_embeddings=args.num_embeddings,
        commitment_cost=args.commitment_cost,
        quantizer=args.quantizer,
        quantizer_kwargs=args.quantizer_kwargs,
        data_variance=args.data_variance,
        **options,
    )
    return model_class(config)


def build_distance(
    argument: str, choice: str, size: tuple[int, int], device: torch.device
) -> PerceptualNetwork | None:
    """The perceptual network that an argument names, or a ValueError if the images are too small for it."""
    network = build_perceptual(choice, argument=argument)
    if network is None:
        return None
    check_smallest_side(f"{argument}={choice}", size, network.min_size)
    return network.to(device)


def build_distances(
    args: VQVAEArguments, size: tuple[int, int], device: torch.device
) -> tuple[PerceptualNetwork | None, PerceptualNetwork | None]:
    """The perceptual networks of the loss and of validation, one if they are the same.

    Raises:
        ValueError: images that are too small for one of them or for SSIM, before the first is read.
    """
    check_smallest_side("the SSIM of validation", size, SSIM_WINDOW)
    perceptual = build_distance("perceptual", args.perceptual, size, device)
    if args.validation_perceptual in (None, args.perceptual):
        return perceptual, perceptual
    return perceptual, build_distance("validation_perceptual", args.validation_perceptual, size, device)


def training_loss(
    output: VQModelOutput, pixel_values: torch.Tensor, perceptual: PerceptualNetwork | None, weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The model's loss with `weight` times the perceptual distance, and the terms for the log."""
    loss = output.loss
    terms = {"reconstruction_loss": output.reconstruction_loss, "quantizer_loss": output.quantizer_loss}
    if perceptual is not None and weight > 0:
        terms["perceptual_loss"] = perceptual(output.sample.float(), pixel_values.float()).mean()
        loss = loss + weight * terms["perceptual_loss"]
    return loss, {name: term.detach() for name, term in {"loss": loss, **terms}.items()}


def train_tokenizer(
    run: TrainingRun,
    data_args: DataArguments,
    args: VQVAEArguments,
    tokenizer: VQTokenizerModel,
    validate: Callable[..., dict[str, float]] = validate_tokenizer,
) -> None:
    """The whole run of a tokenizer of this family, from the data to the saved model.

    Args:
        run: new, without models.
        data_args, args: of the command line.
        tokenizer: see [`build_model`].
        validate: called as [`validate_tokenizer`] is.
    """
    run_args = run.arguments
    tokenizer.to(memory_format=torch.channels_last)
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # those of its shards
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


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, VQVAEArguments), argv)
    run = TrainingRun(run_args)
    train_tokenizer(run, data_args, args, build_model(args, data_args.resolution))


if __name__ == "__main__":
    main()
