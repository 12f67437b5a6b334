"""A VQGAN whose discriminator starts at different steps with different weights: a table, curves and a sheet.

    python examples/comparison/compare_discriminators.py [--steps 800] [--output_dir outputs/comparison-discriminators]

Runs ../vqgan/train_vqgan.py with vqgan.yaml beside this file, once for each setting, on the packaged images: the same
initial weights, batches and steps. Every 50 steps the validation images are reconstructed. Writes results.json,
results.md, curves.png (PSNR and perceptual distance against steps) and reconstructions.png. A second run continues.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel

from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.generation import compare_images
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual


FOLDER = Path(__file__).resolve().parent
DATA = FOLDER.parent / "data/emoji-64"
FEATURE_LAYER = 13  # of MobileNetV2, 96 features: few pictures suffice
FIGURES = ("psnr", "ssim", "perceptual")

SETTINGS = {
    "no discriminator": {"disc_weight": 0},
    "from the middle, eased in (the recipe)": {},
    "from the middle, at once": {"disc_warmup_steps": 0},
    "from the middle, at once, 1.6 times the weight (the original's)": {
        "disc_warmup_steps": 0,
        "disc_weight": 0.8,
    },
    "from the start": {"disc_start_fraction": 0, "disc_warmup_steps": 0},
    "from the start, 4 times the weight": {"disc_start_fraction": 0, "disc_warmup_steps": 0, "disc_weight": 2.0},
    "from the middle, 4 times the weight": {"disc_weight": 2.0},
}


def train(settings: dict, output_dir: Path, steps: int, extra: list[str]) -> list[dict]:
    """Trains, or continues; the validation figures after each number of steps."""
    command = [sys.executable, str(FOLDER.parent / "vqgan/train_vqgan.py"), str(FOLDER / "vqgan.yaml")]
    command += ["--output_dir", str(output_dir), "--dataset_name_or_path", str(DATA), "--max_train_steps", str(steps)]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    print(f"\n$ {' '.join([*command, *extra])}", flush=True)
    subprocess.run([*command, *extra], check=True)
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": row["step"], **{name: row[f"validation/{name}"] for name in FIGURES}}
        for row in rows
        if "validation/psnr" in row
    ]


def table(results: dict[str, dict]) -> str:
    """The figures at the end, and the largest fall of the PSNR below its best so far, as a Markdown table."""
    lines = ["| discriminator | PSNR | its largest fall | SSIM | perceptual | Fréchet distance |", "|---" * 6 + "|"]
    for name, result in results.items():
        best, fall = -float("inf"), 0.0
        for row in result["curve"]:
            best = max(best, row["psnr"])
            fall = max(fall, best - row["psnr"])
        last = result["curve"][-1]
        cells = [f"{last['psnr']:.2f}", f"{fall:.2f}", f"{last['ssim']:.3f}", f"{last['perceptual']:.4f}"]
        lines.append(" | ".join([f"| {name}", *cells, f"{result['frechet_distance']['value']:.2f} |"]))
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, label in zip(
        figure.subplots(1, 2), ("psnr", "perceptual"), ("PSNR, dB", "perceptual distance"), strict=True
    ):
        for title, result in results.items():
            axes.plot([row["step"] for row in result["curve"]], [row[name] for row in result["curve"]], label=title)
        axes.set(xlabel="steps", ylabel=label)
        if name == "perceptual":
            axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def compare(names: list[str], output_dir: Path, steps: int, extra: list[str]) -> None:
    validation = load_image_dataset(DataArguments(str(DATA), resolution=32), "validation")
    (batch,) = DataLoader(validation, batch_size=len(validation), collate_fn=collate)
    originals = batch["pixel_values"]
    extractor = PooledLayer(build_perceptual("mobilenet_v2"), FEATURE_LAYER)
    results, rows = {}, {"validation images": originals}
    for name in names:
        folder = output_dir / re.sub(r"[^\w.]+", "-", name).strip("-")
        curve = train(SETTINGS[name], folder, steps, extra)
        tokenizer = AutoModel.from_pretrained(folder / "tokenizer").eval()
        parts = [tokenizer.decode(tokenizer.encode(part).latents).sample for part in originals.split(62)]
        rows[name] = torch.cat(parts).clamp(-1, 1)
        (distance,) = compare_images(originals, rows[name], extractor, metrics=("frechet_distance",))
        results[name] = {"curve": curve, "frechet_distance": distance.to_dict()}
        write_file_atomically(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    every = torch.linspace(0, len(originals) - 1, 16).round().long()
    labelled_rows([(name, images[every]) for name, images in rows.items()], scale=2).save(
        output_dir / "reconstructions.png"
    )
    plot(results, output_dir / "curves.png")
    write_file_atomically(output_dir / "results.md", table(results))
    print(f"\n{table(results)}\nThe curves are {output_dir / 'curves.png'}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison-discriminators"))
    parser.add_argument("--steps", type=int, default=800, help="of each training (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="two steps on few images, for tests")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    quick = ["--max_samples", "32", "--validation_steps", "1", "--disc_channels", "8"] if args.quick else []
    compare(args.settings, output_dir, 2 if args.quick else args.steps, quick)


if __name__ == "__main__":
    main()
