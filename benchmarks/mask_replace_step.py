"""What a sampling step of VQ-Diffusion costs besides the transformer, beside diffusers' `VQDiffusionPipeline`."""

import argparse
import json

import torch
import torch.nn.functional as F

from .measure import in_subprocess, interleaved_seconds, peak_allocated_bytes


TITLE = "A step of VQ-Diffusion without its transformer"
NOTES = """
From the logits of the transformer's last layer, with and without condition, to the codes of the next timestep:
guidance, truncation, posterior and draw, on float32 logits of random normal numbers. diffusers' side runs the code of
its `Transformer2DModel`, `VQDiffusionPipeline` and `VQDiffusionScheduler`, which do the same work at every step, and
sort whether or not anything is truncated. hf_vq reads the predictions of the positions that can change, so its time
depends on the step: one of 100 or of 10 halfway, the last one, which draws every code anew, and the only one of 1. "×
diffusers" is the time over that of diffusers; "peak MB" is what torch's allocator held beyond the logits.
"""
BATCH_SIZES = (1, 4)
TRUNCATION_RATES = (1.0, 0.86)
GUIDANCE_SCALE = 5.0
NUM_TRAIN_TIMESTEPS = 100
# name: t, s, and further arguments of `MaskReplaceScheduler.step`
STEPS = {
    "1 of 100, halfway": (50, 49, {}),
    "1 of 10, halfway": (49, 39, {}),
    "1 of 10, halfway, purity prior": (49, 39, {"prior_rule": 2, "prior_weight": 1.0}),
    "last": (0, -1, {}),
    "1 of 1": (99, -1, {}),
}


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each batch size, truncation rate and step; 256 codes on 8 x 8 where `quick`, else 4096 on 32 x
    32.
    """
    rows = []
    for batch_size in BATCH_SIZES:
        side, codes = (8, 256) if quick else (32, 4096)
        for rate in TRUNCATION_RATES:
            measured = in_subprocess(
                "benchmarks.mask_replace_step", batch=batch_size, side=side, codes=codes, rate=rate, threads=threads
            )
            diffusers = measured["diffusers"]
            for name, values in measured.items():
                rows.append(
                    {
                        "batch": batch_size,
                        "truncation": rate,
                        "step": "diffusers, any" if name == "diffusers" else f"hf_vq, {name}",
                        "ms": 1000 * values["seconds"],
                        "× diffusers": values["seconds"] / diffusers["seconds"],
                        "peak MB": values["allocated"] / 1e6,
                    }
                )
    return rows


@torch.no_grad()
def measure(batch_size: int, side: int, codes: int, rate: float, threads: int) -> dict:
    """Seconds and peak bytes of diffusers' step and of each of `STEPS`, in this process."""
    from hf_vq import MaskReplaceScheduler

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logits = torch.randn(2 * batch_size, side * side, codes)
    scheduler = MaskReplaceScheduler(codes, NUM_TRAIN_TIMESTEPS)
    originals = torch.randint(codes, (batch_size, side * side))
    functions = {"diffusers": diffusers_step(logits, scheduler.add_noise(originals, 50), rate)}
    for name, (t, s, arguments) in STEPS.items():
        functions[name] = hf_vq_step(logits, scheduler, t, s, scheduler.add_noise(originals, t), rate, arguments)
    for function in functions.values():
        function()
    seconds = interleaved_seconds(functions, repetitions=3)
    return {
        name: {"seconds": seconds[name], "allocated": peak_allocated_bytes(function)}
        for name, function in functions.items()
    }


def diffusers_step(logits: torch.Tensor, sample: torch.Tensor, rate: float):
    """Of `logits` `(2 B, L, K)` and `sample` `(B, L)`, with the last lines of `Transformer2DModel.forward`."""
    from diffusers import VQDiffusionScheduler
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import VQDiffusionPipeline

    scheduler = VQDiffusionScheduler(logits.shape[-1] + 1, NUM_TRAIN_TIMESTEPS)

    def step():
        output = F.log_softmax(logits.permute(0, 2, 1).double(), dim=1).float()
        unconditional, text = output.chunk(2)
        output = unconditional + GUIDANCE_SCALE * (text - unconditional)
        output -= torch.logsumexp(output, dim=1, keepdim=True)
        output = VQDiffusionPipeline.truncate(None, output, rate).clamp(-70)
        return scheduler.step(output, timestep=50, sample=sample).prev_sample

    return step


def hf_vq_step(logits, scheduler, t: int, s: int, sample: torch.Tensor, rate: float, arguments: dict):
    """Of `logits` `(2 B, L, K)` and `sample` `(B, L)`, from timestep t to s."""

    def step():
        unconditional, conditional = logits.chunk(2)
        guided = torch.lerp(unconditional, conditional, GUIDANCE_SCALE)
        return scheduler.step(guided, t, sample, truncation_rate=rate, prev_timestep=s, **arguments).prev_sample

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one batch size and truncation rate and prints JSON.")
    for name, kind in (("batch", int), ("side", int), ("codes", int), ("rate", float), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.batch, arguments.side, arguments.codes, arguments.rate, arguments.threads)))


if __name__ == "__main__":
    main()
