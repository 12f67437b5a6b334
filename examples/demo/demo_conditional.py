"""Pictures after a label map or after edges: train condition tokenizers and priors over pairs, and look at the result.

    python examples/demo/demo_conditional.py [--output_dir outputs/demo-conditional] [--quick]

Trains, with the configurations beside this file, a tokenizer of label maps and one of edges, and for each a GPT whose
images are those of the checkpoint that comes with the project. Writes to the output folder, for unseen pictures,
segmentation.png and edges.png (condition, three samples, original), large.png (label maps at four times the side that
was trained on), segmentation/ and edges/ with the pipelines in prior/pipeline, and metrics.json: whether samples
follow their condition, beside the same figure for conditions that are not theirs. A second run continues where the
first stopped.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from demo import DATA, QUICK, SHIPPED, print_table, train
from torch.utils.data import DataLoader

from hf_vq import VQAutoregressivePipeline
from hf_vq.evaluation.agreement import LabelAgreement, edge_f1, object_mask
from hf_vq.evaluation.evaluate import evaluate_prior
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.images import to_pil
from hf_vq.pipelines.annotators import EdgeAnnotator
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.conditions import condition_values
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.data.indices_cache import CONDITION_CODES, load_indices


EDGE_SIGMA = 1.0
SAMPLING = {"guidance_scale": 2.0, "top_p": 0.7}
COLUMNS, SAMPLES = 12, 3
MEASURED = 96  # unseen pictures, one sample of each
WHITE = 0.2  # so far from white a pixel belongs to the object, on a scale of 2
LARGE, LARGE_SIDE = 4, 128


def train_all(output_dir: Path, quick: list[str]) -> dict[str, VQAutoregressivePipeline]:
    """The pipeline of each condition."""
    columns = {
        "segmentation": ["--conditioning_image_column", "mask"],
        "edges": ["--conditioning_image_column", "none", "--edge_sigma", str(EDGE_SIGMA)],
    }
    pipelines = {}
    for kind, arguments in columns.items():
        folder = output_dir / kind
        train("vqgan/train_vqgan.py", f"{kind}_cpu.yaml", folder / "tokenizer-run", *quick)
        arguments += ["--condition_tokenizer", str(folder / "tokenizer-run/tokenizer")]
        arguments += ["--tokenizer", str(SHIPPED / "vqvae")]
        train("vq_gpt/train_vq_gpt.py", "conditional_gpt_cpu.yaml", folder / "prior", *arguments, *quick)
        pipelines[kind] = VQAutoregressivePipeline.from_pretrained(str(folder / "prior/pipeline"))
        pipelines[kind].set_progress_bar_config(disable=True)
    return pipelines


def unseen_pairs(pipe: VQAutoregressivePipeline, count: int, resolution: int) -> dict[str, torch.Tensor]:
    """`pixel_values` `(B, 3, H, W)` and `condition` of pictures from all of the validation set."""
    processor = pipe.condition_processor
    column = "mask" if processor.condition == "segmentation" else None
    arguments = DataArguments(
        str(DATA), resolution=resolution, conditioning_image_column=column, edge_sigma=EDGE_SIGMA
    )
    dataset = load_image_dataset(arguments, "validation", condition_processor=processor)
    return collate([dataset[int(row)] for row in np.linspace(0, len(dataset) - 1, count)])


def as_maps(condition: torch.Tensor) -> list[np.ndarray]:
    """What the pipeline takes: label maps, or edges that are 0 or 1."""
    return list(condition.numpy() if condition.ndim == 3 else (condition[:, 0] > 0).float().numpy())


def sample(pipe: VQAutoregressivePipeline, condition: torch.Tensor, seed: int, **options) -> torch.Tensor:
    """One picture for each condition, `(B, 3, H, W)` in [-1, 1]."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    options = {**SAMPLING, **options}
    return pipe(condition_image=as_maps(condition), generator=generator, output_type="pt", **options).images * 2 - 1


def write_sheet(pipe: VQAutoregressivePipeline, pairs: dict, rows: list[torch.Tensor], path: Path, scale: int) -> None:
    processor = pipe.condition_processor
    pictures = processor.postprocess(condition_values(pairs["condition"], processor))
    named = [(f"sample {number + 1}", images) for number, images in enumerate(rows)]
    sheet = [("condition", pictures), *named, ("original", pairs["pixel_values"])]
    labelled_rows(sheet, scale=scale).save(path)
    print(f"{path}: {len(pictures)} conditions, samples of each: {len(rows)}")


def agreement(pipe: VQAutoregressivePipeline, pairs: dict) -> dict[str, float]:
    """How well one sample of each condition follows it, how well another's, and how well the originals do, and what
    is left of them in their codes.
    """
    condition = pairs["condition"]
    originals = pairs["pixel_values"]
    with torch.no_grad():  # what the image tokenizer can show at best
        latents = pipe.vqvae.encode(originals.to(pipe.device)).latents
        best = pipe.vqvae.decode(latents).sample.cpu()
    images = {"samples": sample(pipe, condition, seed=100).cpu(), "originals": originals, "reconstructions": best}
    others = condition.roll(len(condition) // 2, dims=0)  # of other categories: the data are in their order
    figures = {}
    for name, wanted, shown in (
        ("", condition, "samples"),
        ("_shuffled", others, "samples"),
        ("_of_originals", condition, "originals"),
        ("_of_reconstructions", condition, "reconstructions"),
    ):
        if pipe.condition_processor.condition == "segmentation":
            masks = LabelAgreement(2)
            masks.update(object_mask(images[shown], WHITE).long(), (wanted > 0).long())
            figures[f"segmentation_mean_iou{name}"] = masks.compute()["mean_iou"]
        else:
            found = EdgeAnnotator(EDGE_SIGMA)(to_pil(images[shown]))
            found = torch.from_numpy(np.stack(found))
            figures[f"edge_f1{name}"] = float(edge_f1(found, wanted[:, 0] > 0, tolerance=0).mean())
    return figures


def bits_per_index(pipe: VQAutoregressivePipeline, folder: Path) -> float:
    codes = DataLoader(load_indices(folder / "prior/indices/validation"), batch_size=64, collate_fn=collate)
    return evaluate_prior(pipe.prior, codes, condition_key=CONDITION_CODES)["bits_per_index"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-conditional"))
    parser.add_argument("--quick", action="store_true", help="a short form, for tests")
    args = parser.parse_args(argv)
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    metrics = {}
    for kind, pipe in train_all(output_dir, QUICK if args.quick else []).items():
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pairs = unseen_pairs(pipe, COLUMNS, pipe.vqvae.config.resolution)
        rows = [sample(pipe, pairs["condition"], seed) for seed in range(SAMPLES)]
        write_sheet(pipe, pairs, rows, output_dir / f"{kind}.png", scale=2)
        count = 16 if args.quick else MEASURED
        metrics |= agreement(pipe, unseen_pairs(pipe, count, pipe.vqvae.config.resolution))
        metrics[f"{kind}_bits_per_index"] = bits_per_index(pipe, output_dir / kind)
        if kind == "segmentation":
            side = 64 if args.quick else LARGE_SIDE
            pairs = unseen_pairs(pipe, LARGE, side)
            began = time.perf_counter()
            large = [sample(pipe, pairs["condition"], 0, height=side, width=side, stride=2)]
            metrics["seconds_per_large_image"] = (time.perf_counter() - began) / LARGE
            write_sheet(pipe, pairs, large, output_dir / "large.png", scale=1)
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nPictures, metrics and the pipelines are in {output_dir}.")


if __name__ == "__main__":
    main()
