"""Train a VQGAN tokenizer (Esser et al. 2021) on a folder of images, parquet files or a Hub data set.

python examples/vqgan/train_vqgan.py examples/vqgan/emoji_32.yaml --output_dir outputs/vqgan
accelerate launch examples/vqgan/train_vqgan.py CONFIG.yaml [--argument value ...]
"""

from dataclasses import dataclass, field

import torch

from hf_vq import VQGANConfig, VQGANModel, VQImageProcessor
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.objectives.discriminator import PatchDiscriminator
from hf_vq.training.objectives.perceptual import build_perceptual
from hf_vq.training.objectives.vqgan_loss import VQGANLoss
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import parse_arguments, parse_mapping
from hf_vq.training.sharing import save_trained
from hf_vq.training.validation import validate_tokenizer


@dataclass
class VQGANArguments:
    """The model, its losses and its discriminator."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from this tokenizer; the fields up to `quantizer_kwargs` are its own."}
    )
    base_channels: int = 128
    channel_multiplier: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    latent_channels: int = 256
    embed_dim: int = 256
    num_embeddings: int = 1024
    commitment_cost: float = 0.25
    quantizer: str = field(default="ema", metadata={"help": "vq, ema, gumbel, cosine, fsq, lfq or residual."})
    quantizer_kwargs: str = field(default="{}", metadata={"help": "Its further arguments, a mapping or JSON."})
    reconstruction: str = field(default="l1", metadata={"help": "l1 or l2."})
    perceptual: str = field(
        default="lpips", metadata={"help": "lpips, mobilenet_v2, none, or a file with LPIPS's weights."}
    )
    perceptual_weight: float = 1.0
    quantizer_weight: float = 1.0
    disc_start_fraction: float = field(default=0.5, metadata={"help": "The discriminator starts here, 0 to 1."})
    disc_start_step: int | None = field(default=None, metadata={"help": "The same as a step; overrides the fraction."})
    disc_warmup_steps: int = 0
    disc_weight: float = field(default=0.8, metadata={"help": "0 trains without a discriminator."})
    disc_channels: int = 64
    disc_layers: int = 3
    disc_loss: str = field(default="hinge", metadata={"help": "hinge or vanilla."})
    adam_beta1: float = 0.5
    adam_beta2: float = 0.9

    def __post_init__(self):
        self.quantizer_kwargs = parse_mapping("quantizer_kwargs", self.quantizer_kwargs)
        self.disc_start_fraction = float(
            self.disc_start_fraction
        )  # YAML's 1 is an int, which the loss takes for a step


def build_model(args: VQGANArguments, resolution: int) -> VQGANModel:
    if args.model_name_or_path is not None:
        return VQGANModel.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    config = VQGANConfig(
        resolution=resolution,
        base_channels=args.base_channels,
        channel_multiplier=args.channel_multiplier,
        num_res_blocks=args.num_res_blocks,
        attn_resolutions=args.attn_resolutions,
        latent_channels=args.latent_channels,
        embed_dim=args.embed_dim,
        num_embeddings=args.num_embeddings,
        commitment_cost=args.commitment_cost,
        quantizer=args.quantizer,
        quantizer_kwargs=args.quantizer_kwargs,
    )
    return VQGANModel(config)


def main(argv: list[str] | None = None) -> None:
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, VQGANArguments), argv)
    run = TrainingRun(run_args)
    dataset = load_image_dataset(data_args, "train", augment=True, seed=run_args.seed)
    validation = load_image_dataset(data_args, "validation")

    tokenizer = build_model(args, data_args.resolution).to(memory_format=torch.channels_last)
    model = run.add_model("model", tokenizer, ema=True)
    discriminator = run.add_model(
        "discriminator", PatchDiscriminator(base_channels=args.disc_channels, num_layers=args.disc_layers)
    )
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = run.add_optimizer(
        "optimizer", torch.optim.Adam(model.parameters(), lr=run_args.learning_rate, betas=betas)
    )
    d_optimizer = run.add_optimizer(
        "d_optimizer", torch.optim.Adam(discriminator.parameters(), lr=run_args.learning_rate, betas=betas)
    )
    perceptual = build_perceptual(args.perceptual)
    if perceptual is not None:
        perceptual.to(run.device)
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

    run.on_validation(lambda: validate_tokenizer(run, tokenizer, validation, perceptual))
    run.start()
    total = run_args.max_train_steps
    for batch in run.batches(dataset):
        images = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        tokenizer.set_training_step(run.global_step, total)
        with run.accumulate(model, discriminator):
            output = model(images)
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

    if run.is_main_process:
        with run.ema_weights("model"):
            save_trained(run, tokenizer.eval(), "tokenizer", data_args, VQImageProcessor(size=data_args.resolution))
    run.finish()


if __name__ == "__main__":
    main()
