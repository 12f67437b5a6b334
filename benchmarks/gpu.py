"""Everything that a GPU can tell, in stages that stand alone: `make gpu`, or `python -m benchmarks.gpu --output DIR`.

    checks     the tests marked `gpu`, with how many indices TF32 and bf16 flip
    tokenizer  trains a VQGAN for 64×64 pixels on the packaged images
    prior      trains a class-conditional GPT over its codes
    evaluate   measures the pipeline of both, and draws a sheet of samples
    speed      encoding, decoding and sampling on this device, beside diffusers' and transformers' own

No stage needs a network. Each has a time limit and may fail alone; a second call skips what is finished and goes on
with the rest. `--quick` runs all of them in about a minute on a CPU, to see that they would run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples/data/emoji-64"
STAGES = ("tokenizer", "prior", "evaluate", "checks", "speed")
TOKENIZER = {
    "base_channels": 64,
    "channel_multiplier": "1 2 2",
    "num_res_blocks": 1,
    "attn_resolutions": "16",
    "latent_channels": 64,
    "embed_dim": 16,
    "num_embeddings": 1024,
    "quantizer": "ema",
    "perceptual": "mobilenet_v2",
    "perceptual_weight": 0.2,
    "disc_start_fraction": 0.7,
    "disc_warmup_steps": 300,
    "disc_weight": 0.3,
    "disc_channels": 32,
    "disc_layers": 3,
    "learning_rate": 6e-4,
    "train_batch_size": 64,
}
PRIOR = {
    "num_hidden_layers": 7,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "dropout": 0.2,
    "condition_dropout": 0.1,
    "learning_rate": 1e-3,
    "train_batch_size": 64,
}
COMMON = {
    "dataset_name_or_path": str(DATA),
    "resolution": 64,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "max_grad_norm": 1.0,
    "ema_decay": 0.998,
    "validation_steps": 0,
    "checkpointing_steps": 100000,
    "logging_steps": 50,
    "report_to": "none",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; returns 0 if all that were asked for have finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal of about a minute, on a CPU too")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    state = _read(output / "results.json")
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
        state[stage] = run(stage, work, left, args.quick) | {"seconds": round(time.monotonic() - start, 1)}
        _collect(work, output)
        (output / "results.json").write_text(json.dumps(state, indent=2) + "\n")
    print(table(state))
    return 0 if all(state[stage]["finished"] for stage in args.stages) else 1


def run(stage: str, work: Path, seconds: float, quick: bool) -> dict:
    """Runs one stage in a process of its own; what it found, and whether it finished."""
    share = {"tokenizer": 0.48, "prior": 0.55}.get(stage, 1.0) * seconds
    command = {
        "checks": [sys.executable, "-m", "pytest", "-q", "-s", "-m", "gpu", "-p", "no:xdist", "-o", "addopts="]
        + ["--import-mode=importlib", str(ROOT / "tests/gpu")],
        "tokenizer": _script("vqgan/train_vqgan.py", work / "vqgan", share, quick, {**COMMON, **TOKENIZER}, True),
        "prior": _script(
            "vq_gpt/train_vq_gpt.py",
            work / "vq_gpt",
            share,
            quick,
            {**COMMON, **PRIOR, "tokenizer": str(work / "vqgan/tokenizer"), "label_column": "category"},
        ),
        "evaluate": [sys.executable, "-m", "benchmarks.gpu_evaluate", str(work)] + (["--quick"] if quick else []),
        "speed": [sys.executable, "-m", "benchmarks.gpu_speed", str(work)] + (["--quick"] if quick else []),
    }[stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if quick:
        environment["HF_VQ_REHEARSE"] = "1"
    log = work / f"{stage}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, timeout=max(5, seconds)
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


def _script(script: str, output: Path, seconds: float, quick: bool, options: dict, augment: bool = False) -> list[str]:
    minutes = max(0.1, (seconds - 18) / 60)  # imports, data, validation and saving take the rest
    options = {**options, "output_dir": str(output), "max_train_minutes": f"{minutes:.3f}"}
    # the schedule must end with the time: about as many steps as a Hopper GPU does in it
    options["max_train_steps"] = max(200, int(minutes * 60 * (12 if augment else 20)))
    if augment:
        options |= {"random_flip": "true", "cache_images": "true", "dataloader_num_workers": 8}
    if quick:
        options |= {"max_train_steps": 2, "max_samples": 16, "train_batch_size": 4, "cpu": "true"}
        options |= {"dataloader_num_workers": 0} if augment else {}
    else:
        options["mixed_precision"] = "bf16"
    command = [sys.executable, str(ROOT / "examples" / script)]
    for name, value in options.items():
        command += [f"--{name}", *str(value).split()]
    return command


def _collect(work: Path, output: Path) -> None:
    """What is worth keeping, in at most eight files."""
    wanted = {
        "vqgan/tokenizer/model.safetensors": "tokenizer.safetensors",
        "vq_gpt/pipeline/prior/model.safetensors": "prior.safetensors",
        "samples.png": "samples.png",
        "reconstructions.png": "reconstructions.png",
    }
    for source, name in wanted.items():
        if (work / source).is_file():
            _copy(work / source, output / name)
    texts = [*sorted(work.glob("*.log")), *sorted(work.glob("*/metrics.jsonl"))]
    configs = [p for p in work.glob("vq*/*/**/*.json") if "checkpoint" not in str(p)]
    with (output / "logs.txt").open("w") as file:
        for path in [*texts, *configs]:
            file.write(f"##### {path.relative_to(work)}\n{path.read_text()[-200_000:]}\n")


def _copy(source: Path, target: Path) -> None:
    """Copies a file; weights in half precision."""
    if source.suffix != ".safetensors":
        shutil.copyfile(source, target)
        return
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    half = {name: one.half() if one.dtype == torch.float32 else one for name, one in tensors.items()}
    save_file(half, target, metadata={"format": "pt"})


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def table(state: dict) -> str:
    """One line for each stage and for each figure."""
    lines = []
    for stage, found in state.items():
        lines.append(f"{stage:10} {'finished' if found['finished'] else found.get('error')}, {found.get('seconds')} s")
        for name, value in found.items():
            if name not in ("finished", "error", "seconds", "log"):
                values = value if isinstance(value, list) else [value]
                lines += [f"    {name}: {one}" for one in values]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
