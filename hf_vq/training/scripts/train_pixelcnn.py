"""Train a PixelCNN (van den Oord et al. 2016) or a PixelSNAIL (Razavi et al. 2019) over the codes of a trained
tokenizer.

    hf-vq train pixelcnn CONFIG.yaml --tokenizer outputs/vqgan/tokenizer [--argument value ...]
    accelerate launch -m hf_vq.training.scripts.train_pixelcnn CONFIG.yaml [--argument value ...]

The data set is encoded once, into OUTPUT_DIR/indices. The result is a pipeline folder, OUTPUT_DIR/pipeline, or for a
level of a hierarchical tokenizer the prior alone, OUTPUT_DIR/prior; the priors of all its levels make a
`VQVAE2Pipeline`.
"""

from dataclasses import dataclass, field, fields

import torch
from transformers import PreTrainedModel

from hf_vq import (
    PixelCNNConfig,
    PixelCNNForCausalLM,
    PixelSNAILConfig,
    PixelSNAILForCausalLM,
    VQAutoregressivePipeline,
)
from hf_vq.evaluation.evaluate import evaluate_prior
from hf_vq.pipelines.code_sampling import LevelSampling, sample_level
from hf_vq.training.data.code_splits import count_classes, load_code_splits, training_inputs
from hf_vq.training.data.image_datasets import DataArguments, collate
from hf_vq.training.data.indices_cache import IndicesDataset
from hf_vq.training.fine_tuning import START_HELP, StartingPoint
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_guidance, check_numbers, parse_arguments, parse_mapping
from hf_vq.training.sharing import save_trained
from hf_vq.training.trained_tokenizers import TOKENIZER_HELP, load_tokenizer
from hf_vq.training.validation import validation_loader


PRIORS = {
    "pixelcnn": (PixelCNNConfig, PixelCNNForCausalLM),
    "pixelsnail": (PixelSNAILConfig, PixelSNAILForCausalLM),
}
OF_CODES = {
    *("codebook_size", "grid_size", "condition_type", "condition_vocab_size", "id2label"),
    *("conditioning_codebook_size", "conditioning_grid_size"),
}
LEVELS = {1: ("single",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}


@dataclass
class PriorArguments:
    """The prior and its level."""

    tokenizer: str = field(metadata={"help": TOKENIZER_HELP})
    model_name_or_path: str | None = field(default=None, metadata={"help": START_HELP})
    prior: str = field(default="pixelcnn", metadata={"help": "Network.", "choices": list(PRIORS)})
    level: str = field(
        default="single",
        metadata={
            "help": "Of a hierarchical tokenizer, whose codes to learn; all but top are conditioned "
            "on the level above, "
            "which a PixelSNAIL can be.",
            "choices": ["single", "top", "middle", "bottom"],
        },
    )
    hidden_size: int = 128
    kernel_size: int = 5
    dropout: float = 0.1
    prior_kwargs: str = field(
        default="{}", metadata={"help": "Further fields of PixelCNNConfig or PixelSNAILConfig, a mapping or JSON."}
    )
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Share of the classes that become the null class, for guidance."}
    )
    random_flip_codes: bool = field(
        default=False, metadata={"help": "In half of the cases, train on the codes of the mirrored image."}
    )
    sample_classes: int = field(default=9, metadata={"help": "Classes in the validation picture, 8 samples each."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation picture."})

    def __post_init__(self):
        self.prior_kwargs = parse_mapping("prior_kwargs", self.prior_kwargs)
        check_numbers(
            self,
            at_least_1_integer=("hidden_size", "kernel_size", "sample_classes"),
            below_1=("dropout", "condition_dropout"),
            at_least_0=("guidance_scale",),
        )
        check_guidance(self.guidance_scale, self.condition_dropout)
        known = {item.name for item in fields(PRIORS[self.prior][0])}
        unknown = sorted(set(self.prior_kwargs) - known)
        given = sorted({"hidden_size", "kernel_size", "dropout", "condition_dropout"} & set(self.prior_kwargs))
        if given:
            raise ValueError(f"prior_kwargs has {given}, which must be given as arguments of their own: --{given[0]}.")
        found = sorted(OF_CODES & set(self.prior_kwargs))
        if found:
            raise ValueError(
                f"prior_kwargs has {found}, which follow from the tokenizer and the data: leave them out."
            )
        if unknown:
            raise ValueError(f"prior_kwargs has {unknown}, which are no fields of {PRIORS[self.prior][0].__name__}.")


@dataclass
class Level:
    """
    Args:
        columns: the names under which a sample holds the codes of this level and of those above, from the top on.
        grids: their sizes.
    """

    columns: list[str]
    grids: list[tuple[int, int]]

    @classmethod
    def of(cls, name: str, grids: dict[str, list[int]]) -> "Level":
        """The level `name` of a tokenizer whose levels have the `grids`."""
        names = LEVELS.get(len(grids), ())
        if name not in names:
            raise ValueError(f"level={name!r}: the tokenizer has {len(grids)} levels, choose from {', '.join(names)}.")
        count = names.index(name) + 1
        return cls(list(grids)[:count], [tuple(grid) for grid in grids.values()][:count])

    @property
    def is_whole(self) -> bool:
        """Whether it is the tokenizer's only level."""
        return self.columns == ["indices"]

    @property
    def above(self) -> str | None:
        """The column of the level above."""
        return self.columns[-2] if len(self.columns) > 1 else None

    def inputs(self, batch: dict) -> dict[str, torch.Tensor]:
        """What a prior takes besides the codes and the class."""
        return {} if self.above is None else {"condition_indices": batch[self.above]}


def build_prior(
    args: PriorArguments,
    codebook_size: int,
    level: Level,
    num_classes: int,
    names: list[str] | None,
    start: StartingPoint | None = None,
):
    """The prior of one level, over `codebook_size` codes, for `num_classes` classes of these names: a new one, or one
    with the sizes and the weights of `start`.
    """
    config_class, model_class = PRIORS[args.prior] if start is None else (None, type(start.model))
    codes = {
        "codebook_size": codebook_size,
        "grid_size": level.grids[-1],
        "condition_type": "class" if num_classes else "unconditional",
    }
    if level.above is not None:
        if model_class is not PixelSNAILForCausalLM:
            got = f"prior={args.prior!r}" if start is None else f"the PixelCNN of model_name_or_path={start.source!r}"
            raise ValueError(f"level={args.level!r} needs prior=pixelsnail: {got} takes no level above.")
        codes |= {"conditioning_codebook_size": codebook_size, "conditioning_grid_size": level.grids[-2]}
    elif start is not None and model_class is PixelSNAILForCausalLM:
        codes |= {"conditioning_codebook_size": None, "conditioning_grid_size": None}
    fields = {
        **codes,
        "condition_vocab_size": num_classes,
        "condition_dropout": args.condition_dropout if num_classes else 0.0,
        "dropout": args.dropout,
        **({"id2label": dict(enumerate(names))} if names is not None else {}),
    }
    if start is not None:
        start.check(codes)
        return start.remake(fields, num_classes, names)
    return model_class(
        config_class(**fields, hidden_size=args.hidden_size, kernel_size=args.kernel_size, **args.prior_kwargs)
    )


@torch.no_grad()
def validate(
    run: TrainingRun,
    prior: PreTrainedModel,
    tokenizer: PreTrainedModel,
    codes: IndicesDataset,
    level: Level,
    args: PriorArguments,
) -> dict[str, float]:
    """Bits per index, and per value of a pixel, on the validation codes, and a picture of samples."""
    conditional = prior.config.condition_type == "class"
    height, width = level.grids[-1]
    factor = tokenizer.config.downsample_factors[len(level.columns) - 1]
    figures = evaluate_prior(
        prior,
        run.until_signal(validation_loader(codes)),
        condition_key="label" if conditional else None,
        pixel_dims=tokenizer.config.in_channels * height * width * factor**2,
        indices_key=level.columns[-1],
        above_key=level.above,
        progress=False,
    )
    if run.is_main_process:
        scale = args.guidance_scale if conditional else 1.0
        draw = draw_samples if level.above is None else draw_pairs
        run.log_images("samples", draw(prior, tokenizer, codes, level, args.sample_classes, scale), columns=8)
    return figures


def sample(
    prior: PreTrainedModel, prompt: torch.Tensor, guidance_scale: float, **inputs: torch.Tensor
) -> torch.LongTensor:
    """Codes `(B, h, w)`, the same ones for the same weights."""
    generator = torch.Generator(prior.device).manual_seed(0)
    setting = LevelSampling(guidance_scale, temperature=1.0, top_k=None, top_p=None)
    return sample_level(prior, prompt, None, setting, generator, **inputs)


def draw_samples(
    prior: PreTrainedModel,
    tokenizer: PreTrainedModel,
    codes: IndicesDataset,
    level: Level,
    sample_classes: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Eight samples of each class, decoded; of the top level alone, with nothing in the levels below."""
    classes = list(range(min(sample_classes, prior.config.condition_vocab_size))) or None
    prompt = prior.prepare_condition(classes).repeat_interleave(8 if classes else 64, dim=0)
    indices = sample(prior, prompt, guidance_scale)
    return tokenizer.decode_indices(indices if level.is_whole else (indices,)).sample


def draw_pairs(
    prior: PreTrainedModel,
    tokenizer: PreTrainedModel,
    codes: IndicesDataset,
    level: Level,
    sample_classes: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Validation images from their own codes down to this level, each beside itself with this level sampled."""
    batch = collate([codes[i] for i in range(min(4 * sample_classes, len(codes)))])
    known = [batch[name].to(prior.device) for name in level.columns]
    labels = batch["label"] if prior.config.condition_type == "class" else None
    prompt = prior.prepare_condition(labels, batch_size=len(known[0]))
    sampled = sample(prior, prompt, guidance_scale, condition_indices=known[-2])
    images = [tokenizer.decode_indices(tuple(levels)).sample for levels in (known, [*known[:-1], sampled])]
    return torch.stack(images, dim=1).flatten(0, 1)


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, PriorArguments), argv)
    run = TrainingRun(run_args)
    start = None
    if args.model_name_or_path is not None:
        part = "prior" if args.level == "single" else f"{args.level}_prior"
        start = StartingPoint(args.model_name_or_path, part, (PixelCNNForCausalLM, PixelSNAILForCausalLM))
    tokenizer, processor = load_tokenizer(args.tokenizer)
    data_args.default_resolution(tokenizer.config.resolution)
    tokenizer.to(run.device)

    def try_prior(grids):
        has_classes = int(data_args.label_column is not None)  # how many there are is known when the data are open
        return build_prior(
            args, tokenizer.config.num_embeddings, Level.of(args.level, grids), has_classes, None, start
        )

    codes, class_names = load_code_splits(
        run, data_args, tokenizer, args.random_flip_codes, several_levels=True, try_model=try_prior
    )
    level = Level.of(args.level, codes["train"].grids)

    num_classes = count_classes(codes, class_names, data_args.label_column, data_args.missing_condition == "null")
    prior = build_prior(args, tokenizer.config.num_embeddings, level, num_classes, class_names, start)
    model = run.add_model("model", prior, ema=True)
    optimizer = run.add_optimizer("optimizer", torch.optim.Adam(model.parameters(), lr=run_args.learning_rate))

    run.on_validation(lambda: validate(run, prior, tokenizer, codes["validation"], level, args))
    run.start()
    for batch in run.batches(codes["train"]):
        with run.accumulate(model):
            inputs = training_inputs(prior, batch[level.columns[-1]], batch.get("label"))
            loss = model(**inputs, **level.inputs(batch)).loss
            run.backward(loss)
            run.step(optimizer)
            run.log({"loss": loss.detach()})
        run.finish_step()

    with run.trained_model("model") as trained:
        if run.is_main_process and level.is_whole:
            pipe = VQAutoregressivePipeline(vqvae=tokenizer, prior=trained)
            save_trained(run, pipe, "pipeline", data_args, processor)
        elif run.is_main_process:
            save_trained(run, trained, "prior", data_args)
    run.finish()


if __name__ == "__main__":
    main()
