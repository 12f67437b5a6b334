import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_vq import VQVAEConfig, VQVAEModel
from hf_vq.training import run_parts
from hf_vq.training.checkpointing import find_checkpoints
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run import RunArguments, TrainingRun, TrainingStoppedError
from hf_vq.training.run_arguments import learning_rate_factor
from hf_vq.training.sharing import save_trained
from tests.training import toy_run
from tests.training.data.image_rows import open_stream, write_shards
from tests.training.toy_run import Interrupted, ToyImages, rows, train, weights


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in singletons: another precision or accumulation needs a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = train(folder)
    return rows(folder, validation=True), weights(run), folder


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


def test_a_crash_while_saving_leaves_the_previous_checkpoint(unbroken, tmp_path, monkeypatch, caplog):
    def crash(folder, parts):
        (folder / "model.safetensors").write_bytes(b"half")
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        fail_at_the_second_save(patch, crash)
        train(tmp_path)
    assert list(find_checkpoints(tmp_path)) == [3]
    assert (tmp_path / ".unfinished-checkpoint-6" / "model.safetensors").exists()
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path)
    assert ".unfinished-checkpoint-6, left by an interrupted write" in caplog.text
    assert not list(tmp_path.glob(".unfinished*"))
    assert rows(tmp_path, validation=True) == unbroken[0]
    assert_same_weights(weights(run), unbroken[1])


def fail_at_the_second_save(patch, crash):
    saves, real = [], run_parts.save_parts
    patch.setattr(
        "hf_vq.training.run_parts.save_parts", lambda *a: (saves.append(1), (real if len(saves) < 2 else crash)(*a))
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_the_draft_removed(tmp_path, monkeypatch, error):
    def crash(folder, parts):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    fail_at_the_second_save(monkeypatch, crash)
    with pytest.raises(OSError, match=r"takes about \d+ bytes, and \d+ bytes are free; .*checkpoint-3") as caught:
        train(tmp_path)
    assert caught.value.filename == str(tmp_path / "checkpoint-6") and str(error) in str(caught.value)
    assert list(find_checkpoints(tmp_path)) == [3] and not list(tmp_path.glob(".unfinished*"))


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the disk is too full.* and 1000 bytes are free; there is no earlier") as caught:
        train(tmp_path)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("what", ["row", "picture", "tracker", "trained model"])
def test_whatever_cannot_be_written_is_named(tmp_path, monkeypatch, what):
    """A limit on the size of files stands for a full disk: the system's own error, in the middle of a write."""
    run = TrainingRun(RunArguments(str(tmp_path), cpu=True, report_to="tensorboard" if what == "tracker" else "none"))
    run.start()
    run.save_checkpoint(tmp_path / "checkpoint-7")
    run._write_row({"step": 1, "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()

    def fill():
        if what == "row":
            run._write_row({"step": 2, "loss": 0.5, "note": "x" * 9000})
        elif what == "picture":
            run.log_images("noise", torch.rand(4, 3, 64, 64) * 2 - 1)
        elif what == "trained model":
            tokenizer = VQVAEModel(VQVAEConfig(hidden_size=16, residual_hidden_size=8, embed_dim=8, num_embeddings=64))
            save_trained(run, tokenizer, "tokenizer", DataArguments("somewhere"))
        else:
            for step in range(2, 2000):
                run._write_row({"step": step, "loss": 1.0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"takes about \d+ bytes, and \d+ bytes are free; .*checkpoint-7") as caught:
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    place = {"row": "metrics.jsonl", "picture": "pictures/noise-0000000.png", "tracker": "logs"}.get(what, "tokenizer")
    assert caught.value.filename == str(tmp_path / place)
    if what != "tracker":
        assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not list(tmp_path.rglob(".unfinished*"))


DAMAGES = {
    "truncated": lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "half of the JSON": lambda folder: (folder / "run.json").write_text('{"step": 1'),
    "half of the list of files": lambda folder: (folder / "files.json").write_text('{"run.js'),
    "one file of another checkpoint": lambda folder: shutil.copy(
        folder.parent / "checkpoint-9/optimizer.pt", folder / "optimizer.pt"
    ),
    "a missing file": lambda folder: (folder / "process-0.pt").unlink(),
    "one bit": lambda folder: flip_a_bit(folder / "model-ema.pt"),
}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(unbroken, tmp_path, caplog, damage):
    shutil.copytree(unbroken[2], tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "checkpoint-10")
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path)
    assert f"damaged and passed over: {tmp_path / 'checkpoint-10'}" in caplog.text
    assert f"Continuing from {tmp_path / 'checkpoint-9'}" in caplog.text
    assert rows(tmp_path, validation=True) == unbroken[0]
    assert_same_weights(weights(run), unbroken[1])
    with pytest.raises(ValueError, match="resume_from_checkpoint.*must be a whole checkpoint"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-10-superseded-1"))


def test_no_whole_checkpoint_is_an_error(tmp_path):
    train(tmp_path, max_train_steps=3)
    DAMAGES["one bit"](tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged .*model-ema.pt.*start afresh"):
        train(tmp_path)
    assert train(tmp_path, resume_from_checkpoint="none", max_train_steps=2).global_step == 2


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


# Gradients


class LinearRegression:
    """Steps of plain gradient descent on a linear model, where a batch and its parts have comparable gradients."""

    def __init__(self, folder, **arguments):
        self.run = TrainingRun(RunArguments(str(folder), train_batch_size=8, max_train_steps=3, cpu=True, **arguments))
        self.model = self.run.add_model("model", nn.Linear(108, 1))
        self.optimizer = self.run.add_optimizer("sgd", torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.run.start()

    def train(self, factor=1.0):
        for batch in self.run.batches(ToyImages()):
            with self.run.accumulate(self.model):
                loss = self.model(batch["pixel_values"].flatten(1)).square().mean()
                self.run.backward(loss * factor)
                self.run.step(self.optimizer)
                self.run.log({"loss": loss})
            self.run.finish_step()
        return self.model.weight.detach().clone()


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    whole = LinearRegression(tmp_path / "1", max_grad_norm=0.05).train()
    for parts in (2, 4, 8):
        cut = LinearRegression(tmp_path / str(parts), gradient_accumulation_steps=parts, max_grad_norm=0.05).train()
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-7)
        assert rows(tmp_path / str(parts))[-1]["step"] == 3


def test_clipping(tmp_path):
    """A step of plain gradient descent is as long as the learning rate times the clipped norm."""
    case = LinearRegression(tmp_path, max_grad_norm=0.01)
    before = torch.cat([case.model.weight.detach().flatten().clone(), case.model.bias.detach().clone()])
    case.run.arguments.max_train_steps = 1
    case.train(factor=1e4)
    after = torch.cat([case.model.weight.detach().flatten(), case.model.bias.detach()])
    assert (after - before).norm() == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert rows(tmp_path)[0]["grad_norm/sgd"] > 1.0  # what is logged is the norm before clipping


def test_a_scaler_is_undone_before_clipping(tmp_path):
    """The loss scale of fp16, here with a scaler on the CPU: same steps as without, and a skipped step after an
    inf.
    """
    plain = LinearRegression(tmp_path / "plain", max_grad_norm=0.01).train()
    case = LinearRegression(tmp_path / "scaled", max_grad_norm=0.01)
    case.run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.testing.assert_close(case.train(), plain, rtol=1e-5, atol=1e-7)

    case = LinearRegression(tmp_path / "overflow")
    case.run.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    case.run.arguments.max_train_steps = 2
    before = case.model.weight.detach().clone()
    assert torch.equal(case.train(factor=float("inf")), before)
    assert scaler.get_scale() == 256.0


def test_schedules():
    def factors(name, **options):
        arguments = RunArguments("x", lr_scheduler=name, max_train_steps=10, **options)
        return [learning_rate_factor(arguments, step) for step in range(11)]

    assert factors("constant") == [1.0] * 11
    assert factors("constant_with_warmup", lr_warmup_steps=3)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors("linear", lr_warmup_steps=0) == pytest.approx([1 - step / 10 for step in range(11)])
    cosine = factors("cosine", lr_warmup_steps=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and cosine[6] == pytest.approx(0.5) and cosine[10] == 0.0


# Guards


def test_nan_stops_the_run_before_it_reaches_the_weights(tmp_path):
    def poison(run, loss):
        return loss * float("nan") if run.global_step + 1 == 5 else loss

    with pytest.raises(TrainingStoppedError, match=r"gradients of 'optimizer' are not finite in step 5.*checkpoint-3"):
        train(tmp_path, loss_hook=poison)
    state = load_file(tmp_path / "checkpoint-4-failed" / "model.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    run = train(tmp_path)  # the cause is gone: the run goes on from the last good checkpoint
    assert run.global_step == 10 and rows(tmp_path)[-1]["step"] == 10


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingStoppedError, match="row of metrics of step 6: some_loss"):
        train(tmp_path, metrics_hook=lambda run: {"some_loss": float("inf") if run.global_step == 5 else 1.0})
    assert list(find_checkpoints(tmp_path)) == [3] and (tmp_path / "checkpoint-6-failed").is_dir()


def test_fp16_overflow_is_forgiven_until_the_scale_is_gone(tmp_path):
    case = LinearRegression(tmp_path)
    case.run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    case.run.arguments.max_train_steps = 100
    with pytest.raises(TrainingStoppedError, match="in step 5"):  # 8, 4, 2, 1, then 1/2
        case.train(factor=float("nan"))


@pytest.mark.parametrize("others", [{}, {"codebook_perplexity_0": 5.0, "codebook_perplexity_2": 4.0}])
def test_a_collapsed_codebook_stops_the_run(tmp_path, others):
    def perplexity(run):
        name = "codebook_perplexity_1" if others else "codebook_perplexity"
        return {name: 1.0 if run.global_step >= 2 else 5.0, **others}

    options = {"min_codebook_perplexity": 1.5, "codebook_patience": 4, "metrics_hook": perplexity}
    with pytest.raises(TrainingStoppedError, match="codebook has collapsed: at step 6 its perplexity is 1.000"):
        train(tmp_path, **options)
    assert (tmp_path / "checkpoint-6-failed" / "model.safetensors").exists()
    with pytest.raises(TrainingStoppedError, match="at step 6"):  # the count survives a restart
        train(tmp_path, **options)


# Data order and validation


@pytest.mark.parametrize("options", [{"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}])
def test_the_order_does_not_depend_on_workers_or_micro_batches(tmp_path, options):
    one, other = [], []
    train(tmp_path / "a", spy=one, max_train_steps=8)
    train(tmp_path / "b", spy=other, max_train_steps=8, **options)

    def by_step(spy):
        steps = {}
        for step, epochs, indices in spy:
            steps.setdefault(step, []).extend(zip(epochs, indices, strict=True))
        return steps

    assert by_step(one) == by_step(other)
    seen = [pair for pairs in by_step(one).values() for pair in pairs]
    assert sorted(seen[:23]) == [(0, index) for index in range(23)] and {epoch for epoch, _ in seen[23:]} == {1}
    assert seen[:23] != sorted(seen[:23])


def test_validation_uses_the_average_and_changes_nothing(tmp_path):
    with_validation = weights(train(tmp_path / "a", validation_steps=1))
    without = weights(train(tmp_path / "b", validation_steps=0))
    assert_same_weights(with_validation, without)

    case = LinearRegression(tmp_path / "c", ema_decay=0.5)
    assert case.run.emas == {}  # only models that ask for it
    run = TrainingRun(
        RunArguments(str(tmp_path / "d"), max_train_steps=3, cpu=True, ema_decay=0.5, validation_steps=2)
    )
    model = run.add_model("model", nn.Sequential(nn.Linear(108, 1), nn.Dropout(0.5)), ema=True)
    optimizer = run.add_optimizer("sgd", torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []

    @run.on_validation
    def validate():
        assert not model.training and not torch.is_grad_enabled()
        seen.append(torch.equal(model[0].weight, run.emas["model"].averages["0.weight"]))
        return {"answer": 42}

    run.start()
    for batch in run.batches(ToyImages()):
        with run.accumulate(model):
            run.backward(model(batch["pixel_values"].flatten(1)).square().mean())
            run.step(optimizer)
        run.finish_step()
        assert model.training and not torch.equal(model[0].weight, run.emas["model"].averages["0.weight"])
    assert seen == [True, True]  # step 2 and the end
    found = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if "validation/answer" in row] == [2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_continues_in_a_stream(tmp_path, workers):
    folder = write_shards(tmp_path / "data", broken=(3,))

    def start(output_dir, interrupt_at=None):
        run = TrainingRun(
            RunArguments(
                str(output_dir),
                max_train_steps=9,
                train_batch_size=8,
                gradient_accumulation_steps=2,
                checkpointing_steps=2,
                logging_steps=1,
                dataloader_num_workers=workers,
                cpu=True,
            )
        )
        run.start()
        for batch in run.batches(open_stream(folder, crop="random")):
            with run.accumulate():
                run.log({"loss": batch["pixel_values"].mean(), "label": batch["label"].float().mean()})
            if run.global_step + 1 == interrupt_at:
                return None
            run.finish_step()
        return run

    start(tmp_path / "a")
    start(tmp_path / "b", interrupt_at=6)
    resumed = start(tmp_path / "b")
    assert resumed.broken_images == {"img-3.png (row 3 of shard 0)"}
    assert len(rows(tmp_path / "a")) == 9 and rows(tmp_path / "a") == rows(tmp_path / "b")


def test_broken_images_are_counted_and_remembered(tmp_path):
    class Broken(ToyImages):
        def sample(self, index, epoch=0):
            sample = super().sample(index, epoch)
            return {**sample, "broken_images": (f"{index}.png",)} if index in (3, 5) else sample

    def start(steps):
        run = TrainingRun(
            RunArguments(str(tmp_path), max_train_steps=steps, train_batch_size=5, logging_steps=1, cpu=True)
        )
        run.start()
        for batch in run.batches(Broken()):
            assert "broken_images" not in batch
            with run.accumulate():
                run.log({"loss": 0.0})
            run.finish_step()
        return run

    start(5)
    assert start(6).broken_images == {"3.png", "5.png"}
    assert rows(tmp_path)[-1]["broken_images"] == 2


def test_pictures_and_tensorboard_continue(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def start(steps):
        run = TrainingRun(
            RunArguments(str(tmp_path), max_train_steps=steps, logging_steps=1, report_to="tensorboard", cpu=True)
        )
        run.on_validation(lambda: run.log_images("toy", torch.zeros(5, 3, 4, 4), columns=3))
        run.start()
        for _ in run.batches(ToyImages()):
            with run.accumulate():
                run.log({"loss": float(run.global_step)})
            run.finish_step()
        run.finish()

    start(2)
    start(4)
    from PIL import Image

    assert Image.open(tmp_path / "pictures" / "toy-0000004.png").size == (3 * 6 - 2, 2 * 6 - 2)
    events = EventAccumulator(str(tmp_path / "logs" / "hf_vq")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert [event.step for event in events.Images("toy")] == [2, 4]


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "step"}, "`lr_scheduler` must be one of constant, .*, got 'step'"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no"),
        ({"lr_warmup_steps": 5}, "lr_warmup_steps=5 has no effect"),
        ({"push_to_hub": True}, "needs hub_model_id"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RunArguments("x", **options)


NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = {
    "seed": (-1, 0.5, 2**32),
    "max_train_steps": (0, -3, 2.5, NAN),
    "max_train_minutes": (0.0, -1.0, NAN),
    "train_batch_size": (0, -8, 1.5),
    "gradient_accumulation_steps": (0, -1),
    "learning_rate": (0.0, -1e-4, NAN, INF),
    "lr_warmup_steps": (-5, 0.5),
    "max_grad_norm": (-1.0, NAN, INF),
    "ema_decay": (-0.1, 1.0, NAN),
    "checkpointing_steps": (0, -1),
    "checkpointing_minutes": (0.0, -1.0, NAN),
    "checkpoints_total_limit": (0, -1),
    "logging_steps": (0, -1),
    "validation_steps": (-1, NAN),
    "min_codebook_perplexity": (-1.0, NAN, INF),
    "codebook_patience": (0, -1),
    "dataloader_num_workers": (-1, 0.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_NUMBERS.items() for value in values]
)
def test_bad_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {value}"):
        RunArguments("x", lr_scheduler="cosine", **{name: value})


def test_every_number_among_the_arguments_is_checked():
    kinds = {field.name: field.type for field in dataclasses.fields(RunArguments)}
    numbers = {name for name, kind in kinds.items() if "int" in str(kind) or "float" in str(kind)}
    assert numbers == set(BAD_NUMBERS)


def test_bad_use(tmp_path):
    with pytest.raises(ValueError, match="train_batch_size=6 .* multiple of .* 4 × 1 = 4"):
        TrainingRun(RunArguments(str(tmp_path), train_batch_size=6, gradient_accumulation_steps=4, cpu=True))
    run = TrainingRun(RunArguments(str(tmp_path), cpu=True))
    model = run.add_model("model", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'model' is taken"):
        run.add_optimizer("model", torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="not registered"):
        run.step(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="before start"):
        next(run.batches(ToyImages()))
    with pytest.raises(ValueError, match="log one number"):
        run.log({"loss": torch.zeros(2)})
    run.start()
    with pytest.raises(ValueError, match="after start"):
        run.add_state("late", model)


def test_a_launch_that_lost_its_processes_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with caplog.at_level(logging.WARNING):
        TrainingRun(RunArguments(str(tmp_path)))
    assert "This is a single process" in caplog.text


def test_the_launchers_precision_is_not_dropped_in_silence(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING):
        run = TrainingRun(RunArguments(str(tmp_path), cpu=True))
    assert run.accelerator.mixed_precision == "no" and "the launcher's bf16 has no effect" in caplog.text


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
