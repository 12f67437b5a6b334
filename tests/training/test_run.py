import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_vq.training.checkpointing import find_checkpoints
from hf_vq.training.run import RunArguments, TrainingRun, TrainingStoppedError
from tests.training.data.image_rows import open_stream, write_shards
from tests.training.toy_run import ToyImages, assert_same_weights, rows, train, weights


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
