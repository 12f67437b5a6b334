"""Four priors over one tokenizer, trained for the same time on the same images: a table and a sheet of samples.

    python examples/comparison/compare_priors.py [--minutes 1 2 4 8] [--output_dir outputs/comparison] [--quick]

Runs the training scripts with the configurations beside this file, one after another, on the packaged images and the
tokenizer of the checkpoint that comes with the project. After each of the numbers of minutes every prior draws images
of the validation images' classes, which are measured against those images. Writes results.json, results.md,
samples.png, and curves.png, where bits and distances stand against the minutes. A second run continues.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel

import hf_vq
from hf_vq.evaluation.features import PooledLayer
from hf_vq.evaluation.generation import compare_images
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.training.checkpointing import write_file_atomically
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.objectives.perceptual import build_perceptual
from hf_vq.training.sharing import validation_figures


ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples/data/emoji-64"
TOKENIZER = ROOT / "examples/checkpoints/emoji-32-segmentation/vqvae"
BATCH_SIZE = 62  # of sampling
FEATURE_LAYER = 13  # of MobileNetV2, 96 features: few pictures suffice
GUIDANCE_SCALE = 2.0
QUICK = ["--max_train_steps", "2", "--max_samples", "64", "--train_batch_size", "8"]


@dataclass(frozen=True)
class Contestant:
    """
    Args:
        title: its name in the table and the sheet.
        script, config: what trains it.
        pipeline: the class of what is trained.
        component: the pipeline's part that holds the prior's weights.
        sampling: arguments of a call.
    """

    title: str
    script: str
    config: str
    pipeline: str
    component: str
    sampling: dict = field(default_factory=dict)


CONTESTANTS = {
    "gpt": Contestant("GPT", "vq_gpt/train_vq_gpt.py", "gpt.yaml", "VQAutoregressivePipeline", "prior"),
    "pixelsnail": Contestant(
        "PixelSNAIL", "pixelcnn/train_pixelcnn.py", "pixelsnail.yaml", "VQAutoregressivePipeline", "prior"
    ),
    "vq_diffusion": Contestant(
        "VQ-Diffusion, 50 steps",
        "vq_diffusion/train_vq_diffusion.py",
        "vq_diffusion.yaml",
        "VQDiffusionImagePipeline",
        "transformer",
        {"num_inference_steps": 50},
    ),
    "latent_diffusion": Contestant(
        "Latent diffusion, 50 steps",
        "vq_latent_diffusion/train_vq_latent_diffusion.py",
        "latent_diffusion.yaml",
        "VQLatentDiffusionPipeline",
        "unet",
        {"num_inference_steps": 50, "eta": 1.0},
    ),
}


def train(contestant: Contestant, output_dir: Path, minutes: float, extra: list[str]) -> dict:
    """Trains, or continues; the run's steps, its seconds and, where the prior has a likelihood, its bits per index."""
    command = [sys.executable, str(ROOT / "examples" / contestant.script)]
    command += [str(Path(__file__).parent / contestant.config), "--output_dir", str(output_dir)]
    command += ["--tokenizer", str(TOKENIZER), "--dataset_name_or_path", str(DATA)]
    command += ["--max_train_minutes", str(minutes), *extra]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = max(row.get("seconds", 0.0) for row in rows)
    if seconds > 60 * minutes + 60:  # a run ends with the step in which its time is over
        sys.exit(f"--minutes {minutes:g}: {output_dir} has trained for {seconds / 60:.1f}; give another --output_dir.")
    return {
        "train_steps": rows[-1]["step"],
        "train_seconds": seconds,
        "bits_per_index": validation_figures(output_dir).get("bits_per_index"),
    }


def measured_file(output_dir: Path, name: str) -> Path:
    return output_dir / f"{name}.json"


def already_measured(output_dir: Path, name: str) -> dict[float, dict]:
    """What was measured of a prior after how many minutes; written down since training can't be taken back."""
    file = measured_file(output_dir, name)
    return {float(key): row for key, row in json.loads(file.read_text()).items()} if file.is_file() else {}


def draw(contestant: Contestant, pipe, labels: list[int]) -> tuple[torch.Tensor, float]:
    """Images `(N, 3, H, W)` in [-1, 1] of the classes `labels`, and the images per second."""
    pipe.set_progress_bar_config(disable=True)
    images, start = [], time.perf_counter()
    for first in range(0, len(labels), BATCH_SIZE):
        output = pipe(
            class_labels=labels[first : first + BATCH_SIZE],
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator(pipe.device).manual_seed(first),
            output_type="pt",
            **contestant.sampling,
        )
        images.append(output.images.cpu() * 2 - 1)
    return torch.cat(images), len(labels) / (time.perf_counter() - start)


def images_of_classes(dataset, labels: list[int]) -> torch.Tensor:
    """Images of `dataset` of the classes `labels`, from all over it."""
    rows = {label: [i for i, own in enumerate(dataset.labels) if own == label] for label in set(labels)}
    chosen = []
    for label, count in Counter(labels).items():
        picks = torch.linspace(0, len(rows[label]) - 1, count).round().long()
        chosen += [rows[label][i] for i in picks.tolist()]
    return torch.stack([dataset[i]["pixel_values"] for i in chosen])


def sheet(rows: dict[str, torch.Tensor], labels: list[int], class_names: list[str], per_class: int = 2):
    """One row of images for each entry of `rows`, the first `per_class` of every class in the order of the classes."""
    chosen = []
    for number in range(len(class_names)):
        chosen += [i for i, label in enumerate(labels) if label == number][:per_class]
    pictures = [(name, images[chosen]) for name, images in rows.items()]
    return labelled_rows(pictures, title="  |  ".join(class_names), scale=2)


def table(results: dict[str, dict]) -> str:
    """The results as a Markdown table, with what its figures mean below."""
    header = [
        "",
        "parameters",
        "steps",
        "training s",
        "samples/s",
        "bits per index",
        "Fréchet distance",
        "kernel distance",
    ]
    formats = {
        "parameters": lambda value: f"{value / 1e6:.2f} M",
        "train_steps": str,
        "train_seconds": "{:.0f}".format,
        "images_per_second": "{:.1f}".format,
        "bits_per_index": "{:.2f}".format,
        "frechet_distance": lambda figure: f"{figure['value']:.2f}",
        "kernel_distance": lambda figure: f"{figure['value']:.3f} ± {figure['standard_error']:.3f}",
    }
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for result in results.values():
        cells = ["" if result.get(name) is None else shown(result[name]) for name, shown in formats.items()]
        lines.append("| " + " | ".join([result["title"], *cells]) + " |")
    figure = next(iter(results.values()))["frechet_distance"]
    lines += [
        "",
        f"Fréchet and kernel distance on the features {figure['network']}: {figure['num_generated']} "
        f"images of each row "
        f"against {figure['num_real']} validation images, of each class as many.",
    ]
    return "\n".join(lines) + "\n"


def table_of_minutes(results: dict[str, dict]) -> str:
    """Bits per index and Fréchet distance after each number of minutes, as a Markdown table."""
    measured = [result for result in results.values() if "after" in result]
    minutes = [after["minutes"] for after in measured[0]["after"]]
    lines = ["| bits per index, Fréchet distance | " + " | ".join(f"{each:g} min" for each in minutes) + " |"]
    lines.append("|---" * (1 + len(minutes)) + "|")
    for result in measured:
        cells = []
        for after in result["after"]:
            bits = "–" if after["bits_per_index"] is None else f"{after['bits_per_index']:.2f}"
            cells.append(f"{bits}, {after['frechet_distance']['value']:.2f}")
        lines.append("| " + " | ".join([result["title"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot_minutes(results: dict[str, dict], path: Path) -> None:
    """Bits and Fréchet distance of each prior against the minutes of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    bits_axes, distance_axes = figure.subplots(1, 2)
    for result in results.values():
        after = result.get("after", [])
        minutes = [each["minutes"] for each in after]
        if after and after[0]["bits_per_index"] is not None:
            bits_axes.plot(minutes, [each["bits_per_index"] for each in after], marker="o", label=result["title"])
        if after:
            distances = [each["frechet_distance"]["value"] for each in after]
            distance_axes.plot(minutes, distances, marker="o", label=result["title"])
    floor = results["training_images"]["frechet_distance"]["value"]
    distance_axes.axhline(floor, color="grey", linestyle=":", label="training images")
    ticks = sorted({each["minutes"] for result in results.values() for each in result.get("after", [])})
    for axes, label in ((bits_axes, "bits per index"), (distance_axes, "Fréchet distance")):
        axes.set(xscale="log", xlabel="minutes of training", ylabel=label)
        axes.set_xticks(ticks, [f"{minutes:g}" for minutes in ticks])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=100)


def compare(names: list[str], output_dir: Path, minutes: list[float], quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = DataArguments(str(DATA), label_column="category", resolution=32)
    validation = load_image_dataset(replace(data, max_samples=64 if quick else None), "validation")
    (batch,) = DataLoader(validation, batch_size=len(validation), collate_fn=collate)
    originals, labels = batch["pixel_values"], batch["label"].tolist()
    tokenizer = AutoModel.from_pretrained(TOKENIZER).eval()
    with torch.no_grad():
        parts = [tokenizer.decode(tokenizer.encode(part).latents).sample for part in originals.split(BATCH_SIZE)]
    rows = {"Validation images": originals, "Their reconstructions": torch.cat(parts).clamp(-1, 1)}

    extractor = PooledLayer(build_perceptual("mobilenet_v2"), FEATURE_LAYER)

    def distances(images: torch.Tensor) -> dict[str, dict]:
        figures = compare_images(originals, images, extractor, metrics=("frechet_distance", "kernel_distance"))
        return {figure.metric: figure.to_dict() for figure in figures}

    training_images = images_of_classes(load_image_dataset(data, "train"), labels)
    results = {
        "training_images": {"title": "Training images", **distances(training_images)},
        "reconstructions": {"title": "Reconstructions", **distances(rows["Their reconstructions"])},
    }
    for name in names:
        contestant = CONTESTANTS[name]
        after = already_measured(output_dir, name)
        for each in minutes:
            if each in after and each != minutes[-1]:
                continue
            trained = train(contestant, output_dir / name, each, QUICK if quick else [])
            pipe = getattr(hf_vq, contestant.pipeline).from_pretrained(str(output_dir / name / "pipeline")).to(device)
            rows[contestant.title], speed = draw(contestant, pipe, labels)
            after[each] = {**trained, **distances(rows[contestant.title])}
            write_file_atomically(measured_file(output_dir, name), json.dumps(after, indent=2) + "\n")
        results[name] = {
            "title": contestant.title,
            "parameters": sum(weight.numel() for weight in getattr(pipe, contestant.component).parameters()),
            "images_per_second": speed,
            "sampling": {"guidance_scale": GUIDANCE_SCALE, **contestant.sampling},
            **after[minutes[-1]],
            "after": [{"minutes": each, **after[each]} for each in minutes],
        }
    sheet(rows, labels, validation.class_names).save(output_dir / "samples.png")
    plot_minutes(results, output_dir / "curves.png")
    tables = f"{table(results)}\n{table_of_minutes(results)}"
    write_file_atomically(output_dir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_file_atomically(output_dir / "results.md", tables)
    print(f"\n{tables}\nThe sheet of samples is {output_dir / 'samples.png'}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"))
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[6.0],
        help="training times of each prior, which it is measured after",
    )
    parser.add_argument("--priors", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="two steps of training, for tests")
    args = parser.parse_args(argv)
    if not all(0 < minutes < math.inf for minutes in args.minutes):
        parser.error(f"--minutes must be positive, got {' '.join(map(str, args.minutes))}")
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    compare(args.priors, output_dir, sorted(set(args.minutes)), args.quick)


if __name__ == "__main__":
    main()
