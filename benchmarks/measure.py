"""Time and peak memory of a function on the CPU, and each measurement in a process of its own."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def peak_allocated_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """The most that torch's allocator held on `device` during `function()`, above what it held before.

    On a CPU read from the profiler's allocation events, so that what an operator allocates and frees counts too.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    if not events:
        raise RuntimeError("the profiler has recorded no allocation")
    held = peak = 0
    for event in sorted(events, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0))):
        if event["args"]["Device Type"] == 0:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak


def peak_resident_bytes(function: Callable[[], object]) -> int | None:
    """How far the process's resident memory rose during `function()`; `None` where the system is not Linux.

    Pages that were touched before and are used again do not count: take it in a fresh process.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    reset.write_text("5")  # the high-water mark starts again from the current size
    before = _status_bytes(status, "VmRSS")
    function()
    return _status_bytes(status, "VmHWM") - before


def interleaved_seconds(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The fastest of `repetitions` runs of each function, in turns, so that a busy machine slows all of them alike."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def in_subprocess(module: str, **arguments) -> dict:
    """What `python -m module --name value ...` prints, as JSON, on its last line.

    Raises:
        RuntimeError: it failed, with what it wrote to stderr.
    """
    command = [sys.executable, "-m", module]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    root = Path(__file__).resolve().parent.parent
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with {finished.returncode}:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def _status_bytes(status: Path, field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text()).group(1)) * 1024
