"""A tiny but complete run: two models, dropout, an EMA codebook with restarts, two optimizers, random augmentation.

As a script it takes a JSON object: the arguments of `train`. `kill_at` kills its own process with SIGKILL in that
step, at the `kill_moment` "step" (before the update), "save" (the checkpoint is written but not yet in place) or
"published". In the step `fail_at` process 1 raises or dies, as `fail_how` says.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hf_vq.models.quantizers.vector_quantizers import EMAVectorQuantizer
from hf_vq.training import run_checkpoints
from hf_vq.training.run import RunArguments, TrainingRun


class ToyImages:
    """Images of one colour with noise that depends on the epoch; remembers nothing."""

    def __init__(self, size: int = 23, first_colour: int = 7):
        self.size, self.first_colour = size, first_colour

    def __len__(self):
        return self.size

    def sample(self, index, epoch=0):
        colour = np.random.default_rng((self.first_colour, index)).uniform(-1, 1, (3, 1, 1))
        noise = np.random.default_rng((8, epoch, index)).normal(0, 0.1, (3, 6, 6))
        return {"pixel_values": torch.tensor(colour + noise, dtype=torch.float32), "index": index, "epoch": epoch}


class ToyTokenizer(nn.Module):
    def __init__(self, dropout: float = 0.2, restart_threshold: float = 0.3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Dropout(dropout))
        self.quantize = EMAVectorQuantizer(8, 4, decay=0.9, restart_threshold=restart_threshold)
        self.quantize.reset_parameters()
        self.decoder = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, images):
        output = self.quantize(self.encoder(images))
        return self.decoder(output.quantized), output.loss, output.indices


class Interrupted(Exception):
    pass


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_while_saving(run, moment):
    publish = run_checkpoints.publish_folder

    def publish_and_die(draft, path):
        if moment == "save":
            _kill()
        publish(draft, path)
        _kill()

    run_checkpoints.publish_folder = publish_and_die


def train(
    output_dir,
    interrupt_at=None,
    kill_at=None,
    kill_moment="step",
    fail_at=None,
    fail_how="raises",
    dropout=0.2,
    restart_threshold=0.3,
    size=23,
    first_colour=7,
    loss_hook=None,
    metrics_hook=None,
    validation_hook=None,
    spy=None,
    **arguments,
):
    """Trains and returns the run and its models. `interrupt_at` raises `Interrupted` in that step, before the
    update.
    """
    defaults = {
        "max_train_steps": 10,
        "train_batch_size": 4,
        "logging_steps": 1,
        "checkpointing_steps": 3,
        "validation_steps": 2,
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "min_codebook_perplexity": 0.0,
        "cpu": True,
    }
    run = TrainingRun(RunArguments(str(output_dir), **{**defaults, **arguments}))
    tokenizer = ToyTokenizer(dropout, restart_threshold)
    model = run.add_model("model", tokenizer, ema=True)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    critic = run.add_model("critic", critic)
    optimizer = run.add_optimizer("optimizer", torch.optim.Adam(model.parameters(), lr=1e-2))
    c_optimizer = run.add_optimizer("c_optimizer", torch.optim.AdamW(critic.parameters(), lr=1e-2))

    @run.on_validation
    def validate():
        for batch in run.until_signal(range(3)):
            if validation_hook is not None:
                validation_hook(run, batch)
        if validation_hook is not None:
            validation_hook(run, "end")
        return {"noise": torch.rand(()) + model(torch.zeros(1, 3, 6, 6, device=run.device))[0].mean()}

    run.start()
    for batch in run.batches(ToyImages(size, first_colour)):
        if spy is not None:
            spy.append((run.global_step, batch["epoch"].tolist(), batch["index"].tolist()))
        images = batch["pixel_values"]
        with run.accumulate(model, critic):
            reconstructions, commitment, indices = model(images)
            loss = F.mse_loss(reconstructions, images) + commitment
            loss = loss if loss_hook is None else loss_hook(run, loss)
            run.backward(loss)
            if run.global_step + 1 == interrupt_at:
                raise Interrupted
            if run.global_step + 1 == kill_at:
                _kill() if kill_moment == "step" else _kill_while_saving(run, kill_moment)
            if run.global_step + 1 == fail_at and run.accelerator.process_index == 1:
                if fail_how == "dies":
                    _kill()
                raise RuntimeError("the disk of process 1 is on fire")
            run.step(optimizer)
            both = torch.cat([images, reconstructions.detach()])
            c_loss = F.softplus(torch.cat([-critic(both)[: len(images)], critic(both)[len(images) :]])).mean()
            run.backward(c_loss)
            run.step(c_optimizer)
            run.log({"loss": loss, "c_loss": c_loss})
            if metrics_hook is not None:
                run.log(metrics_hook(run))
            else:
                run.log_codes(indices, 8)
        run.finish_step()
    return run


def rows(output_dir, validation=False):
    """The rows of metrics.jsonl without the times."""
    found = []
    for line in Path(output_dir, "metrics.jsonl").read_text().splitlines():
        row = {
            name: value
            for name, value in json.loads(line).items()
            if not name.endswith("second") and not name.endswith("seconds")
        }
        if validation or "loss" in row:
            found.append(row)
    return found


def weights(run):
    """Everything that training has changed, by name."""
    states = {name: model.state_dict() for name, model in run.models.items()}
    states["ema"] = {**run.emas["model"].averages, **run.emas["model"].copies}
    return {f"{name}.{key}": value.clone() for name, state in states.items() for key, value in state.items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    save_to = options.pop("save_to", None)
    torch.set_num_threads(1)
    finished = train(**options)
    if save_to is not None:
        torch.save(weights(finished), f"{save_to}-{finished.accelerator.process_index}.pt")
    finished.finish()
