"""Runs that were interrupted, killed or told to end, and are continued."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_vq.training import run_checkpoints
from hf_vq.training.checkpointing import find_checkpoints
from hf_vq.training.run import RunArguments, TrainingRun
from tests.training import toy_run
from tests.training.toy_run import Interrupted, assert_same_weights, rows, train, weights


# Resuming


@pytest.mark.parametrize("step", [2, 4, 6, 7, 10])
def test_an_interrupted_run_continues_to_the_bit(unbroken, tmp_path, step):
    with pytest.raises(Interrupted):
        train(tmp_path, interrupt_at=step)
    run = train(tmp_path)
    assert rows(tmp_path, validation=True) == unbroken[0]
    assert_same_weights(weights(run), unbroken[1])


def test_the_comparison_can_fail(unbroken, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(tmp_path, interrupt_at=5)
    monkeypatch.setattr("hf_vq.training.run.set_random_state", lambda state: None)
    train(tmp_path)
    assert rows(tmp_path)[:3] == [row for row in unbroken[0] if "loss" in row][:3]
    assert rows(tmp_path) != [row for row in unbroken[0] if "loss" in row]


def test_metrics_between_two_rows_survive(tmp_path):
    """A checkpoint in the middle of a logging window: the mean over the window is that of the unbroken run."""
    train(tmp_path / "a", logging_steps=5)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", logging_steps=5, interrupt_at=5)
    train(tmp_path / "b", logging_steps=5)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert [row["step"] for row in rows(tmp_path / "b")] == [5, 10]


def test_several_interruptions_with_accumulation_and_bf16(tmp_path):
    options = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    expected = weights(train(tmp_path / "a", **options))
    for step in (2, 5, 9):
        with pytest.raises(Interrupted):
            train(tmp_path / "b", interrupt_at=step, **options)
    run = train(tmp_path / "b", **options)
    assert rows(tmp_path / "a", validation=True) == rows(tmp_path / "b", validation=True)
    assert_same_weights(weights(run), expected)


def test_a_finished_run_is_skipped(unbroken, tmp_path, capsys):
    train(tmp_path, max_train_steps=4)
    capsys.readouterr()
    spy = []
    run = train(tmp_path, max_train_steps=4, spy=spy)
    assert spy == [] and run.is_finished
    assert "Already finished at step 4, skipping" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(tmp_path):
    options = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    expected = weights(train(tmp_path / "a", **options))
    train(tmp_path / "b", max_train_steps=4, **options)
    assert_same_weights(weights(train(tmp_path / "b", **options)), expected)


def test_a_changed_learning_rate_is_used_and_named(tmp_path, caplog):
    train(tmp_path, max_train_steps=3, lr_scheduler="constant", lr_warmup_steps=0)
    run = TrainingRun(RunArguments(str(tmp_path), max_train_steps=9, learning_rate=0.5, cpu=True))
    model = run.add_model("model", toy_run.ToyTokenizer())
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    run.add_model("critic", critic)
    optimizer = run.add_optimizer("optimizer", torch.optim.Adam(model.parameters(), lr=0.5, weight_decay=0.1))
    run.add_optimizer("c_optimizer", torch.optim.AdamW(critic.parameters(), lr=0.5))
    with caplog.at_level(logging.WARNING):
        assert run.start() == 3
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.state_dict()["state"][0]["step"] == 3
    assert "learning_rate=0.5; the checkpoint was written with 0.0001" in caplog.text


def test_other_parts_and_other_data_are_refused(tmp_path):
    train(tmp_path, max_train_steps=3)
    with pytest.raises(ValueError, match="the data set has 24 samples, but 23 when the checkpoint was written"):
        train(tmp_path, max_train_steps=6, size=24)
    run = TrainingRun(RunArguments(str(tmp_path), cpu=True))
    run.add_model("other", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no 'other'"):
        run.start()


def test_resume_none_and_resume_from_an_older_checkpoint(unbroken, tmp_path):
    train(tmp_path, checkpoints_total_limit=None, max_train_steps=9)
    assert list(find_checkpoints(tmp_path)) == [3, 6, 9]
    run = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), max_train_steps=5)
    assert run.global_step == 5 and [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert list(find_checkpoints(tmp_path)) == [3, 5]
    assert (tmp_path / "checkpoint-9-superseded-1").is_dir()
    train(tmp_path, resume_from_checkpoint="none", max_train_steps=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and list(find_checkpoints(tmp_path)) == [2]
    with pytest.raises(ValueError, match='must be "latest", "none" or a checkpoint folder'):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-77"))


def test_rotation_keeps_the_newest(unbroken):
    assert list(find_checkpoints(unbroken[2])) == [9, 10]


# Signals


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_a_signal_ends_the_run_with_a_checkpoint(unbroken, tmp_path, capfd, signum, code):
    """In a step that is due to be validated: the validation is made up for."""

    def send(run, loss):
        if run.global_step + 1 == 4:
            os.kill(os.getpid(), getattr(signal, signum))
        return loss

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, loss_hook=send)
    assert ended.value.code == code and signal.getsignal(signal.SIGTERM) == before
    assert list(find_checkpoints(tmp_path)) == [3, 4]
    assert f"{signum}: ended at step 4, saved in {tmp_path / 'checkpoint-4'}" in capfd.readouterr().out
    run = train(tmp_path)
    assert rows(tmp_path, validation=True) == unbroken[0]
    assert_same_weights(weights(run), unbroken[1])


@pytest.mark.parametrize("moment", [0, 2, "end"])
@pytest.mark.parametrize("step", [4, 6, 10])
def test_a_signal_in_a_validation_ends_the_run(unbroken, tmp_path, step, moment):
    """In its first batch, its last, or after it; with the checkpoint of the step before it (6, 10) or not (4)."""

    def send(run, batch):
        if run.global_step == step and batch == moment:
            assert (tmp_path / f"checkpoint-{step}").exists() == (step != 4)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(tmp_path, validation_hook=send)
    assert ended.value.code == 143
    # after a validation the run takes one step more, if there is one
    last = min(step + (moment == "end"), 10)
    assert list(find_checkpoints(tmp_path))[-1] == last
    run = train(tmp_path)
    assert rows(tmp_path, validation=True) == unbroken[0]
    assert_same_weights(weights(run), unbroken[1])


def test_a_run_that_is_killed_in_a_validation_makes_up_for_it_once(unbroken, tmp_path):
    def kill(run, batch):
        if run.global_step == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path, validation_hook=kill)
    assert list(find_checkpoints(tmp_path)) == [3, 6]
    with pytest.raises(Interrupted):
        train(tmp_path, interrupt_at=7)
    train(tmp_path)
    assert rows(tmp_path, validation=True) == unbroken[0]


def test_a_signal_while_the_last_checkpoint_is_written_is_not_lost(unbroken, tmp_path, monkeypatch, capfd):
    save = run_checkpoints.publish_folder

    def publish(draft, path):
        if path.name == "checkpoint-10":
            os.kill(os.getpid(), signal.SIGTERM)
        save(draft, path)

    monkeypatch.setattr(run_checkpoints, "publish_folder", publish)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path)
    assert ended.value.code == 143 and list(find_checkpoints(tmp_path)) == [9, 10]
    assert train(tmp_path).is_finished and "Already finished at step 10" in capfd.readouterr().out
    assert rows(tmp_path, validation=True) == unbroken[0]


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 20))
    monkeypatch.setattr("hf_vq.training.run.time.monotonic", lambda: next(now))
    train(tmp_path, checkpointing_minutes=1.0, checkpointing_steps=1000, checkpoints_total_limit=None)
    steps = list(find_checkpoints(tmp_path))
    assert steps[-1] == 10 and 2 < len(steps) < 8


def test_time_budget(tmp_path):
    run = train(tmp_path, max_train_steps=100000, max_train_minutes=0.5 / 60)
    assert run.is_finished and 0 < run.global_step < 100000
    assert list(find_checkpoints(tmp_path))[-1] == run.global_step
    again = train(tmp_path, max_train_steps=100000, max_train_minutes=0.5 / 60)
    assert again.is_finished and again.global_step == run.global_step


# Whole processes


def launch(options, processes=1):
    command = [sys.executable]
    if processes > 1:
        # "--cpu --num_processes 2" starts a single process unless there is an MPI; the run's own argument says cpu
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(29000 + os.getpid() % 2000)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, toy_run.__file__, json.dumps(options)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_killed_at_any_moment(unbroken, tmp_path):
    options = {"output_dir": str(tmp_path / "run"), "save_to": str(tmp_path / "weights")}
    for kill_at, moment in ((2, "step"), (3, "save"), (6, "published"), (8, "step"), (9, "save")):
        killed = launch({**options, "kill_at": kill_at, "kill_moment": moment})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = launch(options)
    assert done.returncode == 0, done.stderr
    assert rows(options["output_dir"], validation=True) == unbroken[0]
    assert_same_weights(torch.load(tmp_path / "weights-0.pt"), unbroken[1])
    assert not list((tmp_path / "run").glob(".unfinished*"))


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Two processes end with bit-equal codebooks and weights and, when killed, resume to the bit."""

    def options(name):
        return {"output_dir": str(tmp_path / name), "save_to": str(tmp_path / f"{name}-weights"), "max_train_steps": 6}

    done = launch(options("two"), 2)
    assert done.returncode == 0, done.stderr
    killed = launch({**options("broken"), "kill_at": 5}, 2)
    assert killed.returncode != 0 and list(find_checkpoints(tmp_path / "broken")) == [3]
    done = launch(options("broken"), 2)
    assert done.returncode == 0, done.stderr

    first, second = (torch.load(tmp_path / f"two-weights-{rank}.pt") for rank in range(2))
    assert "model.quantize.embedding" in first
    trained = [name for name in first if "running" not in name]  # BatchNorm's statistics are each process's own
    assert_same_weights({name: first[name] for name in trained}, {name: second[name] for name in trained})
    assert rows(tmp_path / "broken", validation=True) == rows(tmp_path / "two", validation=True)
    for rank, expected in enumerate((first, second)):
        assert_same_weights(torch.load(tmp_path / f"broken-weights-{rank}.pt"), expected)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    # without dropout, which each process draws on its own; dead codes restart at the same latents
    options = {"dropout": 0.0, "max_train_steps": 8, "gradient_accumulation_steps": 2}
    done = launch({**options, "output_dir": str(tmp_path / "two")}, 2)
    assert done.returncode == 0, done.stderr
    train(tmp_path / "one", **options)
    for metric in ("loss", "codebook_perplexity"):
        one, two = (torch.tensor([row[metric] for row in rows(tmp_path / name)]) for name in ("one", "two"))
        assert one.shape == (8,) and (one - two).abs().max() < 1e-6
    assert len(set(one.tolist())) > 2
