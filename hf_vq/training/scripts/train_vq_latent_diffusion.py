"""Train latent diffusion (Rombach et al. 2022) on the latents of a trained tokenizer, before their quantization.

    hf-vq train vq_latent_diffusion CONFIG.yaml --tokenizer outputs/vqgan/tokenizer [--argument value ...]
    accelerate launch -m hf_vq.training.scripts.train_vq_latent_diffusion CONFIG.yaml [--argument value ...]

The latents are computed once, into OUTPUT_DIR/latents, or on the fly. The result is a pipeline folder,
OUTPUT_DIR/pipeline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from hf_vq import VQLatentDiffusionPipeline
from hf_vq.distributed import all_reduced, share_of_process
from hf_vq.pipelines.conditioning import encode_text
from hf_vq.training.data.code_splits import check_single_codes, code_grids, count_classes, make_on_meta
from hf_vq.training.data.columns import NO_LABEL
from hf_vq.training.data.image_datasets import CaptionedDataArguments, DataArguments, collate, load_image_dataset
from hf_vq.training.data.latents_cache import LatentsDataset, encode_latents, write_latents
from hf_vq.training.fine_tuning import START_HELP, StartingPoint
from hf_vq.training.objectives.diffusion_objective import PREDICTION_TYPES, DiffusionObjective, LatentScale
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_guidance, check_numbers, parse_arguments
from hf_vq.training.sample_generators import rand_of_samples, randn_of_samples, sample_generators
from hf_vq.training.sharing import save_trained
from hf_vq.training.text_encoder import load_text_encoder
from hf_vq.training.trained_tokenizers import TOKENIZER_HELP, load_tokenizer


@dataclass
class LatentDiffusionArguments:
    """The denoiser, what it predicts, and its optimizer."""

    tokenizer: str = field(metadata={"help": TOKENIZER_HELP})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": START_HELP + " Its pipeline's scheduler, kind of prediction and way of reading captions stay too, "
            "and its scaling factor where none is given."
        },
    )
    scaling_factor: float | None = field(
        default=None, metadata={"help": "What latents are multiplied by; not given: 1 over their standard deviation."}
    )
    cache_latents: bool = field(default=True, metadata={"help": "Encode the images once; without, in every step."})
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256])
    layers_per_block: int = 2
    attention_levels: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Levels with attention; 0 is the latents' own size."}
    )
    attention_head_dim: int = 32
    norm_num_groups: int = 32
    dropout: float = 0.0
    prediction_type: str = field(default="v_prediction", metadata={"choices": list(PREDICTION_TYPES)})
    min_snr_gamma: float | None = field(default=None, metadata={"help": "Min-SNR weighting, 5 in its paper."})
    elbo_weight: float = field(default=0.0, metadata={"help": "Of the variational bound's term in the loss."})
    num_train_timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Share of the classes or captions that are dropped, for guidance."}
    )
    text_encoder: str | None = field(default=None, metadata={"help": "Frozen text encoder with its tokenizer."})
    text_max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a caption; shorter ones are padded."}
    )
    weight_decay: float = 0.0
    channels_last: bool = field(
        default=True, metadata={"help": "Memory layout of the denoiser; faster on most devices."}
    )
    sample_classes: int = field(default=9, metadata={"help": "Classes, or captions, in the validation picture."})
    sample_steps: int = field(default=25, metadata={"help": "Denoising steps of the validation picture."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation picture."})

    def __post_init__(self):
        check_numbers(
            self,
            at_least_1_integer=(
                "layers_per_block",
                "attention_head_dim",
                "norm_num_groups",
                "num_train_timesteps",
                "text_max_length",
                "sample_classes",
                "sample_steps",
            ),
            below_1=("dropout", "condition_dropout"),
            positive=("scaling_factor", "min_snr_gamma", "beta_start", "beta_end"),
            at_least_0=("weight_decay", "guidance_scale", "elbo_weight"),
        )
        check_guidance(self.guidance_scale, self.condition_dropout)
        if any(width < 1 for width in self.block_out_channels) or not self.block_out_channels:
            raise ValueError(f"`block_out_channels` must be positive, got {self.block_out_channels}.")
        if self.sample_steps > self.num_train_timesteps:
            raise ValueError(
                f"sample_steps={self.sample_steps}: it must be at most num_train_timesteps={self.num_train_timesteps}."
            )
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_end={self.beta_end}: it must lie between beta_start={self.beta_start} and 1, which is left out."
            )
        if self.elbo_weight and self.prediction_type == "flow":
            raise ValueError(f"elbo_weight={self.elbo_weight}: a flow has no such bound; it must be 0.")
        levels = range(len(self.block_out_channels))
        if not set(self.attention_levels) <= set(levels):
            raise ValueError(f"attention_levels={self.attention_levels}: there are the levels {list(levels)}.")
        widths = self.block_out_channels
        attending = [widths[level] for level in self.attention_levels] + widths[-1:]  # the middle block does always
        for name, divided in (("attention_head_dim", attending), ("norm_num_groups", widths)):
            if any(width % getattr(self, name) for width in divided):
                raise ValueError(f"{name}={getattr(self, name)}: it must divide the widths {divided}.")


class Data:
    """Batches of latents for both splits: cached, or encoded from images in every step."""

    def __init__(
        self, run: TrainingRun, data: DataArguments, args: LatentDiffusionArguments, tokenizer: PreTrainedModel
    ):
        self.run, self.arguments, self.tokenizer, self.class_names = run, data, tokenizer, None
        data.check_multiple_of(tokenizer.config.downsample_factor)
        if args.cache_latents and data.crop != "center":
            raise ValueError(
                f"crop={data.crop!r} has no effect on latents that are written once: set cache_latents=false."
            )
        self.splits = {}
        for split in ("train", "validation"):
            augment = split == "train" and not args.cache_latents
            images = load_image_dataset(
                data,
                split,
                augment=augment,
                seed=run.arguments.seed,
                class_names=self.class_names,
                channels=tokenizer.config.in_channels,
            )
            self.class_names = images.class_names if split == "train" else self.class_names
            self.splits[split] = self._cached(images, split) if args.cache_latents else images

    def _cached(self, images: Dataset, split: str) -> LatentsDataset:
        data = self.arguments
        run, flip = self.run, data.random_flip and split == "train"
        folder = run.output_dir / "latents" / split
        write_latents(self.tokenizer, images, folder, flip=flip, num_workers=run.arguments.dataloader_num_workers)
        return LatentsDataset(folder, random_flip=flip, seed=run.arguments.seed, caption_column=data.caption_column)

    def latents(self, batch: dict) -> torch.Tensor:
        """Latents of a batch, on the device and not scaled."""
        found = batch.get("latents")
        return encode_latents(self.tokenizer, batch["pixel_values"]) if found is None else found.to(self.run.device)

    def even_samples(self, split: str, count: int) -> Dataset:
        """Up to `count` samples at even distances, the same in every call."""
        dataset = self.splits[split]
        if not hasattr(dataset, "__len__"):
            samples = []
            for sample, _ in zip(dataset, range(count), strict=False):
                samples.append(sample)
            dataset = samples
        rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().tolist()
        return Subset(dataset, rows)

    def even_batches(self, split: str, count: int, batch_size: int) -> DataLoader:
        return DataLoader(self.even_samples(split, count), batch_size=batch_size, collate_fn=collate)

    def validation_batches(self, batch_size: int) -> Iterator[tuple[list[int], dict]]:
        """This process's share of up to 1024 validation samples, in batches, each with their numbers among all."""
        samples = self.even_samples("validation", 1024)
        numbers = share_of_process(range(len(samples)))
        for number, batch in enumerate(DataLoader(Subset(samples, numbers), batch_size, collate_fn=collate)):
            yield list(numbers[number * batch_size : (number + 1) * batch_size]), batch


class Condition:
    """What the denoiser takes beside the noisy latents: nothing, a class, or a caption."""

    def __init__(
        self,
        args: LatentDiffusionArguments,
        caption_column: str | None,
        num_classes: int,
        device: torch.device,
        text_options: dict[str, Any] | None = None,
    ):
        self.args, self.caption_column, self.num_classes, self.device = args, caption_column, num_classes, device
        self.encoder = self.tokenizer = None
        usual = {"text_lower_case": False, "text_normalize": False, "text_mask": True, "text_pad_token_id": None}
        # by their names in the pipeline
        self.text_options = {"text_max_length": args.text_max_length, **usual, **(text_options or {})}
        if args.text_encoder is not None:
            self.encoder, self.tokenizer = load_text_encoder(args.text_encoder, device)
            self.encode([""])  # or an error, now

    @property
    def kind(self) -> str | None:
        return "text" if self.encoder is not None else "class" if self.num_classes else None

    def inputs(self, batch: dict, dropout: float = 0.0, generators: list[torch.Generator] | None = None) -> dict:
        """The denoiser's keyword arguments.

        A share `dropout` of the images has the null condition, by one of `generators` for each.
        """
        if self.kind is None:
            return {}
        size = len(batch["label" if self.kind == "class" else self.caption_column])
        numbers = torch.rand(size) if generators is None else rand_of_samples(generators)
        dropped = (numbers < dropout).to(self.device)
        if self.kind == "class":
            labels = batch["label"].to(self.device)
            return {"class_labels": torch.where(dropped | (labels == NO_LABEL), self.num_classes, labels)}
        texts = zip(batch[self.caption_column], dropped.tolist(), strict=True)
        captions = ["" if drop or caption is None else caption for caption, drop in texts]
        return self.encode(captions)

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The denoiser's keyword arguments for captions."""
        options = self.text_options
        text = encode_text(
            self.encoder,
            self.tokenizer,
            captions,
            max_length=options["text_max_length"],
            lower_case=options["text_lower_case"],
            normalize=options["text_normalize"],
            mask_padding=options["text_mask"],
            pad_token_id=options["text_pad_token_id"],
        )
        read = {"encoder_attention_mask": text.mask} if options["text_mask"] else {}
        return {"encoder_hidden_states": text.embeddings, **read}

    def pipeline_arguments(self, class_names: list[str] | None) -> dict:
        if self.kind == "text":
            parts = {"text_encoder": self.encoder, "tokenizer": self.tokenizer}
            return {**parts, **self.text_options}
        if self.kind == "class":
            names = None if class_names is None else dict(enumerate(class_names))
            return {"id2label": names, "null_class_id": self.num_classes}
        return {}


def build_unet(
    args: LatentDiffusionArguments,
    condition: Condition,
    channels: int,
    size: tuple[int, int],
    start: StartingPoint | None = None,
    class_names: list[str] | None = None,
):
    """The UNet of the arguments, for latents of `channels` on a grid of `size`, with what its condition needs; or one
    with the sizes and the weights of `start`.
    """
    if start is not None:
        return continue_unet(args, condition, channels, size, start, class_names)
    levels = range(len(args.block_out_channels))
    check_halvings(args.block_out_channels, condition, size)
    cross = "CrossAttn" if condition.kind == "text" else "Attn"
    kinds = [cross if level in args.attention_levels else "" for level in levels]
    config = {
        "sample_size": size[0] if size[0] == size[1] else tuple(size),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": args.block_out_channels,
        "layers_per_block": args.layers_per_block,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "norm_num_groups": args.norm_num_groups,
        "dropout": args.dropout,
    }
    if condition.kind == "text":
        heads = [width // args.attention_head_dim for width in args.block_out_channels]
        width = condition.encoder.config.hidden_size
        unet = UNet2DConditionModel(**config, cross_attention_dim=width, attention_head_dim=heads)
    else:
        classes = condition.num_classes + 1 if condition.kind == "class" else None
        unet = UNet2DModel(**config, num_class_embeds=classes, attention_head_dim=args.attention_head_dim)
    return laid_out(unet, args)


def check_halvings(
    block_out_channels: Sequence[int], condition: Condition, size: tuple[int, int], start: StartingPoint | None = None
) -> None:
    """A ValueError for latents that the levels cannot halve; a denoiser with cross-attention halves any."""
    where = "" if start is None else f"model_name_or_path={start.source!r} with "
    count = len(block_out_channels) - 1
    if condition.kind != "text" and any(side % 2**count for side in size):
        raise ValueError(
            f"{where}block_out_channels={list(block_out_channels)}: {count + 1} levels halve {tuple(size)} latents "
            f"{count} times, which leaves no whole numbers."
        )


def laid_out(unet: UNet2DModel | UNet2DConditionModel, args: LatentDiffusionArguments):
    """The denoiser as it is trained: its blocks named, which fsdp asks for, and its weights in their layout."""
    if isinstance(unet, UNet2DModel):
        unet._no_split_modules = ["ResnetBlock2D", "Attention"]  # diffusers names those of the other one alone
    return unet.to(memory_format=torch.channels_last) if args.channels_last else unet


def continue_unet(
    args: LatentDiffusionArguments,
    condition: Condition,
    channels: int,
    size: tuple[int, int],
    start: StartingPoint,
    class_names: list[str] | None,
):
    """The UNet of `start` for these latents and classes."""
    config = start.model.config
    is_text = isinstance(start.model, UNet2DConditionModel)
    own = "text" if is_text else "class" if config.num_class_embeds else None
    own = getattr(start.pipeline, "condition_kind", own)
    if own != condition.kind:
        raise ValueError(
            f"model_name_or_path={start.source!r}: its condition must be {condition.kind or 'none'}, as that of the "
            f"data, got {own or 'none'}."
        )
    wanted = {"in_channels": channels, "out_channels": channels}
    if own == "text":
        width = "cross_attention_dim" if config.encoder_hid_dim is None else "encoder_hid_dim"
        wanted[width] = condition.encoder.config.hidden_size
    start.check(wanted)
    check_halvings(config.block_out_channels, condition, size, start)
    fields = {"sample_size": size[0] if size[0] == size[1] else tuple(size), "dropout": args.dropout}
    if own == "class":
        fields["num_class_embeds"] = condition.num_classes + 1
    return laid_out(start.remake(fields, condition.num_classes if own == "class" else 0, class_names), args)


def noise_of(start: StartingPoint) -> dict[str, Any]:
    """The arguments that say what the denoiser of a pipeline has been trained to predict."""
    if start.pipeline is None:
        return {}
    config = start.pipeline.scheduler.config
    steps = {"num_train_timesteps": config.get("num_train_timesteps")}
    if isinstance(start.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        return {**steps, "prediction_type": "flow"}
    schedule, prediction = config.get("beta_schedule"), config.get("prediction_type")
    schedule = schedule if config.get("trained_betas") is None else "trained_betas"
    if schedule != "scaled_linear" or config.get("rescale_betas_zero_snr") or prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"model_name_or_path={start.source!r}: its scheduler must have beta_schedule='scaled_linear', not "
            f"rescaled, and predict one of {', '.join(PREDICTION_TYPES)}, got the {schedule!r} of a "
            f"{type(start.pipeline.scheduler).__name__}, predicting {prediction!r}."
        )
    return {**steps, **{name: config[name] for name in ("prediction_type", "beta_start", "beta_end")}}


def train_loss(
    model: nn.Module,
    objective: DiffusionObjective,
    latents: torch.Tensor,
    inputs: dict,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The loss of what the denoiser predicts of `latents` `(B, D, h, w)` with `noise` at `timesteps` `(B,)`."""
    prediction = model(objective.add_noise(latents, noise, timesteps), timesteps, **inputs).sample
    return objective.loss(prediction, latents, noise, timesteps)


@torch.no_grad()
def validate(
    run: TrainingRun,
    pipe: VQLatentDiffusionPipeline,
    data: Data,
    condition: Condition,
    objective: DiffusionObjective,
    args: LatentDiffusionArguments,
) -> dict[str, float]:
    """The loss on validation images with the same noise every time, and a picture of samples."""
    sums = torch.zeros(2, dtype=torch.float64)  # of the loss, and of the images
    spread = objective.even_timesteps(64, run.device)
    for numbers, batch in run.until_signal(data.validation_batches(64)):
        latents = data.latents(batch) * pipe.vqvae.config.scaling_factor
        noise = randn_of_samples(sample_generators(0, numbers), *latents.shape[1:]).to(latents.device)
        timesteps = spread[torch.tensor(numbers, device=spread.device) % len(spread)]
        loss = train_loss(pipe.unet, objective, latents, condition.inputs(batch), noise, timesteps)
        sums += torch.tensor([float(loss) * len(latents), len(latents)])
    total, count = all_reduced(sums).tolist()
    if run.is_main_process:
        arguments = {"num_images_per_prompt": 64}
        if condition.kind == "class":
            classes = list(range(min(args.sample_classes, condition.num_classes)))
            arguments = {"class_labels": classes, "num_images_per_prompt": 8}
        elif condition.kind == "text":
            shown = next(iter(data.even_batches("validation", args.sample_classes, args.sample_classes)))
            arguments = {"prompt": shown[condition.caption_column], "num_images_per_prompt": 8}
        if condition.kind is not None:
            arguments["guidance_scale"] = args.guidance_scale
        images = pipe(
            **arguments,
            num_inference_steps=args.sample_steps,
            generator=torch.Generator(run.device).manual_seed(0),
            output_type="pt",
        ).images
        run.log_images("samples", images * 2 - 1, columns=8)
    return {"loss": total / count}


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, CaptionedDataArguments, LatentDiffusionArguments), argv)
    if (data_args.caption_column is None) != (args.text_encoder is None):
        raise ValueError("caption_column and text_encoder are given together: one is the other's input.")
    run = TrainingRun(run_args)
    start = None
    if args.model_name_or_path is not None:
        start = StartingPoint(args.model_name_or_path, "unet", (UNet2DModel, UNet2DConditionModel))
        args = replace(args, **noise_of(start))
        if getattr(start.pipeline, "vqvae", None) is not None and args.scaling_factor is None:
            args.scaling_factor = start.pipeline.vqvae.config.scaling_factor
    tokenizer, processor = load_tokenizer(args.tokenizer)
    data_args.default_resolution(tokenizer.config.resolution)
    tokenizer.to(run.device)
    check_single_codes("tokenizer", tokenizer)
    if len(tokenizer.config.downsample_factors) > 1:
        raise ValueError(f"tokenizer={args.tokenizer!r}: it must have one level of codes.")
    # how many classes there are is known when the data are open
    has_classes = int(data_args.label_column is not None)
    text_options = {} if start is None else start.text_options
    condition = Condition(args, data_args.caption_column, has_classes, run.device, text_options)
    data_args.check_multiple_of(tokenizer.config.downsample_factor)
    (size,) = code_grids(data_args.size, tokenizer).values()
    make_on_meta(build_unet, args, condition, tokenizer.config.embed_dim, size, start)
    data = Data(run, data_args, args, tokenizer)
    condition.num_classes = count_classes(
        data.splits, data.class_names, data_args.label_column, data_args.missing_condition == "null"
    )
    objective = DiffusionObjective(
        args.prediction_type,
        args.num_train_timesteps,
        args.beta_start,
        args.beta_end,
        args.min_snr_gamma,
        elbo_weight=args.elbo_weight,
    )
    scale = run.add_state("latent_scale", LatentScale(args.scaling_factor))
    batches = (data.latents(batch) for batch in data.even_batches("train", 1024, 64))
    if scale.value is None:
        scale.measure(batches)
    size = data.latents(next(iter(data.even_batches("train", 1, 1)))).shape[-2:]
    unet = build_unet(args, condition, tokenizer.config.embed_dim, size, start, data.class_names)
    model = run.add_model("unet", unet, ema=True)
    weights = torch.optim.AdamW(unet.parameters(), lr=run_args.learning_rate, weight_decay=args.weight_decay)
    optimizer = run.add_optimizer("optimizer", weights)
    # that of a start has the same noise; how it draws is its own
    is_of_pipeline = start is not None and start.pipeline is not None
    scheduler = start.pipeline.scheduler if is_of_pipeline else objective.scheduler
    pipe = VQLatentDiffusionPipeline(tokenizer, unet, scheduler, **condition.pipeline_arguments(data.class_names))
    pipe.set_progress_bar_config(disable=True)

    run.on_validation(lambda: validate(run, pipe, data, condition, objective, args))
    run.start()
    tokenizer.config.scaling_factor = scale.value
    for batch in run.batches(data.splits["train"]):
        with run.accumulate(model):
            latents = data.latents(batch) * scale.value
            generators = run.sample_generators()
            noise = randn_of_samples(generators, *latents.shape[1:]).to(latents.device)
            timesteps = objective.draw_timesteps(len(latents), latents.device, generators)
            inputs = condition.inputs(batch, args.condition_dropout, generators)
            loss = train_loss(model, objective, latents, inputs, noise, timesteps)
            run.backward(loss)
            run.step(optimizer)
            run.log({"loss": loss.detach()})
        run.finish_step()

    with run.trained_model("unet") as trained:
        if run.is_main_process:
            pipe.register_modules(unet=trained)
            save_trained(run, pipe, "pipeline", data_args, processor)
    run.finish()


if __name__ == "__main__":
    main()
