"""Train a VQGAN tokenizer (Esser et al. 2021) on a folder of images, parquet files or a Hub data set.

    hf-vq train vqgan CONFIG.yaml [--argument value ...]
    accelerate launch -m hf_vq.training.scripts.train_vqgan CONFIG.yaml [--argument value ...]

With --condition it is a tokenizer of the images' label maps, depth maps, edges or drawn poses, for a prior that is
conditioned on them: see examples/conditional.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset

from hf_vq import VQConditionProcessor, VQGANConfig, VQGANModel, VQImageProcessor
from hf_vq.evaluation.reconstruction import SSIM_WINDOW
from hf_vq.models.autoencoders.image_processing_vq_condition import CONDITIONS
from hf_vq.models.quantizers.build import QUANTIZERS
from hf_vq.training.data.conditions import build_reader, condition_values
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.data.image_decoding import as_size
from hf_vq.training.fine_tuning import PARTS, train_part
from hf_vq.training.objectives.discriminator import PatchDiscriminator
from hf_vq.training.objectives.perceptual import PerceptualNetwork, build_perceptual
from hf_vq.training.objectives.segmentation_loss import LOSSES, segmentation_loss
from hf_vq.training.objectives.vqgan_loss import DISCRIMINATOR_LOSSES, RECONSTRUCTION_LOSSES, VQGANLoss
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
from hf_vq.training.validation import ConditionsAlone, draw_atlas, validate_segmentation, validate_tokenizer


logger = logging.getLogger(__name__)


@dataclass
class VQGANArguments:
    """The model, its losses and its discriminator."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this tokenizer, or that of this pipeline; the fields up to `quantizer_kwargs` are its."
        },
    )
    train: str = field(
        default="all",
        metadata={"help": "What is trained: all, or the decoder on frozen codes.", "choices": list(PARTS)},
    )
    base_channels: int = 128
    channel_multiplier: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    latent_channels: int = 256
    norm_num_groups: int = field(
        default=32,
        metadata={
            "help": "Groups of GroupNorm, which must divide every width. Groups of one channel have no mean left that "
            "could tell one flat label map from another: narrow models of them want few."
        },
    )
    embed_dim: int = 256
    num_embeddings: int = 1024
    commitment_cost: float = 0.25
    quantizer: str = field(default="ema", metadata={"help": "How codes are chosen.", "choices": list(QUANTIZERS)})
    in_channels: int | None = field(
        default=None,
        metadata={"help": "Channels of the images: 1 grey, 3 RGB (the default), 4 RGBA; a condition has its own."},
    )
    condition: str | None = field(
        default=None,
        metadata={
            "help": "Train on conditions in place of images, read from conditioning_image_column: "
            "segmentation, depth, pose, "
            "or edges, which are found in the images where no column is given."
        },
    )
    num_labels: int | None = field(default=None, metadata={"help": "Of a segmentation: its ids are 0 to N-1."})
    ignore_index: int = field(default=255, metadata={"help": "The id of unlabelled pixels; -1: there is none."})
    ignore_label: int | None = field(
        default=None, metadata={"help": "The label of unlabelled pixels; without it they have none, and no loss."}
    )
    label_map: list[int] | None = field(
        default=None, metadata={"help": "The label of each id of the data; without it ids are labels."}
    )
    segmentation_loss: str = field(
        default="cross_entropy", metadata={"help": "cross_entropy, or the original's bce.", "choices": list(LOSSES)}
    )
    quantizer_kwargs: str = field(default="{}", metadata={"help": "Its further arguments, a mapping or JSON."})
    reconstruction: str = field(default="l1", metadata={"help": "Distance.", "choices": list(RECONSTRUCTION_LOSSES)})
    perceptual: str | None = field(
        default=None,
        metadata={
            "help": "lpips (the default), mobilenet_v2, none, or a file with LPIPS's weights; conditions: none."
        },
    )
    perceptual_weight: float = 1.0
    quantizer_weight: float = 1.0
    disc_start_fraction: float = field(default=0.5, metadata={"help": "The discriminator starts here, 0 to 1."})
    disc_start_step: int | None = field(default=None, metadata={"help": "The same as a step; overrides the fraction."})
    disc_warmup_steps: int = 0
    disc_weight: float | None = field(
        default=None,
        metadata={
            "help": "0.5 by default (the original's 0.8 costs more, see examples/comparison); 0 trains without a "
            "discriminator, as a segmentation always does."
        },
    )
    disc_channels: int = 64
    disc_layers: int = 3
    discriminator: str | None = field(
        default=None,
        metadata={
            "help": 'Folder of a discriminator to continue with, or "none" for a new one; by default '
            "that in the folder "
            "of model_name_or_path, if it has one."
        },
    )
    disc_loss: str = field(
        default="hinge", metadata={"help": "Of the discriminator.", "choices": list(DISCRIMINATOR_LOSSES)}
    )
    adam_beta1: float = 0.5
    adam_beta2: float = 0.9

    def __post_init__(self):
        self.quantizer_kwargs = parse_mapping("quantizer_kwargs", self.quantizer_kwargs)
        self._complete()
        check_numbers(
            self,
            at_least_0=("commitment_cost", "perceptual_weight", "quantizer_weight", "disc_weight"),
            at_least_0_integer=("disc_start_step", "disc_warmup_steps"),
            at_least_1_integer=(
                "in_channels",
                "base_channels",
                "num_res_blocks",
                "latent_channels",
                "norm_num_groups",
                "embed_dim",
                "num_embeddings",
                "disc_channels",
                "disc_layers",
            ),
            share=("disc_start_fraction",),
            below_1=("adam_beta1", "adam_beta2"),
        )
        self.disc_start_fraction = float(
            self.disc_start_fraction
        )  # YAML's 1 is an int, which the loss takes for a step

    def _complete(self) -> None:
        """What is None, as images or the condition need it; refuses what contradicts the condition."""
        kinds = [kind for kind in CONDITIONS if kind != "image"]
        if self.condition is not None and self.condition not in kinds:
            raise ValueError(f"condition={self.condition!r}: it must be one of {', '.join(kinds)}.")
        is_segmentation = self.condition == "segmentation"
        if is_segmentation and self.num_labels is None:
            raise ValueError("num_labels must be given with condition=segmentation.")
        for name in ("num_labels", "ignore_label", "label_map"):
            if getattr(self, name) is not None and not is_segmentation:
                raise ValueError(f"{name}={getattr(self, name)} is of condition=segmentation alone.")
        channels = 3 if self.condition is None else self.processor(1).num_channels
        if self.condition is not None and self.in_channels not in (None, channels):
            raise ValueError(f"in_channels={self.in_channels}: condition {self.condition!r} has {channels}.")
        self.in_channels = channels if self.in_channels is None else self.in_channels
        if self.condition is not None and self.perceptual not in (None, "none"):
            raise ValueError(f"perceptual={self.perceptual!r}: it must be none with condition={self.condition}.")
        if self.perceptual is None:
            self.perceptual = "lpips" if self.condition is None else "none"
        if is_segmentation and self.disc_weight:
            raise ValueError(f"disc_weight={self.disc_weight}: it must be 0 with condition=segmentation.")
        if self.disc_weight is None:
            self.disc_weight = 0.0 if is_segmentation else 0.5

    def processor(self, resolution: int | Sequence[int]) -> VQConditionProcessor | None:
        """What reads the conditions, and is saved beside their tokenizer; None without any."""
        if self.condition is None:
            return None
        height, width = as_size(resolution)
        return VQConditionProcessor(
            self.condition,
            num_labels=self.num_labels,
            ignore_index=None if self.ignore_index < 0 else self.ignore_index,
            ignore_label=self.ignore_label,
            label_map=self.label_map,
            size={"height": height, "width": width},
        )


def build_model(args: VQGANArguments, resolution: int | Sequence[int]) -> VQGANModel:
    """The tokenizer that the arguments name, or a new one of their sizes."""
    if args.model_name_or_path is not None:
        tokenizer = load_starting_tokenizer(args.model_name_or_path, VQGANModel)
        check_agrees("in_channels", args.in_channels, tokenizer.config.in_channels, args.model_name_or_path)
        return tokenizer
    config = VQGANConfig(
        resolution=resolution,
        in_channels=args.in_channels,
        base_channels=args.base_channels,
        channel_multiplier=args.channel_multiplier,
        num_res_blocks=args.num_res_blocks,
        attn_resolutions=args.attn_resolutions,
        latent_channels=args.latent_channels,
        norm_num_groups=args.norm_num_groups,
        embed_dim=args.embed_dim,
        num_embeddings=args.num_embeddings,
        commitment_cost=args.commitment_cost,
        quantizer=args.quantizer,
        quantizer_kwargs=args.quantizer_kwargs,
    )
    return VQGANModel(config)


def build_discriminator(args: VQGANArguments) -> PatchDiscriminator:
    """A new one, or the one to continue with: that which is named, or which lies in the folder of the tokenizer."""
    folder = args.discriminator
    if folder is None and args.model_name_or_path is not None:
        beside = Path(args.model_name_or_path) / "discriminator"
        folder = beside if beside.is_dir() else None
    if folder is None or folder == "none":
        return PatchDiscriminator(args.in_channels, args.disc_channels, args.disc_layers)
    discriminator = PatchDiscriminator.from_folder(folder)
    check_agrees("in_channels", args.in_channels, discriminator.arguments["in_channels"], folder)
    logger.warning("Continuing with the discriminator in %s; disc_channels and disc_layers are its own.", folder)
    return discriminator


def check_sizes(
    size: tuple[int, int], args: VQGANArguments, critic: PatchDiscriminator, perceptual: PerceptualNetwork | None
) -> None:
    """Refuses images that are too small for a loss, before the first of them is read."""
    if args.condition != "segmentation":
        check_smallest_side("the SSIM of validation", size, SSIM_WINDOW)
    parts = {"perceptual": perceptual} if perceptual is not None else {}
    parts |= {"disc_layers": critic} if args.disc_weight > 0 else {}
    for name, part in parts.items():
        check_smallest_side(f"{name}={getattr(args, name)}", size, part.min_size)


def load_splits(data_args: DataArguments, args: VQGANArguments, seed: int, processor: VQConditionProcessor | None):
    """The training and the validation set; of conditions, with the images that they belong to."""
    options = {"channels": args.in_channels if processor is None else 3, "condition_processor": processor}
    dataset = load_image_dataset(data_args, "train", augment=True, seed=seed, **options)
    return dataset, load_image_dataset(data_args, "validation", class_names=dataset.class_names, **options)


def validate(
    run: TrainingRun,
    tokenizer: VQGANModel,
    validation: Dataset,
    processor: VQConditionProcessor | None,
    perceptual: PerceptualNetwork | None,
) -> dict:
    """The figures of what the tokenizer is one of: images, label maps or other conditions."""
    if processor is None:
        return validate_tokenizer(run, tokenizer, validation, perceptual)
    if processor.condition == "segmentation":
        return validate_segmentation(run, tokenizer, validation, processor)
    return validate_tokenizer(run, tokenizer, ConditionsAlone(validation, processor))


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, VQGANArguments), argv)
    run = TrainingRun(run_args)
    processor = args.processor(data_args.resolution)
    build_reader(processor, data_args.conditioning_image_column, data_args.edge_sigma)  # or an error, before data
    # on a CPU, the gradients of its convolutions take 1.2 to 1.9 times as long in channels_last
    layout = torch.channels_last if run.device.type == "cuda" else torch.contiguous_format
    tokenizer = build_model(args, data_args.resolution).to(memory_format=layout)
    data_args.check_multiple_of(tokenizer.config.downsample_factor)
    run_args.check_codebook(tokenizer.config.num_embeddings)
    critic = build_discriminator(args)
    perceptual = build_perceptual(args.perceptual, argument="perceptual")
    if perceptual is not None:
        perceptual.to(run.device)
    check_sizes(data_args.size, args, critic, perceptual)
    losses = VQGANLoss(
        perceptual,
        reconstruction=args.reconstruction,
        perceptual_weight=args.perceptual_weight,
        quantizer_weight=args.quantizer_weight,
        disc_factor=1.0 if args.disc_weight > 0 else 0.0,
        disc_weight=args.disc_weight,
        disc_loss=args.disc_loss,
        disc_start=args.disc_start_fraction if args.disc_start_step is None else args.disc_start_step,
        disc_warmup_steps=args.disc_warmup_steps,
    )

    dataset, validation = load_splits(data_args, args, run_args.seed, processor)
    trained = train_part(tokenizer, args.train)
    # whole: the adaptive weight of the adversarial loss is a ratio of gradients of the last layer
    model = run.add_model("model", tokenizer, ema=True, shard=False)
    discriminator = run.add_model("discriminator", critic)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = run.add_optimizer("optimizer", torch.optim.Adam(trained, lr=run_args.learning_rate, betas=betas))
    d_optimizer = run.add_optimizer(
        "d_optimizer", torch.optim.Adam(discriminator.parameters(), lr=run_args.learning_rate, betas=betas)
    )

    run.on_validation(lambda: validate(run, tokenizer, validation, processor, perceptual))
    run.start()
    total = run_args.max_train_steps
    for batch in run.batches(dataset):
        images = batch["pixel_values"] if processor is None else condition_values(batch["condition"], processor)
        images = images.contiguous(memory_format=layout)
        tokenizer.set_training_step(run.global_step, total)
        with run.accumulate(model, discriminator):
            output = model(images)
            if args.condition == "segmentation":
                loss, metrics = segmentation_loss(output.sample, batch["condition"], args.segmentation_loss)
                loss = loss + args.quantizer_weight * output.quantizer_loss.mean()
                metrics |= {"loss": loss.detach(), "quantizer_loss": output.quantizer_loss.mean().detach()}
            else:
                loss, metrics = losses.generator_loss(
                    images,
                    output.sample.float(),
                    output.quantizer_loss,
                    tokenizer.get_last_layer(),
                    run.global_step,
                    total,
                    discriminator,
                )
            run.backward(loss)
            run.step(optimizer)
            run.log_codes(output.indices, tokenizer.config.num_embeddings)
            if losses.discriminator_active(run.global_step, total):
                d_loss, d_metrics = losses.discriminator_loss(
                    images, output.sample.float(), run.global_step, total, discriminator
                )
                run.backward(d_loss)
                run.step(d_optimizer)
                metrics.update(d_metrics)
            run.log(metrics)
        run.finish_step()

    with run.trained_model("model") as trained:
        if run.is_main_process:
            beside = processor or VQImageProcessor(size=data_args.resolution, num_channels=args.in_channels)
            if processor is None:  # of conditions there is nothing to look at
                draw_atlas(run, trained, validation)
            save_trained(run, trained, "tokenizer", data_args, beside)
    if run.is_main_process and args.disc_weight > 0:
        # beside the tokenizer, not in what is shared: --discriminator continues it
        critic.save(run.output_dir / "discriminator")
    run.finish()


if __name__ == "__main__":
    main()
