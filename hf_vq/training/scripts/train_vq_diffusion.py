"""Train VQ-Diffusion (Gu et al. 2022) on the codes of a trained tokenizer: by caption, by class, or unconditional.

    hf-vq train vq_diffusion CONFIG.yaml --tokenizer outputs/vqgan/tokenizer [--argument value ...]
    accelerate launch -m hf_vq.training.scripts.train_vq_diffusion CONFIG.yaml [--argument value ...]

The data set is encoded once, into OUTPUT_DIR/indices, or in every step. The result is a pipeline folder,
OUTPUT_DIR/pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel

from hf_vq import MaskReplaceScheduler, VQDiffusionImagePipeline, VQDiffusionTransformer2DModel
from hf_vq.distributed import share_of_process
from hf_vq.evaluation.diffusion_likelihood import DiffusionLikelihood
from hf_vq.evaluation.evaluate import evaluate_prior
from hf_vq.pipelines.conditioning import TextCondition, encode_text, text_length
from hf_vq.training.data.code_splits import (
    check_single_codes,
    code_grids,
    count_classes,
    load_code_splits,
    make_on_meta,
)
from hf_vq.training.data.columns import NO_LABEL
from hf_vq.training.data.image_datasets import CaptionedDataArguments, DataArguments, collate, load_image_dataset
from hf_vq.training.fine_tuning import START_HELP, StartingPoint
from hf_vq.training.objectives.mask_replace_objective import MaskReplaceObjective
from hf_vq.training.objectives.timestep_sampler import ImportanceTimestepSampler
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_guidance, check_numbers, parse_arguments
from hf_vq.training.sample_generators import rand_of_samples, sample_generators
from hf_vq.training.sharing import save_trained
from hf_vq.training.trained_tokenizers import TOKENIZER_HELP, load_tokenizer


@dataclass
class VQDiffusionArguments:
    """The denoiser, its noise, its condition, and its optimizer."""

    tokenizer: str = field(metadata={"help": TOKENIZER_HELP})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": START_HELP + " Its pipeline's noise and way of reading captions stay too."},
    )
    cache_indices: bool = field(default=True, metadata={"help": "Encode the images once; without, in every step."})
    random_flip_codes: bool = field(
        default=False, metadata={"help": "In half of the cases, train on the cached codes of the mirrored image."}
    )
    num_layers: int = 12
    num_attention_heads: int = 8
    attention_head_dim: int = 64
    mlp_type: str = field(default="fc", metadata={"help": "Of a block.", "choices": ["fc", "conv"]})
    mlp_ratio: int = 4
    dropout: float = 0.0
    num_train_timesteps: int = 100
    schedule: str = field(
        default="linear",
        metadata={"help": "Of the noise.", "choices": ["linear", "cosine", "mask_only", "uniform_only"]},
    )
    auxiliary_weight: float = field(default=5e-4, metadata={"help": "Of -log p(clean codes) in the loss."})
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Share of the classes or captions that are dropped, for guidance."}
    )
    text_encoder: str | None = field(default=None, metadata={"help": "Frozen text encoder with its tokenizer."})
    text_max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a caption; shorter ones are padded."}
    )
    text_lower_case: bool = field(default=False, metadata={"help": "Lower the captions' case."})
    text_normalize: bool = field(default=False, metadata={"help": "Divide each token's vector by its length."})
    learnable_null_embedding: bool = field(
        default=False, metadata={"help": "Learn what stands for no caption; without, it is the empty caption."}
    )
    cache_captions: bool = field(
        default=False, metadata={"help": "Encode each different caption once, and keep its vectors in memory."}
    )
    weight_decay: float = 0.045
    adam_beta2: float = 0.96
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, at a third more time."})
    validation_timesteps: int = field(
        default=10, metadata={"help": "Timesteps of each image in the validation bound, at most num_train_timesteps."}
    )
    sample_classes: int = field(default=9, metadata={"help": "Classes, or captions, in the validation picture."})
    sample_steps: int = field(default=25, metadata={"help": "Denoising steps of the validation picture."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation picture."})
    truncation_rate: float = field(default=1.0, metadata={"help": "Truncation of the validation picture."})

    def __post_init__(self):
        check_numbers(
            self,
            at_least_1_integer=(
                "num_layers",
                "num_attention_heads",
                "attention_head_dim",
                "mlp_ratio",
                "num_train_timesteps",
                "text_max_length",
                "validation_timesteps",
                "sample_classes",
                "sample_steps",
            ),
            below_1=("dropout", "condition_dropout", "adam_beta2"),
            at_least_0=("auxiliary_weight", "weight_decay", "guidance_scale"),
            positive=("truncation_rate",),
            share=("truncation_rate",),
        )
        for name in ("sample_steps", "validation_timesteps"):
            if getattr(self, name) > self.num_train_timesteps:
                raise ValueError(
                    f"{name}={getattr(self, name)}: it must be at most num_train_timesteps={self.num_train_timesteps}."
                )
        check_guidance(self.guidance_scale, self.condition_dropout)
        if self.random_flip_codes and not self.cache_indices:
            raise ValueError(
                "random_flip_codes=True needs cache_indices=True; images are mirrored by random_flip=True."
            )
        if self.cache_captions and self.text_encoder is None:
            raise ValueError("cache_captions=True needs a text_encoder and captions.")
        if self.learnable_null_embedding and (self.text_encoder is None or self.condition_dropout == 0):
            raise ValueError(
                "learnable_null_embedding=True needs a text_encoder, and condition_dropout above 0 to train it."
            )


class Codes:
    """Batches of codes for both splits: cached, or encoded from images in every step."""

    def __init__(
        self,
        run: TrainingRun,
        data: DataArguments,
        args: VQDiffusionArguments,
        tokenizer: PreTrainedModel,
        text: dict[str, Any],
        start: StartingPoint | None = None,
    ):
        self.run, self.tokenizer = run, tokenizer
        check_single_codes("tokenizer", tokenizer)
        if len(tokenizer.config.downsample_factors) > 1:
            raise ValueError(f"tokenizer={args.tokenizer!r}: it must have one level of codes.")

        def try_transformer(grids):
            has_classes = int(data.label_column is not None)  # how many there are is known when the data are open
            return build_transformer(args, tokenizer, grids["indices"], has_classes, text, start)

        if args.cache_indices:
            self.splits, self.class_names = load_code_splits(
                run, data, tokenizer, args.random_flip_codes, try_model=try_transformer
            )
        else:
            data.check_multiple_of(max(tokenizer.config.downsample_factors))
            make_on_meta(try_transformer, code_grids(data.size, tokenizer))
            channels = tokenizer.config.in_channels
            images = load_image_dataset(data, "train", augment=True, seed=run.arguments.seed, channels=channels)
            validation = load_image_dataset(data, "validation", class_names=images.class_names, channels=channels)
            self.splits, self.class_names = {"train": images, "validation": validation}, images.class_names
        self.num_classes = count_classes(
            self.splits, self.class_names, data.label_column, data.missing_condition == "null"
        )
        self.grid_size = tuple(self.indices(collate([self.splits["validation"][0]])).shape[1:])

    @torch.no_grad()
    def indices(self, batch: dict) -> torch.Tensor:
        """The codes of a batch, int64 `(B, h, w)` on the device."""
        found = batch.get("indices")
        if found is None:
            found = self.tokenizer.encode(batch["pixel_values"].to(self.run.device)).indices
        return found.to(self.run.device)

    def validation_batches(self, batch_size: int = 64):
        """Batches of up to 1024 validation samples at even distances, of which each process has its share."""
        dataset = self.splits["validation"]
        rows = share_of_process(torch.linspace(0, len(dataset) - 1, min(1024, len(dataset))).round().long().tolist())
        for batch in DataLoader(Subset(dataset, rows), batch_size=batch_size, collate_fn=collate):
            yield {**batch, "indices": self.indices(batch)}


class Condition:
    """What the transformer takes beside codes: nothing, classes, or captions."""

    def __init__(self, pipe: VQDiffusionImagePipeline, caption_column: str | None, captions: set[str] | None = None):
        self.pipe, self.kind = pipe, pipe.transformer.config.condition_type
        self.key = {"class": "label", "text": caption_column}.get(self.kind)  # of a batch
        self.encode = pipe.encode_prompt if captions is None else CaptionTable(pipe, captions)

    def inputs(
        self,
        values: torch.Tensor | Sequence[str | None],
        dropout: float = 0.0,
        generators: list[torch.Generator] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The transformer's keyword arguments for labels or captions.

        A share `dropout` of them becomes the null condition, by one of `generators` for each.
        """
        if self.kind == "unconditional":
            return {}
        transformer, device = self.pipe.transformer, self.pipe.device
        numbers = torch.rand(len(values)) if generators is None else rand_of_samples(generators)
        dropped = (numbers < dropout).to(device)
        if self.kind == "class":
            labels = values.to(device)
            return {"class_labels": torch.where(dropped | (labels == NO_LABEL), transformer.null_class_id, labels)}
        dropped |= torch.tensor([caption is None for caption in values], device=device)
        null = transformer.null_embedding
        if null is None:
            values = ["" if drop else caption for caption, drop in zip(values, dropped.tolist(), strict=True)]
        values = [caption or "" for caption in values]
        text = self.encode(values)
        states, mask = text.embeddings, text.mask
        if null is not None:
            states, mask = torch.where(dropped[:, None, None], null, states), mask | dropped[:, None]
        read = {"encoder_attention_mask": mask} if self.pipe.config.text_mask else {}
        return {"encoder_hidden_states": states, **read}


class CaptionTable:
    """The text states of a set of captions, and of the empty one."""

    def __init__(self, pipe: VQDiffusionImagePipeline, captions: set[str], batch_size: int = 64):
        texts = sorted({"", *captions})
        parts = [pipe.encode_prompt(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        self.rows = {text: row for row, text in enumerate(texts)}
        self.embeddings = torch.cat([part.embeddings for part in parts])
        self.mask = torch.cat([part.mask for part in parts])

    def __call__(self, captions: list[str]) -> TextCondition:
        rows = torch.tensor([self.rows[caption] for caption in captions], device=self.mask.device)
        return TextCondition(self.embeddings[rows], self.mask[rows])


def all_captions(data: DataArguments, column: str) -> set[str]:
    """The different captions of both splits."""
    splits = (load_image_dataset(data, split) for split in ("train", "validation"))
    found = (value for images in splits for value in images.rows[column])
    lists = (value if isinstance(value, list) else [value] for value in found)
    return {caption for captions in lists for caption in captions if caption is not None}


def load_text(args: VQDiffusionArguments, device: torch.device, start: StartingPoint | None = None) -> dict[str, Any]:
    """The text encoder and its options, those of the pipeline of `start` if it has one, by their names in the
    pipeline; empty without a text encoder.

    Raises:
        ValueError: texts cannot be encoded as the options say.
    """
    if args.text_encoder is None:
        return {}
    if start is not None and start.text_options.get("text_pooled"):
        raise ValueError(
            f"model_name_or_path={start.source!r}: its texts are one projected vector each (text_pooled), which "
            "training does not make; give one that reads the states of its text encoder."
        )
    encoder = AutoModelForTextEncoding.from_pretrained(args.text_encoder, dtype=torch.float32)
    options = {
        "text_encoder": encoder.to(device).eval().requires_grad_(False),
        "tokenizer": AutoTokenizer.from_pretrained(args.text_encoder),
        "text_max_length": args.text_max_length,
        "text_lower_case": args.text_lower_case,
        "text_normalize": args.text_normalize,
        **({} if start is None else start.text_options),
    }
    encode_text(options["text_encoder"], options["tokenizer"], "", args.text_max_length)
    return options


def build_transformer(
    args: VQDiffusionArguments,
    tokenizer: PreTrainedModel,
    grid_size: Sequence[int],
    num_classes: int,
    text: dict[str, Any],
    start: StartingPoint | None = None,
    class_names: list[str] | None = None,
) -> VQDiffusionTransformer2DModel:
    """One for classes, for what `load_text` gives, or for neither: a new one, or one with the sizes and the weights of
    `start`.
    """
    condition = {"condition_type": "unconditional"}
    if text:
        condition = {
            "condition_type": "text",
            "cross_attention_dim": text["text_encoder"].config.hidden_size,
            "learnable_null_embedding": args.learnable_null_embedding,
            "text_length": args.text_max_length or text_length(text["text_encoder"], text["tokenizer"]),
        }
    elif num_classes:
        condition = {"condition_type": "class", "num_classes": num_classes, "null_class": True}
    codes = {"num_embeddings": tokenizer.config.num_embeddings, "sample_size": tuple(grid_size)}
    if start is not None:
        fixed = ("condition_type", "cross_attention_dim", "learnable_null_embedding", "text_length")
        start.check(codes | {name: condition[name] for name in fixed if name in condition})
        return start.remake({**codes, **condition, "dropout": args.dropout}, num_classes, class_names)
    return VQDiffusionTransformer2DModel(
        **codes,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_train_timesteps=args.num_train_timesteps,
        mlp_type=args.mlp_type,
        mlp_ratio=args.mlp_ratio,
        dropout=args.dropout,
        **condition,
    )


def build_scheduler(args: VQDiffusionArguments, num_embeddings: int, start: StartingPoint | None):
    """The noise of the pipeline that the run goes on with, or of the arguments."""
    if start is not None and start.pipeline is not None:
        return MaskReplaceScheduler.from_config(
            start.pipeline.scheduler.config, auxiliary_loss_weight=args.auxiliary_weight
        )
    steps = args.num_train_timesteps
    if start is not None:
        start.check({"num_train_timesteps": steps})
    return MaskReplaceScheduler(
        num_embeddings=num_embeddings,
        num_train_timesteps=steps,
        schedule=args.schedule,
        auxiliary_loss_weight=args.auxiliary_weight,
    )


def build_pipeline(
    args: VQDiffusionArguments,
    tokenizer: PreTrainedModel,
    codes: Codes,
    scheduler: MaskReplaceScheduler,
    text: dict[str, Any],
    start: StartingPoint | None = None,
) -> VQDiffusionImagePipeline:
    """With a transformer of `build_transformer`."""
    options = dict(text)
    if codes.num_classes and not text:
        options["id2label"] = None if codes.class_names is None else dict(enumerate(codes.class_names))
    transformer = build_transformer(
        args, tokenizer, codes.grid_size, codes.num_classes, text, start, codes.class_names
    )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    pipe = VQDiffusionImagePipeline(tokenizer, transformer.to(codes.run.device), scheduler, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def validate(
    run: TrainingRun, pipe: VQDiffusionImagePipeline, codes: Codes, condition: Condition, args: VQDiffusionArguments
) -> dict[str, float]:
    """The bound in bits per index on validation codes, with the same noise every time, and a picture of samples."""
    positions = iter(share_of_process(range(min(1024, len(codes.splits["validation"])))))
    bound = DiffusionLikelihood(
        pipe.transformer,
        pipe.scheduler,
        condition.inputs,
        args.validation_timesteps,
        generator=lambda batch_size: sample_generators(0, islice(positions, batch_size)),
    )
    figures = evaluate_prior(bound, run.until_signal(codes.validation_batches()), condition.key, progress=False)
    if run.is_main_process:
        arguments = {"num_images_per_prompt": 64}
        if condition.kind == "class":
            arguments = {"class_labels": list(range(min(args.sample_classes, codes.num_classes)))}
        elif condition.kind == "text":
            validation = codes.splits["validation"]
            captions = [validation[i][condition.key] for i in range(min(64, len(validation)))]
            arguments = {"prompt": list(dict.fromkeys(captions))[: args.sample_classes]}
        if condition.kind != "unconditional":
            arguments |= {"guidance_scale": args.guidance_scale, "num_images_per_prompt": 8}
        images = pipe(
            **arguments,
            num_inference_steps=args.sample_steps,
            truncation_rate=args.truncation_rate,
            generator=torch.Generator(run.device).manual_seed(0),
            output_type="pt",
        ).images
        run.log_images("samples", images * 2 - 1, columns=8)
    return figures


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, CaptionedDataArguments, VQDiffusionArguments), argv)
    if (data_args.caption_column is None) != (args.text_encoder is None):
        raise ValueError("caption_column and text_encoder are given together: one is the other's input.")
    run = TrainingRun(run_args)
    tokenizer, processor = load_tokenizer(args.tokenizer)
    data_args.default_resolution(tokenizer.config.resolution)
    tokenizer.to(run.device)
    start = None
    if args.model_name_or_path is not None:
        start = StartingPoint(args.model_name_or_path, "transformer", (VQDiffusionTransformer2DModel,))
        if start.pipeline is not None:  # checks the numbers of steps
            args = replace(args, num_train_timesteps=start.pipeline.scheduler.config.num_train_timesteps)
    scheduler = build_scheduler(args, tokenizer.config.num_embeddings, start)
    text = load_text(args, run.device, start)
    codes = Codes(run, data_args, args, tokenizer, text, start)
    pipe = build_pipeline(args, tokenizer, codes, scheduler, text, start)
    transformer = pipe.transformer
    captions = all_captions(data_args, data_args.caption_column) if args.cache_captions else None
    condition = Condition(pipe, data_args.caption_column, captions)
    model = run.add_model("transformer", transformer, ema=True)
    weights = torch.optim.AdamW(
        transformer.parameters(),
        lr=run_args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(0.9, args.adam_beta2),
    )
    optimizer = run.add_optimizer("optimizer", weights)
    sampler = run.add_state("timesteps", ImportanceTimestepSampler(scheduler.config.num_train_timesteps))
    objective = MaskReplaceObjective(pipe.scheduler)

    run.on_validation(lambda: validate(run, pipe, codes, condition, args))
    run.start()
    for batch in run.batches(codes.splits["train"]):
        with run.accumulate(model):
            indices = codes.indices(batch)
            generators = run.sample_generators()
            timesteps, probabilities = sampler.sample(len(indices), run.device, generators)
            noised = pipe.scheduler.add_noise(indices, timesteps, generators)
            inputs = condition.inputs(batch.get(condition.key), args.condition_dropout, generators)
            output = objective(model(noised, timesteps, **inputs).sample, indices, noised, timesteps, probabilities)
            run.backward(output.loss)
            run.step(optimizer)
            sampler.update(timesteps, output.terms)
            run.log({"loss": output.loss.detach(), "bits_per_index": output.bits_per_index})
        run.finish_step()

    with run.trained_model("transformer") as trained:
        if run.is_main_process:
            pipe.register_modules(transformer=trained)
            save_trained(run, pipe, "pipeline", data_args, processor)
    run.finish()


if __name__ == "__main__":
    main()
