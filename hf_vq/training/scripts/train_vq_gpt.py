"""Train a GPT prior (Esser et al. 2021) over the codes of a trained tokenizer: unconditional, by class, or by an
image. With --architecture llama it is a Llama with rotary positions on the grid of codes (Sun et al. 2024).

    hf-vq train vq_gpt CONFIG.yaml --tokenizer outputs/vqgan/tokenizer [--argument value ...]
    accelerate launch -m hf_vq.training.scripts.train_vq_gpt CONFIG.yaml [--argument value ...]

With --condition_tokenizer, which `train_vqgan.py --condition` makes, the codes of each picture's label map, depth map,
edges or drawing (--conditioning_image_column) stand before its own. With --condition coordinates --crop random
--picture_size N it is trained on crops of --resolution of pictures whose shorter side is N, each with its coordinates
in the picture. With --condition boxes --boxes_column COLUMN it is trained on the classes and boxes of the objects.

The data set is encoded once, into OUTPUT_DIR/indices. The result is a pipeline folder, OUTPUT_DIR/pipeline.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vq import VQAutoregressivePipeline, VQGPTConfig, VQGPTForCausalLM, VQLlamaConfig, VQLlamaForCausalLM
from hf_vq.evaluation.evaluate import evaluate_prior
from hf_vq.training.data.box_conditions import BOX_FORMATS, BoxSettings, box_settings
from hf_vq.training.data.code_splits import count_classes, load_code_splits, training_inputs
from hf_vq.training.data.coordinate_crops import CropSettings
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.data.indices_cache import CONDITION_CODES, IndicesDataset
from hf_vq.training.embedding_starts import begin_with_codebooks, begin_with_grid_positions
from hf_vq.training.fine_tuning import START_HELP, StartingPoint
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.run_arguments import check_guidance, check_numbers, parse_arguments
from hf_vq.training.sharing import save_trained
from hf_vq.training.trained_tokenizers import TOKENIZER_HELP, load_condition_tokenizer, load_tokenizer
from hf_vq.training.validation import validation_loader


@dataclass
class VQGPTArguments:
    """The prior and its optimizer."""

    tokenizer: str = field(metadata={"help": TOKENIZER_HELP})
    model_name_or_path: str | None = field(default=None, metadata={"help": START_HELP})
    condition_tokenizer: str | None = field(
        default=None, metadata={"help": "Of the conditioning images; as `tokenizer`."}
    )
    condition: str | None = field(
        default=None,
        metadata={"help": '"coordinates": of random crops (crop="random") of larger pictures; "boxes": of objects.'},
    )
    picture_size: int | None = field(
        default=None, metadata={"help": "Coordinates: the shorter side of the pictures that crops are cut out of."}
    )
    crops_per_image: int = field(default=8, metadata={"help": "Coordinates: random crops of each training image."})
    coordinate_scale: int = field(default=1024, metadata={"help": "Coordinates: the last id."})
    boxes_column: str | None = field(
        default=None, metadata={"help": "Boxes: column of each picture's objects, with `bbox` and `category`."}
    )
    box_format: str = field(
        default="xywh",
        metadata={"help": "Boxes: left, top and the sides, as in COCO, or the corners.", "choices": list(BOX_FORMATS)},
    )
    num_box_classes: int | None = field(
        default=None, metadata={"help": "Boxes: classes of the objects, where they have no names."}
    )
    max_objects: int = field(default=30, metadata={"help": "Boxes: of a picture; of more the largest stay."})
    box_tokens: int = field(default=4096, metadata={"help": "Boxes: ids of classes and of the points of corners."})
    n_unmasked: int = field(
        default=0,
        metadata={"help": "So many first positions see each other in both directions, those of the condition say."},
    )
    architecture: str = field(
        default="gpt", metadata={"help": '"gpt", or "llama" with rotary positions on the grid of codes.'}
    )
    num_hidden_layers: int = 12
    hidden_size: int = 512
    num_attention_heads: int = 8
    dropout: float = field(default=0.1, metadata={"help": "In the residual stream (GPT) and the embedding (both)."})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "On the attention weights; not 0 costs the fused attention of a CPU."}
    )
    pkeep: float = field(default=1.0, metadata={"help": "Share of the input codes that stay; the others are random."})
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Share of the conditions that become the null condition, for guidance."}
    )
    random_flip_codes: bool = field(
        default=False, metadata={"help": "In half of the cases, train on the codes of the mirrored image."}
    )
    embeddings_from_codebooks: bool = field(
        default=False,
        metadata={"help": "Begin the embeddings of codes, and the head, with the tokenizers' codebooks."},
    )
    positions_from_grid: bool = field(
        default=False,
        metadata={
            "help": "Begin the embeddings of positions with waves over the picture, shared with a condition's map."
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "On the weight matrices only."})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    sample_classes: int = field(default=9, metadata={"help": "Classes in the validation picture, 8 samples each."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the validation picture."})

    def __post_init__(self):
        if self.architecture not in ("gpt", "llama"):
            raise ValueError(f"architecture={self.architecture!r}: it must be 'gpt' or 'llama'.")
        check_numbers(
            self,
            at_least_0_integer=("n_unmasked",),
            at_least_1_integer=(
                *("num_hidden_layers", "hidden_size", "num_attention_heads", "sample_classes"),
                *("picture_size", "crops_per_image", "coordinate_scale"),
                *("num_box_classes", "max_objects", "box_tokens"),
            ),
            share=("pkeep",),
            below_1=("dropout", "attention_dropout", "condition_dropout", "adam_beta1", "adam_beta2"),
            at_least_0=("weight_decay", "guidance_scale"),
        )
        check_guidance(self.guidance_scale, self.condition_dropout)
        for name in ("embeddings_from_codebooks", "positions_from_grid"):
            if getattr(self, name) and self.model_name_or_path is not None:
                raise ValueError(f"{name}=True: with model_name_or_path the embeddings are those of the prior.")
        self._check_condition()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: it must divide hidden_size={self.hidden_size}."
            )
        if self.architecture == "llama" and self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: a head of a Llama must have a "
                f"multiple of 4 channels, "
                f"got {self.hidden_size // self.num_attention_heads}."
            )
        if self.positions_from_grid and (self.architecture == "llama" or self.hidden_size % 4):
            raise ValueError(
                f"positions_from_grid=True: it needs architecture='gpt' and a hidden_size that 4 divides, got "
                f"{self.architecture!r} and {self.hidden_size}; a Llama's positions turn with the grid already."
            )

    def _check_condition(self):
        if self.condition not in (None, "coordinates", "boxes"):
            raise ValueError(f"condition={self.condition!r}: it must be 'coordinates' or 'boxes', or left out.")
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"box_format={self.box_format!r}: it must be one of {', '.join(BOX_FORMATS)}.")
        if (self.condition == "boxes") != (self.boxes_column is not None):
            raise ValueError(
                f"boxes_column={self.boxes_column!r}: it must be given with condition='boxes' alone, got "
                f"condition={self.condition!r}."
            )
        if (self.condition == "coordinates") != (self.picture_size is not None):
            raise ValueError(
                f"picture_size={self.picture_size}: it must be given with condition='coordinates' alone, got "
                f"condition={self.condition!r}."
            )
        if self.condition is not None and self.condition_tokenizer is not None:
            raise ValueError("condition and condition_tokenizer: give the one that is the condition.")
        if self.architecture == "llama":
            for name in ("condition", "condition_tokenizer", "n_unmasked"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)!r}: it needs architecture='gpt', got 'llama'.")


def build_prior(
    args: VQGPTArguments,
    tokenizer: PreTrainedModel,
    grids: dict[str, Sequence[int]],
    num_classes: int,
    class_names: list[str] | None,
    condition_tokenizer: PreTrainedModel | None = None,
    boxes: BoxSettings | None = None,
    start: StartingPoint | None = None,
):
    """A prior over grids of codes, whose sizes are `grids["indices"]` and, of a condition, `grids["condition_codes"]`:
    a new one, or one with the sizes and the weights of `start`.
    """
    condition = {"condition_type": "unconditional"}
    if num_classes > 0:
        condition = {"condition_type": "class", "condition_vocab_size": num_classes}
        condition |= {"id2label": dict(enumerate(class_names))} if class_names is not None else {}
    if condition_tokenizer is not None:
        condition = {
            "condition_type": "codes",
            "condition_vocab_size": condition_tokenizer.config.num_embeddings,
            "condition_length": math.prod(grids[CONDITION_CODES]),
        }
    elif args.condition == "coordinates":
        condition = {
            "condition_type": "coordinates",
            "condition_vocab_size": args.coordinate_scale + 1,
            "condition_length": math.prod(grids[CONDITION_CODES]),
            "coordinate_scale": args.coordinate_scale,
        }
    elif boxes is not None:
        condition = {
            "condition_type": "codes",
            "condition_vocab_size": boxes.tokenizer.num_tokens,
            "condition_length": boxes.tokenizer.condition_length,
            "bounding_boxes": asdict(boxes.tokenizer),
        }
        condition |= {"id2label": dict(enumerate(boxes.class_names))} if boxes.class_names is not None else {}
    common = {
        "codebook_size": tokenizer.config.num_embeddings,
        "grid_size": tuple(grids["indices"]),
        "condition_dropout": 0.0 if condition["condition_type"] == "unconditional" else args.condition_dropout,
        "pkeep": args.pkeep,
        "embd_pdrop": args.dropout,
        **condition,
    }
    if start is not None:
        return continue_prior(args, common, start, class_names if boxes is None else boxes.class_names)
    if args.architecture == "llama":
        config = VQLlamaConfig(
            num_hidden_layers=args.num_hidden_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            attention_dropout=args.attention_dropout,
            **common,
        )
        return VQLlamaForCausalLM(config)
    config = VQGPTConfig(
        n_unmasked=args.n_unmasked,
        n_layer=args.num_hidden_layers,
        n_embd=args.hidden_size,
        n_head=args.num_attention_heads,
        resid_pdrop=args.dropout,
        attn_pdrop=args.attention_dropout,
        **common,
    )
    return VQGPTForCausalLM(config)


def continue_prior(
    args: VQGPTArguments, fields: dict[str, Any], start: StartingPoint, class_names: Sequence[str] | None
) -> PreTrainedModel:
    """The prior of `start` with these fields of its config."""
    start.check({name: fields[name] for name in ("codebook_size", "grid_size")})
    kind = "boxes" if "bounding_boxes" in fields else fields["condition_type"]
    if start.kind == kind and kind in ("codes", "coordinates", "boxes"):
        meaning = {"coordinates": ["coordinate_scale"], "boxes": ["condition_vocab_size"]}.get(kind, [])
        start.check({name: fields[name] for name in ["condition_length", *meaning]})
    if isinstance(start.model, VQLlamaForCausalLM):
        for name in ("condition", "condition_tokenizer", "n_unmasked"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)!r}: it needs a GPT, got the Llama of "
                    f"model_name_or_path={start.source!r}."
                )
        fields = {**fields, "attention_dropout": args.attention_dropout}
    else:
        fields = {**fields, "attn_pdrop": args.attention_dropout, "resid_pdrop": args.dropout}
        fields |= {"n_unmasked": args.n_unmasked} if args.n_unmasked else {}
    return start.remake(fields, fields.get("condition_vocab_size", 0), class_names)


def weight_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on the matrices of the blocks and the head; none on embeddings, norms and biases."""
    embeddings = (".wte.", ".wpe.", ".embed_tokens.")
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in embeddings)
        (decayed if is_matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def validate(
    run: TrainingRun, pipe: VQAutoregressivePipeline, codes: IndicesDataset, args: VQGPTArguments
) -> dict[str, float]:
    """Bits per index on the validation codes, and a picture with a row of samples for each class or condition."""
    prior = pipe.prior
    kind = prior.config.condition_type
    keys = {"class": "label", "codes": CONDITION_CODES, "coordinates": CONDITION_CODES}
    figures = evaluate_prior(
        prior, run.until_signal(validation_loader(codes)), condition_key=keys.get(kind), progress=False
    )
    if run.is_main_process:
        given = {}
        if kind == "class":
            given["class_labels"] = list(range(min(args.sample_classes, prior.config.condition_vocab_size)))
        elif kind in ("codes", "coordinates"):
            rows = range(min(args.sample_classes, len(codes)))
            given["condition"] = torch.stack([codes[row][CONDITION_CODES] for row in rows]).to(prior.device)
        images = pipe(
            **given,
            num_images_per_prompt=8 if given else 64,
            guidance_scale=args.guidance_scale if given else 1.0,
            generator=torch.Generator(prior.device).manual_seed(0),
            output_type="pt",
        ).images
        run.log_images("samples", images * 2 - 1, columns=8)
    return figures


def load_condition(args: VQGPTArguments, data_args: DataArguments) -> dict:
    """The tokenizer and the processor of the conditioning images, by their names in the pipeline; empty without
    them.
    """
    if args.condition_tokenizer is None:
        if data_args.conditioning_image_column is not None:
            raise ValueError(
                f"conditioning_image_column={data_args.conditioning_image_column!r} needs condition_tokenizer."
            )
        return {}
    if data_args.label_column is not None:
        raise ValueError("label_column and condition_tokenizer: give the one that is the condition.")
    tokenizer, processor = load_condition_tokenizer(args.condition_tokenizer)
    return {"condition_tokenizer": tokenizer, "condition_processor": processor}


def load_boxes(args: VQGPTArguments, data_args: DataArguments) -> BoxSettings | None:
    """How boxes are read, whose column samples then carry; None without them."""
    if args.condition is not None and data_args.label_column is not None:
        raise ValueError("label_column and condition: give the one that is the condition.")
    if args.condition != "boxes":
        return None
    boxes = box_settings(
        data_args, args.boxes_column, args.box_format, args.num_box_classes, args.max_objects, args.box_tokens
    )
    data_args.extra_columns = [*data_args.extra_columns, args.boxes_column]
    return boxes


def crop_settings(
    args: VQGPTArguments, data_args: DataArguments, tokenizer: PreTrainedModel, seed: int
) -> CropSettings | None:
    """How crops with coordinates are cut; None without them."""
    if args.condition != "coordinates":
        return None
    if args.picture_size < max(data_args.size):
        raise ValueError(
            f"picture_size={args.picture_size}: it must be at least {max(data_args.size)}, the pixels of a crop."
        )
    return CropSettings(
        args.picture_size, args.crops_per_image, args.coordinate_scale, tokenizer.config.downsample_factor, seed
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, by the arguments of the command line or `argv`."""
    run_args, data_args, args = parse_arguments((RunArguments, DataArguments, VQGPTArguments), argv)
    condition = load_condition(args, data_args)
    boxes = load_boxes(args, data_args)
    run = TrainingRun(run_args)
    start = None
    if args.model_name_or_path is not None:
        start = StartingPoint(args.model_name_or_path, "prior", (VQGPTForCausalLM, VQLlamaForCausalLM))
    tokenizer, processor = load_tokenizer(args.tokenizer)
    data_args.default_resolution(tokenizer.config.resolution)
    tokenizer.to(run.device)
    condition_tokenizer = condition.get("condition_tokenizer")
    if condition_tokenizer is not None:
        condition_tokenizer.to(run.device)
    crops = crop_settings(args, data_args, tokenizer, run_args.seed)
    num_classes = int(data_args.label_column is not None)  # how many there are is known when the data are open
    codes, class_names = load_code_splits(
        run,
        data_args,
        tokenizer,
        args.random_flip_codes,
        crops=crops,
        boxes=boxes,
        try_model=lambda grids: build_prior(
            args, tokenizer, grids, num_classes, None, condition_tokenizer, boxes, start
        ),
        **condition,
    )

    num_classes = count_classes(codes, class_names, data_args.label_column, data_args.missing_condition == "null")
    prior = build_prior(
        args, tokenizer, codes["train"].grids, num_classes, class_names, condition_tokenizer, boxes, start
    )
    if args.embeddings_from_codebooks:
        begin_with_codebooks(prior, tokenizer, condition_tokenizer)
    if args.positions_from_grid:
        begin_with_grid_positions(prior, codes["train"].grids.get(CONDITION_CODES) if boxes is None else None)
    model = run.add_model("model", prior, ema=True)
    optimizer = run.add_optimizer(
        "optimizer",
        torch.optim.AdamW(
            weight_groups(prior, args.weight_decay),
            lr=run_args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
        ),
    )

    pipe = VQAutoregressivePipeline(vqvae=tokenizer, prior=prior, **condition)
    pipe.set_progress_bar_config(disable=True)
    run.on_validation(lambda: validate(run, pipe, codes["validation"], args))
    run.start()
    for batch in run.batches(codes["train"]):
        with run.accumulate(model):
            given = batch.get(CONDITION_CODES)
            given = given if boxes is None else boxes.tokenizer.shuffled(given)
            inputs = training_inputs(prior, batch["indices"], batch.get("label"), given)
            loss = model(**inputs).loss
            run.backward(loss)
            run.step(optimizer)
            run.log({"loss": loss.detach()})
        run.finish_step()

    with run.trained_model("model") as trained:
        if run.is_main_process:
            pipe = VQAutoregressivePipeline(vqvae=tokenizer, prior=trained, **condition)
            save_trained(run, pipe, "pipeline", data_args, processor)
    run.finish()


if __name__ == "__main__":
    main()
