"""Runs benchmarks and prints each as a Markdown table."""

import argparse
import importlib
import platform

import torch

from .table import markdown


BENCHMARKS = (
    "peers",
    "growth",
    "quantizer",
    "codebook_usage",
    "generate",
    "mask_replace_step",
    "sampling_steps",
    "incremental",
    "sliding_window",
    "extraction",
    "fsdp_memory",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all of them where none is named")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}: choose from {', '.join(BENCHMARKS)}")
    if arguments.threads < 1:
        parser.error(f"--threads must be positive, got {arguments.threads}")
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {arguments.threads} threads\n")
    for name in arguments.names or BENCHMARKS:
        benchmark = importlib.import_module(f".{name}", __package__)
        print(f"## {benchmark.TITLE}\n")
        print(markdown(benchmark.run(quick=arguments.quick, threads=arguments.threads)))
        print(f"\n{benchmark.NOTES.strip()}\n", flush=True)


if __name__ == "__main__":
    main()
