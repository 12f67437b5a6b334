import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from hf_vq.training.interruption import REPEAT_SECONDS, Interruption, SignalReceived, until_signal
from tests.process_groups import in_processes
from tests.training import toy_run
from tests.training.toy_run import rows


ROOT = Path(__file__).resolve().parents[2]


def start(options, processes=1, **environment):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]
        command += [str(29000 + os.getpid() % 2000)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, toy_run.__file__, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_step(folder, step, process):
    while process.poll() is None and (not Path(folder, "metrics.jsonl").exists() or len(rows(folder)) < step):
        time.sleep(0.05)


def test_a_repeated_signal_counts_once_and_a_later_one_ends_at_once(monkeypatch):
    # a program that was started in the background may have been told to pass over it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interruption = Interruption()
    interruption.install()
    try:
        now = [100.0]
        monkeypatch.setattr("hf_vq.training.interruption.time.monotonic", lambda: now[0])
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signum == signal.SIGINT
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        interruption.restore()
        signal.signal(signal.SIGINT, before)


def told_twice():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interruption = Interruption()
    interruption.install()
    os.kill(os.getpid(), signal.SIGINT)
    assert interruption.signum == signal.SIGINT
    interruption._time -= REPEAT_SECONDS
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)


def test_a_second_signal_ends_a_program_that_was_to_pass_over_it():
    """A shell starts what runs in the background with SIGINT passed over; what was told to end ends, all the same."""
    process = multiprocessing.get_context("fork").Process(target=told_twice)
    process.start()
    process.join(15)
    assert process.exitcode == -signal.SIGINT


def signalled(lengths, told, after):
    """What a process has of its share, and the signal; process `told` gets one before batch `after`."""
    rank, interruption, found = dist.get_rank(), Interruption(), []
    try:
        for batch in until_signal(range(lengths[rank]), interruption):
            found.append(batch)
            if rank == told and batch == after:
                interruption.signum = int(signal.SIGTERM)
    except SignalReceived as ended:
        return found, ended.signum
    return found, 0


def test_all_processes_end_a_loop_when_one_is_told_to(tmp_path):
    assert in_processes(2, tmp_path, signalled, (5, 3), 1, 1) == [([0, 1], 15), ([0, 1], 15)]
    assert in_processes(2, tmp_path, signalled, (5, 3), 0, 3) == [([0, 1, 2, 3], 15), ([0, 1, 2], 15)]
    assert in_processes(3, tmp_path, signalled, (2, 0, 1), 2, 9) == [([0, 1], 0), ([], 0), ([0], 0)]


@pytest.mark.slow
def test_two_processes_save_when_one_is_told_to_end(tmp_path):
    """torchrun passes SIGTERM on to both, which stop after the same step."""
    folder = tmp_path / "run"
    options = {"output_dir": str(folder), "max_train_steps": 100000, "checkpointing_steps": 10**6, "ema_decay": 0.0}
    options |= {"validation_steps": 0, "dropout": 0.0}
    process = start({**options, "max_train_steps": 3000}, 2)
    wait_for_step(folder, 20, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "SIGTERM: ended at step" in output, output
    step = int(output.split("SIGTERM: ended at step ")[1].split(",")[0])
    assert (folder / f"checkpoint-{step}/process-1.pt").exists() and rows(folder)[-1]["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_when_one_process_fails_all_end_and_its_error_is_last(tmp_path, how):
    options = {"output_dir": str(tmp_path / "run"), "fail_at": 4, "fail_how": how, "max_train_steps": 1000}
    process = start(options, 2)
    wait_for_step(tmp_path / "run", 3, process)
    since = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - since < 15, output
    last = output.rstrip().splitlines()[-12:]
    expected = "RuntimeError: the disk of process 1 is on fire" if how == "raises" else "SIGKILL"
    assert any(expected in line for line in last), output
    assert "rank      : 1" in output.split("Root Cause")[-1], output
