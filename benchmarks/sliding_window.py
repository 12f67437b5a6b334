"""Time and memory for each code of images larger than the prior's grid, sampled by a window that moves over them."""

import argparse
import json
import time

import torch

from .measure import in_subprocess, peak_resident_bytes


TITLE = "Sampling beyond the prior's grid with a sliding window"
NOTES = """
A small class-conditional VQGPT with a window of 16 x 16 codes, for images of 16 pixels a code, greedily, in one
process for each size. "CPU ms/code" is the time of all its threads, which other work on the machine changes less.
"MB" is how far the resident memory rose during sampling of the codes, without decoding.
"""
MODEL = {"codebook_size": 1024, "n_embd": 128, "n_layer": 4, "n_head": 4}
FACTOR = 16  # pixels of a code's side
SIZES = ((256, 256), (512, 512), (1024, 1024), (512, 2048))


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each size; a window of 4 x 4 codes, a quarter of the sides and 2 layers where `quick`."""
    rows = []
    for height, width in SIZES:
        shrink, layers = (4, 2) if quick else (1, MODEL["n_layer"])
        side, size = 16 // shrink, (height // FACTOR // shrink, width // FACTOR // shrink)
        measured = in_subprocess(
            "benchmarks.sliding_window",
            height=size[0],
            width=size[1],
            side=side,
            stride=side // 2,
            layers=layers,
            threads=threads,
        )
        codes = size[0] * size[1]
        rows.append(
            {
                "image": f"{size[0] * FACTOR} x {size[1] * FACTOR}",
                "codes": codes,
                "ms/code": 1000 * measured["seconds"] / codes,
                "CPU ms/code": 1000 * measured["cpu_seconds"] / codes,
                "MB": None if measured["resident"] is None else measured["resident"] / 2**20,
            }
        )
    return rows


@torch.no_grad()
def measure(height: int, width: int, side: int, stride: int, layers: int, threads: int) -> dict:
    """Seconds and peak memory of one grid of `height` x `width` codes, in this process."""
    from hf_vq import VQGPTConfig, VQGPTForCausalLM
    from hf_vq.pipelines.code_sampling import LevelSampling, sample_level

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = VQGPTConfig(
        **{**MODEL, "n_layer": layers}, grid_size=(side, side), condition_type="class", condition_vocab_size=10
    )
    prior = VQGPTForCausalLM(config).eval()
    prompt = prior.prepare_condition(0)
    setting = LevelSampling(guidance_scale=1.0, temperature=1.0, top_k=1, top_p=None)
    seconds = cpu_seconds = 0.0

    def sample():
        nonlocal seconds, cpu_seconds
        start, cpu_start = time.perf_counter(), time.process_time()
        sample_level(prior, prompt, None, setting, None, grid_size=(height, width), stride=stride)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    prior.generate(prompt, max_new_tokens=2, do_sample=False)  # what is loaded and allocated once
    resident = peak_resident_bytes(sample)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "resident": resident}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("height", "width", "side", "stride", "layers", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(**vars(parser.parse_args()))))
