import logging
import sys
from pathlib import Path

import pytest

from hf_vq.training.run import RunArguments, TrainingRun
from tests.process_groups import in_processes
from tests.training.toy_run import train


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_without_its_package_is_refused(tmp_path, monkeypatch, tracker):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ValueError, match=f"report_to='{tracker}' .*`pip install {tracker}`"):
        TrainingRun(RunArguments(str(tmp_path), report_to=tracker, cpu=True))


def test_a_run_that_its_time_ended_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path / "short", max_train_steps=100000, max_train_minutes=0.1 / 60)
    assert f"ended the run after {run.global_step} of max_train_steps=100000 steps" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "whole", max_train_steps=2, max_train_minutes=10)
    assert "max_train_minutes" not in caplog.text


def _threads_of_gloo() -> int:
    return sum("gloo_runloop" in file.read_text() for file in Path("/proc/self/task").glob("*/comm"))


def _train_and_finish(folder):
    threads = []
    run = train(folder, max_train_steps=2)  # which keeps the models
    threads.append(_threads_of_gloo())
    run.finish()
    return [*threads, _threads_of_gloo()]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads where Linux shows them")
def test_the_group_of_processes_has_ended_when_a_run_has(tmp_path):
    """Ended later, by what the models hold of it, it may wait for itself and never end."""
    for before, after in in_processes(2, tmp_path, _train_and_finish, tmp_path / "run"):
        assert before > 0 and after == 0
