"""Pictures after a label map or after edges: train condition tokenizers and priors over pairs, and look at the result.

    python examples/demo/demo_conditional.py [--output_dir outputs/demo-conditional] [--quick]

Trains, with the configurations beside this file, a tokenizer of label maps and one of edges, and for each a GPT whose
images are those of the checkpoint that comes with the project. The prior of label maps sees whole pictures of 32×32
pixels, that of edges crops of 32×32 out of pictures of 64×64, so that its window can move over larger ones. Writes to
the output folder, for unseen pictures, segmentation.png and edges.png (condition, three samples, original), large.png
(edges of scenes of four times the side that was trained on), segmentation/ and edges/ with the pipelines in
prior/pipeline, and metrics.json: whether samples follow their condition, beside the same figure for conditions that
are not theirs. A second run continues where the first stopped.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from demo import DATA, QUICK, TOKENIZER, print_table, train
from PIL import Image
from scipy.ndimage import binary_fill_holes
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
# chosen by samples for training pictures
SAMPLING = {"guidance_scale": 2.0, "top_p": 0.7, "stride": 4}  # by half a window
COLUMNS, SAMPLES = 12, 3
MEASURED = 96  # unseen pictures, one sample of each
THRESHOLDS = np.arange(1, 13) * 0.05  # how far from white a pixel of the object is, on a scale of 2
WHOLE_SIDE, LARGE, LARGE_SIDE = 64, 4, 128


def train_all(output_dir: Path, quick: list[str]) -> dict[str, VQAutoregressivePipeline]:
    """The pipeline of each condition."""
    crops = write_crops(output_dir / "crops")
    columns = {
        "segmentation": ["--conditioning_image_column", "mask"],
        "edges": ["--conditioning_image_column", "none", "--edge_sigma", str(EDGE_SIGMA)],
    }
    columns["edges"] += ["--dataset_name_or_path", str(crops)]
    pipelines = {}
    for kind, arguments in columns.items():
        folder = output_dir / kind
        train("vqgan/train_vqgan.py", f"{kind}_cpu.yaml", folder / "tokenizer-run", *arguments, *quick)
        arguments += ["--condition_tokenizer", str(folder / "tokenizer-run/tokenizer")]
        arguments += ["--tokenizer", str(TOKENIZER)]
        train("vq_gpt/train_vq_gpt.py", "conditional_gpt_cpu.yaml", folder / "prior", *arguments, *quick)
        pipelines[kind] = VQAutoregressivePipeline.from_pretrained(str(folder / "prior/pipeline"))
        pipelines[kind].set_progress_bar_config(disable=True)
    return pipelines


def write_crops(folder: Path, side: int = 32) -> Path:
    """Random windows of the pictures, three of two training pictures and one of each other; none is all white."""
    for split in ("train", "validation"):
        pictures = datasets.load_dataset("parquet", data_files=str(DATA / f"{split}.parquet"), split="train")["image"]
        generator = np.random.default_rng(0)
        crops = []
        for number, picture in enumerate(pictures):
            pixels = np.asarray(picture.convert("RGB"))
            for _ in range(1 + number % 2 if split == "train" else 1):
                crops.append(Image.fromarray(random_crop(pixels, side, generator)))
        rows = datasets.Dataset.from_dict({"image": crops}, features=datasets.Features({"image": datasets.Image()}))
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def random_crop(pixels: np.ndarray, side: int, generator: np.random.Generator) -> np.ndarray:
    while True:
        top, left = (int(generator.integers(length - side + 1)) for length in pixels.shape[:2])
        crop = pixels[top : top + side, left : left + side]
        if crop.min() < 255:
            return crop


def load_pairs(
    pipe: VQAutoregressivePipeline, count: int, resolution: int, split: str = "validation"
) -> dict[str, torch.Tensor]:
    """`pixel_values` `(B, 3, H, W)` and `condition` of pictures from all of a split."""
    processor = pipe.condition_processor
    column = "mask" if processor.condition == "segmentation" else None
    arguments = DataArguments(
        str(DATA), resolution=resolution, conditioning_image_column=column, edge_sigma=EDGE_SIGMA
    )
    dataset = load_image_dataset(arguments, split, condition_processor=processor)
    return collate([dataset[int(row)] for row in np.linspace(0, len(dataset) - 1, count)])


def load_scenes(pipe: VQAutoregressivePipeline, count: int) -> dict[str, torch.Tensor]:
    """Four unseen pictures of 64×64 pixels side by side, as the pairs of `load_pairs` are."""
    pictures = load_pairs(pipe, 4 * count, LARGE_SIDE // 2)["pixel_values"]
    pictures = pictures.unflatten(0, (4, count)).transpose(0, 1)  # of four categories each
    images = torch.cat([torch.cat(row.unbind(1), dim=-1) for row in pictures.unflatten(1, (2, 2)).unbind(1)], dim=-2)
    return {"pixel_values": images, "condition": found_edges(images)[:, None].float() * 2 - 1}


def found_edges(images: torch.Tensor) -> torch.Tensor:
    """The edge maps, bool `(B, H, W)`, of pictures in [-1, 1]."""
    return torch.from_numpy(np.stack(EdgeAnnotator(EDGE_SIGMA)(to_pil(images)))) > 0


def as_maps(condition: torch.Tensor) -> list[np.ndarray]:
    """What the pipeline takes: label maps, or edges that are 0 or 1."""
    return list(condition.numpy() if condition.ndim == 3 else (condition[:, 0] > 0).float().numpy())


def sample(pipe: VQAutoregressivePipeline, condition: torch.Tensor, seed: int) -> torch.Tensor:
    """One picture for each condition and of its size, `(B, 3, H, W)` in [-1, 1]."""
    height, width = condition.shape[-2:]
    generator = torch.Generator(pipe.device).manual_seed(seed)
    options = {"height": height, "width": width, "generator": generator, "output_type": "pt", **SAMPLING}
    return pipe(condition_image=as_maps(condition), **options).images.cpu() * 2 - 1


def write_sheet(pipe: VQAutoregressivePipeline, pairs: dict, rows: list[torch.Tensor], path: Path, scale: int) -> None:
    processor = pipe.condition_processor
    pictures = processor.postprocess(condition_values(pairs["condition"], processor))
    named = [(f"sample {number + 1}", images) for number, images in enumerate(rows)]
    sheet = [("condition", pictures), *named, ("original", pairs["pixel_values"])]
    labelled_rows(sheet, scale=scale).save(path)
    print(f"{path}: {len(pictures)} conditions, samples of each: {len(rows)}")


def recovered_mask(images: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where pictures `(B, 3, H, W)` are not white, and what that encloses: the white of an eye belongs to the face."""
    masks = object_mask(images, float(threshold)).numpy()
    return torch.from_numpy(np.stack([binary_fill_holes(mask) for mask in masks]))


def mask_iou(images: torch.Tensor, labels: torch.Tensor, threshold: float) -> float:
    """The mean of the intersection over union of the object and of the background, of all pictures together."""
    masks = LabelAgreement(2)
    masks.update(recovered_mask(images, threshold).long(), (labels > 0).long())
    return masks.compute()["mean_iou"]


def fitted_threshold(pipe: VQAutoregressivePipeline, count: int = 400) -> float:
    """That which finds the masks of training pictures best."""
    pairs = load_pairs(pipe, count, pipe.vqvae.config.resolution, "train")
    scores = [mask_iou(pairs["pixel_values"], pairs["condition"], threshold) for threshold in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(scores))])


def agreement(pipe: VQAutoregressivePipeline, pairs: dict) -> dict[str, float]:
    """How well one sample of each condition follows it, how well another's, and how well the originals do, and what
    is left of them in their codes.
    """
    condition = pairs["condition"]
    originals = pairs["pixel_values"]
    with torch.no_grad():  # what the image tokenizer can show at best
        parts = [pipe.vqvae.encode(part.to(pipe.device)).latents for part in originals.split(16)]
        best = torch.cat([pipe.vqvae.decode(part).sample.cpu() for part in parts])
    images = {"samples": sample(pipe, condition, seed=100), "originals": originals, "reconstructions": best}
    others = condition.roll(len(condition) // 2, dims=0)  # of other categories: the data are in their order
    is_segmentation = pipe.condition_processor.condition == "segmentation"
    name = "segmentation_mean_iou" if is_segmentation else "edge_f1"
    threshold = fitted_threshold(pipe) if is_segmentation else None
    figures = {"white_threshold": threshold} if is_segmentation else {}
    for suffix, wanted, shown in (
        ("", condition, "samples"),
        ("_shuffled", others, "samples"),
        ("_of_originals", condition, "originals"),
        ("_of_reconstructions", condition, "reconstructions"),
    ):
        if is_segmentation:
            figures[name + suffix] = mask_iou(images[shown], wanted, threshold)
        else:
            figures[name + suffix] = float(edge_f1(found_edges(images[shown]), wanted[:, 0] > 0).mean())
    return figures


def seam_ratio(images: torch.Tensor, step: int) -> float:
    """The mean difference of neighbouring pixels across the borders of windows over that elsewhere. The first window
    samples `2 * step` pixels, each further one `step`.
    """
    borders, others = [], []
    for axis in (2, 3):
        differences = images.diff(dim=axis).abs().mean(dim=(0, 1, 5 - axis))
        place = torch.arange(1, len(differences) + 1)
        is_border = (place % step == 0) & (place > step)
        borders.append(differences[is_border])
        others.append(differences[~is_border])
    return float(torch.cat(borders).mean() / torch.cat(others).mean())


def bits_per_index(pipe: VQAutoregressivePipeline, folder: Path) -> float:
    codes = DataLoader(load_indices(folder / "prior/indices/validation"), batch_size=64, collate_fn=collate)
    return evaluate_prior(pipe.prior, codes, condition_key=CONDITION_CODES)["bits_per_index"]


def write_large(pipe: VQAutoregressivePipeline, path: Path, count: int) -> dict[str, float]:
    """The sheet of scenes, the time of one, and the figure of seams in them and in the originals."""
    scenes = load_scenes(pipe, count)
    began = time.perf_counter()
    large = sample(pipe, scenes["condition"], 0)
    seconds = (time.perf_counter() - began) / count
    write_sheet(pipe, scenes, [large], path, scale=1)
    step = SAMPLING["stride"] * pipe.vqvae.config.downsample_factor
    return {
        "seconds_per_large_image": seconds,
        "seam_ratio": seam_ratio(large, step),
        "seam_ratio_of_originals": seam_ratio(scenes["pixel_values"], step),
    }


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
        side = pipe.vqvae.config.resolution if kind == "segmentation" else WHOLE_SIDE
        pairs = load_pairs(pipe, COLUMNS, side)
        rows = [sample(pipe, pairs["condition"], seed) for seed in range(1 if args.quick else SAMPLES)]
        write_sheet(pipe, pairs, rows, output_dir / f"{kind}.png", scale=64 // side)
        count = MEASURED if kind == "segmentation" else MEASURED // 2
        metrics |= agreement(pipe, load_pairs(pipe, 16 if args.quick else count, side))
        metrics[f"{kind}_bits_per_index"] = bits_per_index(pipe, output_dir / kind)
        if kind == "edges":
            metrics |= write_large(pipe, output_dir / "large.png", 1 if args.quick else LARGE)
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nPictures, metrics and the pipelines are in {output_dir}.")


if __name__ == "__main__":
    main()
