"""From real images to new ones: train a small VQGAN and a class-conditional GPT prior, and look at the result.

    python examples/demo/demo.py [--output_dir outputs/demo] [--quick]

Runs the training scripts of ../vqgan and ../vq_gpt with the configurations beside this file (the larger ones on a GPU)
and writes to the output folder: shipped_samples.png (from ../checkpoints/emoji-64),
reconstructions.png, samples.png, codebook_usage.png, pipeline/ and metrics.json. A second run continues where the
first stopped, or says what it skips.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_vq import VQAutoregressivePipeline
from hf_vq.evaluation.evaluate import evaluate_prior, evaluate_tokenizer
from hf_vq.evaluation.pictures import reconstruction_grid, samples_by_class
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.data.indices_cache import load_indices
from hf_vq.training.objectives.perceptual import build_perceptual


ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples/data/emoji-64"
SHIPPED = ROOT / "examples/checkpoints/emoji-64"
TOKENIZER = ROOT / "examples/checkpoints/emoji-32-segmentation/vqvae"  # of the other demonstrations
SAMPLES_PER_CLASS = 8
GUIDANCE_SCALE = 2.0
# the same code path in about a minute, for the tests; its pictures mean nothing
QUICK = ["--max_train_steps", "12", "--validation_steps", "0", "--max_samples", "256", "--train_batch_size", "8"]


def train(script: str, config: str, output_dir: Path, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), str(ROOT / "examples/demo" / config)]
    command += ["--output_dir", str(output_dir), "--dataset_name_or_path", str(DATA), *arguments]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def sample_sheet(pipe: VQAutoregressivePipeline, path: Path) -> float:
    """Write a row of samples for each class to `path`; images per second."""
    names = pipe.prior.config.id2label
    classes = sorted(names)
    start = time.perf_counter()
    images = pipe(
        class_labels=classes,
        num_images_per_prompt=SAMPLES_PER_CLASS,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator(pipe.device).manual_seed(0),
    ).images
    seconds = time.perf_counter() - start
    labels = [label for label in classes for _ in range(SAMPLES_PER_CLASS)]
    scale = 2 if images[0].width <= 32 else 1
    samples_by_class(images, labels, [names[label] for label in classes], scale=scale).save(path)
    print(f"{path}: {len(images)} samples in {seconds:.1f} s")
    return len(images) / seconds


def evaluate(pipe: VQAutoregressivePipeline, output_dir: Path, codes_dir: Path, quick: bool) -> dict:
    device = pipe.device
    arguments = DataArguments(
        str(DATA), label_column="category", resolution=pipe.vqvae.config.resolution, max_samples=64 if quick else None
    )
    validation = load_image_dataset(arguments, "validation")
    images = torch.stack([validation[i]["pixel_values"] for i in range(0, 48, 2)]).to(device)
    with torch.no_grad():
        reconstructions = pipe.vqvae.decode(pipe.vqvae.encode(images).latents).sample.clamp(-1, 1)
    reconstruction_grid(images, reconstructions, columns=12, scale=2).save(output_dir / "reconstructions.png")

    perceptual = build_perceptual("mobilenet_v2").to(device)
    loader = DataLoader(validation, batch_size=64, collate_fn=collate)
    tokenizer = evaluate_tokenizer(pipe.vqvae, loader, perceptual, usage_plot=output_dir / "codebook_usage.png")
    codes = DataLoader(load_indices(codes_dir), batch_size=64, collate_fn=collate)
    prior = evaluate_prior(pipe.prior, codes, condition_key="label")
    return {
        "psnr": tokenizer["psnr"],
        "perceptual": tokenizer["perceptual"],
        "perceptual_network": tokenizer["perceptual_network"],
        "codebook_perplexity": tokenizer["codebook_perplexity"],
        "codebook_usage": tokenizer["codebook_usage"],
        "bits_per_index": prior["bits_per_index"],
        "uniform_bits_per_index": prior["uniform_bits_per_index"],
    }


def print_table(metrics: dict) -> None:
    width = max(map(len, metrics))
    print("\n" + "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in metrics.items()))


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--quick", action="store_true", help="a minute-long form, for tests")
    args = parser.parse_args(argv)
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = "gpu" if device == "cuda" else "cpu"
    quick = QUICK if args.quick else []
    start = time.perf_counter()

    print("Samples from the checkpoint that comes with the project:")
    sample_sheet(VQAutoregressivePipeline.from_pretrained(str(SHIPPED)).to(device), output_dir / "shipped_samples.png")

    train("vqgan/train_vqgan.py", f"vqgan_{size}.yaml", output_dir / "vqgan", *quick)
    tokenizer = ("--tokenizer", str(output_dir / "vqgan/tokenizer"))
    train("vq_gpt/train_vq_gpt.py", f"vq_gpt_{size}.yaml", output_dir / "vq_gpt", *tokenizer, *quick)

    pipe = VQAutoregressivePipeline.from_pretrained(str(output_dir / "vq_gpt/pipeline")).to(device)
    pipe.save_pretrained(output_dir / "pipeline")
    metrics = evaluate(pipe, output_dir, output_dir / "vq_gpt/indices/validation", args.quick)
    metrics["images_per_second"] = sample_sheet(pipe, output_dir / "samples.png")
    metrics["seconds"] = round(time.perf_counter() - start, 1)
    write_file_atomically(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nPictures, metrics and the pipeline are in {output_dir}.")


if __name__ == "__main__":
    main()
