"""Sampling grids of codes from PixelCNN and PixelSNAIL: each position computed once, beside a pass for each
position.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from .measure import in_subprocess


TITLE = "Sampling a grid of codes, a pass over the grid for each position or each position computed once"
NOTES = """
One image, 512 codes, float32. "naive" is the loop of the public implementations: for each position a pass over the
whole grid, of which one position is used. Where a star follows, it is an estimate: positions times the fastest of some
passes, spread over the grid. "incremental" is `generate()` with its cache, the faster of two runs, drawing included.
"same codes" is the share of the positions, of those that the loop has drawn, at which both have the same code, drawn
with the same random numbers.
"""
SIDES = (8, 16, 32, 64)
QUICK_SIDES = (8,)
NUM_CODES = 512
PASSES = 24  # of the loop where it is measured in part
WHOLE_UP_TO = 16  # the side up to which the loop is measured as a whole


def build_pixelcnn(side: int):
    from hf_vq import PixelCNNConfig, PixelCNNForCausalLM

    return PixelCNNForCausalLM(
        PixelCNNConfig(codebook_size=NUM_CODES, grid_size=side, hidden_size=128, num_hidden_layers=12, kernel_size=5)
    )


def build_pixelsnail(side: int):
    from hf_vq import PixelSNAILConfig, PixelSNAILForCausalLM

    return PixelSNAILForCausalLM(
        PixelSNAILConfig(
            codebook_size=NUM_CODES,
            grid_size=side,
            hidden_size=128,
            res_channels=128,
            kernel_size=5,
            num_blocks=3,
            num_res_blocks=4,
            num_attention_heads=8,
        )
    )


MODELS = {"PixelCNN": build_pixelcnn, "PixelSNAIL": build_pixelsnail}


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each model and grid; only the smallest grid where `quick`."""
    rows = []
    for name in MODELS:
        for side in QUICK_SIDES if quick else SIDES:
            measured = in_subprocess("benchmarks.incremental", model=name, side=side, threads=threads)
            star = "" if measured["passes"] == side * side else "*"
            rows.append(
                {
                    "prior": name,
                    "positions": f"{side} x {side}",
                    "naive s": f"{measured['naive_seconds']:.3g}{star}",
                    "incremental s": measured["incremental_seconds"],
                    "ratio": measured["naive_seconds"] / measured["incremental_seconds"],
                    "incremental ms/position": 1e3 * measured["incremental_seconds"] / side**2,
                    "same codes": f"{measured['same_codes']:.1%}",
                }
            )
    return rows


@torch.no_grad()
def measure(model_name: str, side: int, threads: int) -> dict:
    """Seconds of both ways for one model and grid, and whether they sample the same codes, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MODELS[model_name](side).eval()
    prefix = model.prepare_condition(batch_size=1)
    length = side * side
    noise = -torch.empty(length, NUM_CODES).exponential_().log()

    runs = []
    for _ in range(2):
        start = time.perf_counter()
        sampled = model.generate(prefix, do_sample=False, logits_processor=[add_noise(noise)])[0, 1:]
        runs.append(time.perf_counter() - start)

    is_whole = side <= WHOLE_UP_TO
    places = range(length) if is_whole else range(0, length, length // PASSES)
    drawn, passes = naive_codes(model, prefix, sampled, noise, places)
    return {
        "incremental_seconds": min(runs),
        "naive_seconds": sum(passes) if is_whole else min(passes) * length,
        "passes": len(passes),
        "same_codes": float((drawn == sampled[torch.tensor(places)]).double().mean()),
    }


def add_noise(noise: torch.Tensor) -> Callable:
    """A logits processor that adds Gumbel noise `(length, K)`: the largest score is then a draw of the
    distribution.
    """
    return lambda input_ids, scores: scores + noise[input_ids.shape[1] - 1]


def naive_codes(model, prefix, codes, noise, places) -> tuple[torch.Tensor, list[float]]:
    """The codes at `places`, each by a pass over the whole grid in which `codes` are known before it, and their
    seconds.
    """
    drawn, seconds = [], []
    for place in places:
        start = time.perf_counter()
        known = codes.clone()
        known[place:] = 0
        ids = torch.cat([prefix, known[None, :-1]], dim=1)
        drawn.append((model(ids, use_cache=False).logits[0, place] + noise[place]).argmax())
        seconds.append(time.perf_counter() - start)
    return torch.stack(drawn), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one model and grid and prints JSON.")
    parser.add_argument("--model", choices=list(MODELS), required=True)
    for name in ("side", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.side, arguments.threads)))


if __name__ == "__main__":
    main()
