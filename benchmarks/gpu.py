"""Everything that a GPU can tell, in stages that stand alone: `make gpu`, or `python -m benchmarks.gpu --output DIR`.

    checks            the tests marked `gpu`, with how many indices TF32 and bf16 flip
    tokenizer         trains a VQGAN for 64×64 pixels on the packaged images
    prior             a class-conditional GPT over its codes
    vq_diffusion      a class-conditional VQ-Diffusion over its codes
    latent_diffusion  a class-conditional denoiser of its latents
    vqvae2            the tokenizer of VQ-VAE-2 for 64×64 pixels
    top, bottom       a PixelSNAIL over the codes of each of its levels
    evaluate          measures the pipelines of all that was trained, and draws a sheet of samples of each
    speed             encoding, decoding and sampling on this device, beside diffusers' and transformers' own

Without `tokenizer` the priors take the tokenizer of examples/checkpoints/emoji-64. No stage needs a network. Each has
a time limit and may fail alone; a second call skips what is finished and goes on with the rest. The output folder
holds results.json, logs.txt, the sheets, and pipelines.tar with the trained pipelines in half precision. `--quick`
runs everything with networks that are hardly trained, in about two minutes on a CPU, to see that it would run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples/data/emoji-64"
SHIPPED_TOKENIZER = ROOT / "examples/checkpoints/emoji-64/vqvae"


@dataclass(frozen=True)
class Training:
    """
    Args:
        script, config: below examples/.
        output: folder of the run.
        share: of the time for training, relative to the other trainings.
        tokenizer: folder of the run whose tokenizer this one needs.
        steps_per_second: about those of a Hopper GPU, where the schedule must end with the time.
        options: beside those of the configuration.
        quick: options of the rehearsal.
    """

    script: str
    config: str
    output: str
    share: float
    tokenizer: str | None = None
    steps_per_second: float | None = None
    options: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)


# half of the configurations' sizes and less: both fit into 8 MB in half precision
SMALL_TOKENIZER = {"base_channels": 16, "channel_multiplier": "1 2 4", "norm_num_groups": 8, "learning_rate": 1e-3}
LARGER_LEVEL = {"train_batch_size": 64, "mixed_precision": "bf16"}
QUICK_LEVEL = {"num_blocks": 1, "num_res_blocks": 1, "res_channels": 16}
TRAININGS = {
    "tokenizer": Training(
        "vqgan/train_vqgan.py",
        "vqgan/emoji_64.yaml",
        "vqgan",
        share=1.5,
        steps_per_second=12,
        options=SMALL_TOKENIZER,
        quick={"dataloader_num_workers": 0},
    ),
    "prior": Training(
        "vq_gpt/train_vq_gpt.py",
        "vq_gpt/emoji_64.yaml",
        "vq_gpt",
        share=1.5,
        tokenizer="vqgan",
        steps_per_second=20,
        options={"num_hidden_layers": 6},
        quick={"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
    ),
    "vq_diffusion": Training(
        "vq_diffusion/train_vq_diffusion.py",
        "vq_diffusion/emoji_64.yaml",
        "vq_diffusion",
        share=2,
        tokenizer="vqgan",
        quick={"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16},
    ),
    "latent_diffusion": Training(
        "vq_latent_diffusion/train_vq_latent_diffusion.py",
        "vq_latent_diffusion/emoji_64.yaml",
        "latent_diffusion",
        share=1.5,
        tokenizer="vqgan",
        quick={"block_out_channels": "16 16", "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 8},
    ),
    "vqvae2": Training(
        "vqvae2/train_vqvae2.py",
        "vqvae2/emoji_64.yaml",
        "vqvae2",
        share=1,
        options={
            "hidden_size": 128,
            "residual_hidden_size": 64,
            "embed_dim": 64,
            "max_train_steps": 100000,
            "lr_scheduler": "constant_with_warmup",
            "learning_rate": 6e-4,
            "ema_decay": 0.998,
            "perceptual": "mobilenet_v2",
            "perceptual_weight": 0.5,
            **LARGER_LEVEL,
        },
        quick={"hidden_size": 16, "residual_hidden_size": 8, "embed_dim": 8},
    ),
    "top": Training(
        "pixelcnn/train_pixelcnn.py",
        "pixelcnn/emoji_64_top.yaml",
        "top",
        share=1,
        tokenizer="vqvae2",
        options={"max_train_steps": 100000, **LARGER_LEVEL},
        quick={"hidden_size": 16, "prior_kwargs": json.dumps({**QUICK_LEVEL, "num_attention_heads": 2})},
    ),
    "bottom": Training(
        "pixelcnn/train_pixelcnn.py",
        "pixelcnn/emoji_64_bottom.yaml",
        "bottom",
        share=1.5,
        tokenizer="vqvae2",
        options={"max_train_steps": 100000, **LARGER_LEVEL},
        quick={"hidden_size": 16, "prior_kwargs": json.dumps({**QUICK_LEVEL, "attention": False})},
    ),
}
STAGES = (*TRAININGS, "evaluate", "checks", "speed")
TRAINING_TIME = 0.7  # of all; the rest is for the other stages
COMMON = {"validation_steps": 0, "checkpointing_steps": 100000, "report_to": "none"}
QUICK = {"max_train_steps": 2, "max_samples": 16, "train_batch_size": 4, "cpu": "true", "mixed_precision": "no"}
IMPORTS = 18  # seconds: imports, data, validation and saving


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; returns 0 if all that were asked for have finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, on a CPU too")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    output = args.output.resolve()
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    state = _read(output / "results.json")
    shares = sum(TRAININGS[stage].share for stage in args.stages if stage in TRAININGS)
    for stage in args.stages:
        if state.get(stage, {}).get("finished"):
            print(f"{stage}: finished already", flush=True)
            continue
        left = end - time.monotonic()
        if left < 5:
            state[stage] = {"finished": False, "error": "no time was left"}
            continue
        print(f"== {stage}, {left:.0f} s left", flush=True)
        start = time.monotonic()
        seconds = left
        if stage in TRAININGS:
            seconds = min(left, 60 * args.minutes * TRAINING_TIME * TRAININGS[stage].share / shares)
        found = run(command(stage, work, seconds, args.quick), stage, work, left, args.quick)
        state[stage] = found | {"seconds": round(time.monotonic() - start, 1)}
        collect(work, output)
        (output / "results.json").write_text(json.dumps(state, indent=2) + "\n")
    print(table(state))
    return 0 if all(state[stage]["finished"] for stage in args.stages) else 1


def command(stage: str, work: Path, seconds: float, quick: bool) -> list[str]:
    """What runs a stage; a training ends after about so many seconds."""
    if stage == "checks":
        flags = ["-q", "-s", "-m", "gpu", "-p", "no:xdist", "-o", "addopts=", "--import-mode=importlib"]
        return [sys.executable, "-m", "pytest", *flags, str(ROOT / "tests/gpu")]
    if stage not in TRAININGS:
        return [sys.executable, "-m", f"benchmarks.gpu_{stage}", str(work), *(["--quick"] if quick else [])]
    training = TRAININGS[stage]
    minutes = max(0.1, (seconds - IMPORTS) / 60)
    options = {**COMMON, "max_train_minutes": f"{minutes:.3f}", "dataset_name_or_path": DATA}
    options |= {"output_dir": work / training.output, **training.options}
    if training.steps_per_second is not None:  # the schedule must end with the time
        options["max_train_steps"] = max(200, int(minutes * 60 * training.steps_per_second))
    if training.tokenizer is not None:
        trained = work / training.tokenizer / "tokenizer"
        options["tokenizer"] = trained if trained.is_dir() or training.tokenizer != "vqgan" else SHIPPED_TOKENIZER
    if quick:
        options |= {**QUICK, **training.quick}
    found = [sys.executable, str(ROOT / "examples" / training.script), str(ROOT / "examples" / training.config)]
    for name, value in options.items():
        found += [f"--{name}", *([str(value)] if name == "prior_kwargs" else str(value).split())]
    return found


def run(command: list[str], stage: str, work: Path, seconds: float, quick: bool) -> dict:
    """Runs one stage in a process of its own; what it found, and whether it finished."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if quick:
        environment["HF_VQ_REHEARSE"] = "1"
    log = work / f"{stage}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = "the time limit"
    found = _read(work / f"{stage}.json")
    if stage == "checks":
        lines = log.read_text().splitlines()
        found["tests"] = [
            line for line in lines if "indices that differ" in line or " passed" in line or "FAILED" in line
        ]
    if code == 0:
        return {"finished": True, **found}
    tail = log.read_text()[-3000:]
    print(tail, flush=True)
    return {"finished": False, "error": f"ended with {code}", "log": tail[-600:], **found}


def collect(work: Path, output: Path) -> None:
    """Copies what is worth keeping: the sheets, one archive of the pipelines in half precision, one file of logs."""
    for path in work.glob("*.png"):
        shutil.copyfile(path, output / path.name)
    pipelines = sorted(path.parent for path in work.glob("*/pipeline/model_index.json"))
    if pipelines:
        from hf_vq.hub import halve_weights

        with tempfile.TemporaryDirectory() as folder, tarfile.open(output / "pipelines.tar", "w") as archive:
            for number, path in enumerate(pipelines):
                copy = Path(folder) / str(number)
                shutil.copytree(path, copy)
                halve_weights(copy)
                archive.add(copy, path.parent.name)
    texts = [*sorted(work.glob("*.log")), *sorted(work.glob("*/metrics.jsonl"))]
    with (output / "logs.txt").open("w") as file:
        for path in texts:
            file.write(f"##### {path.relative_to(work)}\n{path.read_text()[-200_000:]}\n")


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def table(state: dict) -> str:
    """One line for each stage and for each figure."""
    lines = []
    for stage, found in state.items():
        how = "finished" if found["finished"] else found.get("error")
        lines.append(f"{stage:16} {how}, {found.get('seconds', 0)} s")
        for name, value in found.items():
            if name not in ("finished", "error", "seconds", "log"):
                lines += [f"    {line}" for line in _lines(name, value)]
    return "\n".join(lines)


def _lines(name: str, value) -> list[str]:
    if isinstance(value, dict):
        return [line for key, one in value.items() for line in _lines(f"{name}, {key}", one)]
    if isinstance(value, list):
        return [line for one in value for line in _lines(name, one)]
    return [f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"]


if __name__ == "__main__":
    sys.exit(main())
