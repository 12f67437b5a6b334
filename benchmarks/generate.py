"""Codes per second of `VQGPTForCausalLM.generate()`, beside a loop that computes every position again."""

import argparse
import json
import time

import torch

from .measure import in_subprocess


TITLE = "Sampling codes from VQGPT, greedily"
NOTES = """
"codes/s" counts the codes of all pictures of the batch, from the first to the last; the second of two runs where there
is a cache, the only run of the loop without one. "× loop" is the speed over that of the loop, "same codes" the share
of codes that are equal to the loop's.
"""
BATCH_SIZES = (1, 8)
MODEL = {"codebook_size": 1024, "n_embd": 512, "n_layer": 12, "n_head": 8}
MODES = ("dynamic", "static")  # caches of `generate`


def run(quick: bool, threads: int) -> list[dict]:
    """One row for each batch size and way to sample; 8 x 8 codes and 2 layers where `quick`, else 16 x 16 and 12."""
    rows = []
    for batch_size in BATCH_SIZES:
        side, layers = (8, 2) if quick else (16, MODEL["n_layer"])
        measured = in_subprocess("benchmarks.generate", batch=batch_size, side=side, layers=layers, threads=threads)
        loop = measured["loop"]["codes_per_second"]
        for name, values in measured.items():
            rows.append(
                {
                    "batch": batch_size,
                    "codes": f"{side} x {side}",
                    "sampling": "loop without cache" if name == "loop" else f"generate, {name} cache",
                    "codes/s": values["codes_per_second"],
                    "× loop": values["codes_per_second"] / loop,
                    "same codes": f"{values['same_codes']:.1%}",
                }
            )
    return rows


@torch.no_grad()
def measure(batch_size: int, side: int, layers: int, threads: int) -> dict:
    """Speed of the loop and of each cache, and whether they sample the same codes, in this process."""
    from hf_vq import VQGPTConfig, VQGPTForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = VQGPTConfig(
        **{**MODEL, "n_layer": layers}, grid_size=(side, side), condition_type="class", condition_vocab_size=10
    )
    model = VQGPTForCausalLM(config).eval()
    # the heads of an untrained model nearly tie, and a tie is decided by rounding
    model.lm_head.weight.mul_(50)
    prefix = model.prepare_condition(torch.arange(batch_size) % 10)

    start = time.perf_counter()
    expected = greedy_loop(model, prefix, side * side)
    codes = batch_size * side * side
    results = {"loop": {"codes_per_second": codes / (time.perf_counter() - start), "same_codes": 1.0}}
    for cache in MODES:
        for _ in range(2):  # the first run makes the cache, or compiles
            start = time.perf_counter()
            sequences = model.generate(prefix, do_sample=False, cache_implementation=cache)
            seconds = time.perf_counter() - start
        same = (sequences[:, prefix.shape[1] :] == expected).double().mean()
        results[cache] = {"codes_per_second": codes / seconds, "same_codes": float(same)}
    return results


def greedy_loop(model, prefix: torch.Tensor, length: int) -> torch.Tensor:
    """`length` codes after `prefix` `(B, T)`, each by a forward pass over everything before it."""
    ids = prefix
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prefix.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one batch size and prints JSON.")
    for name in ("batch", "side", "layers", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.batch, arguments.side, arguments.layers, arguments.threads)))


if __name__ == "__main__":
    main()
