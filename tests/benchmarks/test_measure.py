import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import generate, incremental
from benchmarks.measure import in_subprocess, interleaved_seconds, peak_allocated_bytes
from benchmarks.quantizer import BARE, VARIANTS, measure
from benchmarks.table import markdown


MEGABYTE = 2**20


def test_peak_is_the_most_held_at_once():
    def function():
        first = torch.empty(3 * MEGABYTE, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        third = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
        return second, third

    assert peak_allocated_bytes(function) == pytest.approx(4 * MEGABYTE, abs=4096)


def test_peak_counts_what_an_operator_holds_inside():
    x = torch.randn(512, 512)
    # logsumexp keeps exp(x - max), as large as x, until its sum is taken
    assert peak_allocated_bytes(lambda: x.logsumexp(1)) >= x.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_rises_by_what_is_written():
    # a fresh process: memory that was used before and is used again does not count
    code = (
        "import torch\nfrom benchmarks.measure import peak_resident_bytes\ntorch.ones(1)\n"
        f"print(peak_resident_bytes(lambda: torch.ones({64 * MEGABYTE}, dtype=torch.uint8)[0]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert 60 * MEGABYTE < int(done.stdout) < 80 * MEGABYTE


def test_fastest_of_interleaved_runs():
    calls = []
    times = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=3)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and min(times.values()) >= 0


def test_failure_in_the_subprocess_is_reported():
    with pytest.raises(RuntimeError, match="--variant"):
        in_subprocess("benchmarks.quantizer")


def test_markdown_aligns_its_columns():
    text = markdown([{"name": "a", "value": 0.12345}, {"name": "bc", "value": 1234.5}, {"name": "d", "value": None}])
    assert text.splitlines() == [
        "| name | value |",
        "|------|-------|",
        "| a    | 0.123 |",
        "| bc   | 1234  |",
        "| d    | –     |",
    ]
    with pytest.raises(ValueError, match="rows"):
        markdown([])


@pytest.mark.parametrize("variant", [BARE, *VARIANTS])
def test_each_quantizer_is_measured(variant):
    if variant.startswith("lucidrains"):
        pytest.importorskip("vector_quantize_pytorch")
    threads = torch.get_num_threads()
    result = measure(variant, vectors=512, dim=8, num_codes=64, threads=threads)
    assert result["seconds"] > 0 and result["bare_seconds"] > 0
    # the indices alone are 4 KB, the gradient of the latents another 16 KB
    assert result["allocated"] >= (4096 if variant == BARE else 20480)


@pytest.mark.slow
def test_sampling_with_a_cache_gives_the_codes_of_the_loop():
    result = generate.measure(batch_size=2, side=3, layers=1, threads=torch.get_num_threads())
    assert set(result) == {"loop", "dynamic", "static"}
    assert all(values["same_codes"] == 1 and values["codes_per_second"] > 0 for values in result.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", incremental.MODELS)
def test_positions_computed_once_have_the_codes_of_whole_passes(model):
    result = incremental.measure(model, side=3, threads=torch.get_num_threads())
    assert result["same_codes"] == 1 and result["passes"] == 9
    assert 0 < result["incremental_seconds"] and 0 < result["naive_seconds"]


def test_an_unknown_name_is_refused():
    root = Path(__file__).parents[2]
    finished = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], capture_output=True, text=True, cwd=root)
    assert finished.returncode == 2 and "unknown benchmark speed" in finished.stderr
