"""VQ-VAE-2 on real images: train a tokenizer of two levels and a PixelSNAIL prior for each, and look at the result.

    python examples/demo/demo_vqvae2.py [--output_dir outputs/demo-vqvae2] [--quick]

Runs the training scripts of ../vqvae2 and ../pixelcnn with the configurations beside this file and writes to the
output folder: reconstructions.png (from the top level alone and from both), samples.png (a row for each class),
bottoms.png (real top codes, the bottom ones sampled), completions.png (the upper half is real), rejection.png (samples
of each class that a classifier of real images accepts, at several rates), pipeline/ and metrics.json. A second run
continues where the first stopped, or says what it skips.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from demo import DATA, QUICK, SAMPLES_PER_CLASS, print_table, train
from image_classifier import LinearClassifier
from torch.utils.data import DataLoader, Subset

from hf_vq import PixelSNAILForCausalLM, VQVAE2Model, VQVAE2Pipeline
from hf_vq.evaluation.evaluate import evaluate_tokenizer
from hf_vq.evaluation.hierarchy import evaluate_hierarchy, reconstruct_by_levels
from hf_vq.evaluation.pictures import labelled_rows, reconstruction_grid, samples_by_class
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.data.indices_cache import load_indices
from hf_vq.training.objectives.perceptual import build_perceptual


# the top level decides what is shown, the bottom one fills in what the top leaves open
SAMPLING = {"guidance_scale": (3.0, 1.0), "temperature": (0.9, 0.5), "top_p": (0.95, 0.9)}
COLUMNS = 12
ACCEPTANCE_RATES = [1.0, 0.25, 0.0625]
ACCEPTED = 4  # images of each class at each rate


def train_all(output_dir: Path, quick: list[str]) -> VQVAE2Pipeline:
    """The tokenizer, and a prior for each of its levels."""
    train("vqvae2/train_vqvae2.py", "vqvae2_cpu.yaml", output_dir / "vqvae2", *quick)
    tokenizer = output_dir / "vqvae2/tokenizer"
    for level in ("top", "bottom"):
        arguments = ("--tokenizer", str(tokenizer), *quick)
        train("pixelcnn/train_pixelcnn.py", f"vqvae2_{level}_cpu.yaml", output_dir / level, *arguments)
    return VQVAE2Pipeline(
        vqvae=VQVAE2Model.from_pretrained(tokenizer),
        top_prior=PixelSNAILForCausalLM.from_pretrained(output_dir / "top/prior"),
        bottom_prior=PixelSNAILForCausalLM.from_pretrained(output_dir / "bottom/prior"),
    )


def sample_sheet(pipe: VQVAE2Pipeline, path: Path) -> float:
    """Write a row of samples for each class to `path`; images per second."""
    names = pipe.top_prior.config.id2label
    classes = sorted(names)
    generator = torch.Generator(pipe.device).manual_seed(0)
    start = time.perf_counter()
    images = pipe(classes, num_images_per_prompt=SAMPLES_PER_CLASS, generator=generator, **SAMPLING).images
    seconds = time.perf_counter() - start
    labels = [label for label in classes for _ in range(SAMPLES_PER_CLASS)]
    samples_by_class(images, labels, [names[label] for label in classes]).save(path)
    print(f"{path}: {len(images)} samples in {seconds:.1f} s")
    return len(images) / seconds


def level_sheets(pipe: VQVAE2Pipeline, images: torch.Tensor, labels: list[int], output_dir: Path) -> None:
    """Write reconstructions.png, bottoms.png and completions.png of real images `(B, C, H, W)` in [-1, 1]."""
    top_only, both = reconstruct_by_levels(pipe.vqvae, images)
    reconstructions = {"top level": top_only, "both levels": both}
    reconstruction_grid(images, reconstructions, columns=COLUMNS).save(output_dir / "reconstructions.png")

    images, labels = images[:COLUMNS], labels[:COLUMNS]
    top = pipe.vqvae.encode(images).indices[0]
    rows = [("original", images), ("top level", top_only[:COLUMNS])]
    for seed in range(4):
        generator = torch.Generator(pipe.device).manual_seed(seed)
        output = pipe(labels, top_indices=top, generator=generator, output_type="pt", **SAMPLING)
        rows.append((f"bottom {seed + 1}", output.images * 2 - 1))
    labelled_rows(rows).save(output_dir / "bottoms.png")

    kept = images.clone()
    kept[:, :, images.shape[2] // 2 :] = 0.8
    rows = [("original", images), ("kept", kept)]
    for seed in range(4):
        generator = torch.Generator(pipe.device).manual_seed(seed)
        mask = torch.zeros(images.shape[-2:])
        mask[len(mask) // 2 :] = 1  # the lower half is painted
        output = pipe(labels, images, mask, generator=generator, output_type="pt", **SAMPLING)
        rows.append((f"completion {seed + 1}", output.images * 2 - 1))
    labelled_rows(rows).save(output_dir / "completions.png")


def rejection_sheet(pipe: VQVAE2Pipeline, train_images, validation, path: Path) -> dict[str, float]:
    """Write what a classifier accepts at each rate to `path`; its accuracy and the mean probability of the class."""
    classifier = LinearClassifier.fit(build_perceptual("mobilenet_v2").to(pipe.device), train_images)
    names = pipe.top_prior.config.id2label
    classes = sorted(names)
    results = pipe.rejection_sample(
        classes,
        classifier,
        ACCEPTED,
        acceptance_rates=ACCEPTANCE_RATES,
        batch_size=round(ACCEPTED / min(ACCEPTANCE_RATES)),
        generator=torch.Generator(pipe.device).manual_seed(0),
        output_type="pt",
        **SAMPLING,
    )
    rows = []
    for i, label in enumerate(classes):
        own = slice(i * ACCEPTED, (i + 1) * ACCEPTED)
        rows.append((names[label], torch.cat([results[rate].images[own] * 2 - 1 for rate in ACCEPTANCE_RATES])))
    rates = ", ".join(f"{rate:g}" for rate in ACCEPTANCE_RATES)
    labelled_rows(rows, title=f"{ACCEPTED} images accepted at each of the rates {rates}").save(path)
    scores = {f"class_probability_at_rate_{rate:g}": float(results[rate].scores.mean()) for rate in ACCEPTANCE_RATES}
    return {"classifier_accuracy": classifier.accuracy(validation), **scores}


def likelihoods(pipe: VQVAE2Pipeline, indices: Path) -> dict[str, float]:
    """Bits of each level and of the whole, on the validation images and on as many of the training images."""
    size = pipe.vqvae.config.resolution
    splits = {name: load_indices(indices / name) for name in ("train", "validation")}
    rows = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(0))[
        : len(splits["validation"])
    ]
    splits["train"] = Subset(splits["train"], rows.tolist())
    metrics = {}
    for name, codes in splits.items():
        loader = DataLoader(codes, batch_size=64, collate_fn=collate)
        pixel_dims = pipe.vqvae.config.in_channels * size**2
        figures = evaluate_hierarchy(pipe.priors, loader, "label", pixel_dims, progress=False)
        for part, values in (("top", figures["levels"][0]), ("bottom", figures["levels"][1]), ("whole", figures)):
            for figure in ("bits_per_index", "bits_per_image", "bits_per_pixel_dim"):
                metrics[f"{name}_{part}_{figure}"] = values[figure]
    return metrics


def print_likelihoods(metrics: dict[str, float]) -> None:
    """A line for each level; where validation images cost more bits than training images, a prior over-fits."""
    print(f"\n{'':8}{'bits/index':>24}{'bits/image':>24}{'bits/pixel dim':>24}")
    print(f"{'level':8}" + f"{'train':>12}{'validation':>12}" * 3)
    for part in ("top", "bottom", "whole"):
        cells = [
            f"{metrics[f'{split}_{part}_{figure}']:12.4g}"
            for figure in ("bits_per_index", "bits_per_image", "bits_per_pixel_dim")
            for split in ("train", "validation")
        ]
        print(f"{part:8}" + "".join(cells))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-vqvae2"))
    parser.add_argument("--quick", action="store_true", help="a minute-long form, for tests")
    args = parser.parse_args(argv)
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    pipe = train_all(output_dir, QUICK if args.quick else [])
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(output_dir / "pipeline")

    arguments = DataArguments(
        str(DATA),
        label_column="category",
        resolution=pipe.vqvae.config.resolution,
        max_samples=64 if args.quick else None,
    )
    train_images, validation = (load_image_dataset(arguments, split) for split in ("train", "validation"))
    places = torch.linspace(0, len(validation) - 1, 2 * COLUMNS).long().tolist()
    shown = collate([validation[i] for i in places])
    level_sheets(pipe, shown["pixel_values"].to(pipe.device), shown["label"].tolist(), output_dir)
    loader = DataLoader(validation, batch_size=64, collate_fn=collate)
    tokenizer = evaluate_tokenizer(pipe.vqvae, loader, usage_plot=output_dir / "codebook_usage.png", progress=False)
    bits = likelihoods(pipe, output_dir / "bottom/indices")
    metrics = {
        "psnr": tokenizer["psnr"],
        "top_codebook_perplexity": tokenizer["codebooks"][0]["codebook_perplexity"],
        "bottom_codebook_perplexity": tokenizer["codebooks"][1]["codebook_perplexity"],
        **bits,
        **rejection_sheet(pipe, train_images, validation, output_dir / "rejection.png"),
        "images_per_second": sample_sheet(pipe, output_dir / "samples.png"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table({name: value for name, value in metrics.items() if name not in bits})
    print_likelihoods(bits)
    print(f"\nPictures, metrics and the pipeline are in {output_dir}.")


if __name__ == "__main__":
    main()
