"""What every training run shares: processes, precision, the data's position, checkpoints, resuming, metrics.

An example shows its model, its loss and this loop; the rest is here.

```python
arguments, data = HfArgumentParser((RunArguments, DataArguments)).parse_args_into_dataclasses()
run = TrainingRun(arguments)
dataset = load_image_dataset(data, "train", augment=True, seed=arguments.seed)
model = run.add_model("model", VQGANModel(config), ema=True)
discriminator = run.add_model("discriminator", PatchDiscriminator())
optimizer = run.add_optimizer("optimizer", torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate))
d_optimizer = run.add_optimizer("d_optimizer", torch.optim.AdamW(discriminator.parameters(), lr=arguments.learning_rate))
run.on_validation(lambda: {"psnr": ...})                # with the averaged weights, in eval mode, without gradients
run.start()                                             # continues from the last checkpoint, if there is one
for batch in run.batches(dataset):                      # micro-batches of this process, on its device
    with run.accumulate(model, discriminator):
        output = model(batch["pixel_values"])
        run.backward(output.loss)
        run.step(optimizer)                             # unscale, clip, update; nothing while gradients accumulate
        run.backward(discriminator_loss)
        run.step(d_optimizer)
        run.log({"loss": output.loss, "codebook_perplexity": output.perplexity})
    run.finish_step()                                   # schedules, EMA, metrics, guards, validation, checkpoint
if run.is_main_process:
    with run.ema_weights("model"), atomic_folder(run.output_dir / "tokenizer") as folder:
        run.unwrap(model).save_pretrained(folder)
run.finish()                                            # closes trackers and processes
```

The data order, the augmentation and the learning rate are functions of the seed and the step alone; everything else that
a step depends on is in the checkpoint. A run that was killed continues with the losses that it would have had.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .checkpointing import (
    draft_folder,
    find_checkpoints,
    get_random_state,
    preserved_random_state,
    publish_folder,
    remove_unfinished,
    rotate_checkpoints,
    set_aside_after,
    set_random_state,
)
from .data import collate
from .metrics import MetricsFile, MetricWindow
from .run_arguments import RunArguments, learning_rate_factor
from .samplers import ProcessBatchSampler, SampleOrder, micro_batch_sizes
from .streaming import StreamReader
from .trackers import start_tracker, track_images
from .weight_ema import WeightEMA


__all__ = ["RunArguments", "TrainingRun", "TrainingStoppedError"]

logger = logging.getLogger(__name__)


class TrainingStoppedError(RuntimeError):
    """The run cannot go on: a loss or a gradient is not finite, or the codebook has collapsed."""


class _SamplesByEpoch(Dataset):
    """Reads `(epoch, index)`; a data set without `sample(index, epoch)` is the same in every epoch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        return self.dataset.sample(index, epoch) if hasattr(self.dataset, "sample") else self.dataset[index]


class TrainingRun:
    """One training run, on one or several processes. See the module's docstring.

    Args:
        arguments (`RunArguments`): how it trains.
        find_unused_parameters (`bool`): for several processes, if some parameters get no gradient in some steps.

    Attributes:
        accelerator (`accelerate.Accelerator`): processes, device and precision.
        global_step (`int`): optimizer steps done.
        is_finished (`bool`): the last step is done, now or in an earlier start of the same run.
        broken_images (`set[str]`): names of the images that were passed over.
    """

    def __init__(self, arguments: RunArguments, find_unused_parameters: bool = False):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, set_seed

        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        if arguments.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        # Buffers are not broadcast: quantizers synchronise their own, and a broadcast within a step would change tensors
        # that the backward pass still needs.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            cpu=arguments.cpu,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=str(self.output_dir / "logs"),
            kwargs_handlers=[ddp],
        )
        if str(self.accelerator.distributed_type.value) not in (
            "NO",
            "MULTI_CPU",
            "MULTI_GPU",
            "MULTI_XPU",
            "MULTI_NPU",
        ):
            raise ValueError(
                f"distributed_type={self.accelerator.distributed_type.value}: runs work on one process or with data "
                "parallelism (accelerate launch --multi_gpu, or --cpu --num_processes N)."
            )
        micro_batch_sizes(
            arguments.train_batch_size, arguments.gradient_accumulation_steps, self.accelerator.num_processes
        )
        set_seed(arguments.seed)

        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = {}
        self.emas: dict[str, WeightEMA] = {}
        self.states: dict[str, object] = {}
        self.global_step = 0
        self.samples_seen = 0
        self.is_finished = False
        self.broken_images: set[str] = set()
        self.metrics_file = MetricsFile(self.output_dir / "metrics.jsonl")
        self._window = MetricWindow()
        self._validation: Callable[[], dict | None] | None = None
        self._started = False
        self._dataset_size: int | None = None
        self._stream_state: dict | None = None
        self._seconds = 0.0
        self._clock = self._window_clock = 0.0
        self._window_images = 0
        self._low_perplexity_rows = 0
        self._learning_rates: dict[str, float] = {}
        self._progress_bar = None

    # ---- what is trained -------------------------------------------------------------------------------------------

    def add_model(self, name: str, model: nn.Module, ema: bool = False) -> nn.Module:
        """Moves a model to the device and prepares it for precision and processes; returns what the loop calls.

        With `ema`, an average of its weights is kept if `ema_decay` is set. Parameters that are not trained must have
        `requires_grad=False` already.
        """
        self._check_new(name)
        if self.arguments.compile:
            model.compile()
        self.models[name] = model
        prepared = self.accelerator.prepare_model(model)
        if ema and self.arguments.ema_decay:
            self.emas[name] = WeightEMA(model, self.arguments.ema_decay)
        return prepared

    def add_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Registers an optimizer; its learning rates become the peak of the schedule that the arguments name."""
        self._check_new(name)
        self.optimizers[name] = optimizer
        self.schedulers[name] = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(self.arguments, step)
        )
        return optimizer

    def add_state(self, name: str, state):
        """Registers anything else with `state_dict()` and `load_state_dict()` that a resumed run needs."""
        self._check_new(name)
        self.states[name] = state
        return state

    def on_validation(self, function: Callable[[], dict | None]) -> Callable[[], dict | None]:
        """Calls `function` every `validation_steps` and after the last step, on every process.

        It runs with the averaged weights, in eval mode, without gradients, and what it draws from the random generators
        does not change the training. The metrics that it returns on the main process are written with the prefix
        `validation/`.
        """
        self._validation = function
        return function

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module that was given to `add_model`."""
        return self.accelerator.unwrap_model(model)

    def _check_new(self, name: str) -> None:
        if self._started:
            raise ValueError(f"{name!r} is added after start(): add models, optimizers and states before it.")
        if name in (*self.models, *self.optimizers, *self.states):
            raise ValueError(f"the name {name!r} is taken: every model, optimizer and state needs its own.")

    # ---- the loop --------------------------------------------------------------------------------------------------

    def start(self) -> int:
        """Continues from a checkpoint as `resume_from_checkpoint` says, and returns the number of steps done."""
        from accelerate.utils import set_seed

        if self.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for name in remove_unfinished(self.output_dir):
                logger.warning("Removed %s, left by an interrupted write.", self.output_dir / name)
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoint_to_resume()
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        else:
            set_seed(self.arguments.seed + self.accelerator.process_index)
        self.accelerator.wait_for_everyone()
        if self.is_main_process:
            self.metrics_file.truncate_after(self.global_step)
            for path in set_aside_after(self.output_dir, self.global_step):
                logger.warning("A later checkpoint is kept as %s.", path)
        self._started = True
        self.is_finished = self._reached_the_end()
        self._clock = self._window_clock = time.perf_counter()
        if self.is_finished:
            self._say(f"Already finished at step {self.global_step}, skipping ({self.output_dir}).")
        else:
            self._say(
                f"{'Continuing from' if checkpoint else 'Starting at'} step {self.global_step}: {self.output_dir}"
            )
            start_tracker(self.accelerator, self.arguments, self.output_dir, self.global_step)
        return self.global_step

    def batches(self, dataset, collate_fn: Callable = collate, shuffle: bool = True) -> Iterator:
        """This process's micro-batches, on its device, from the run's position in the data to the end of the run.

        Args:
            dataset: map-style (`len()` and, for an augmentation that depends on the epoch, `sample(index, epoch)`; else
                `dataset[index]`), or a `StreamingImageDataset`.
            collate_fn: makes a batch of a list of samples.
            shuffle: a new order in every epoch.
        """
        if not self._started:
            raise ValueError("batches() before start(): start the run first, so that it knows where it stands.")
        if self.is_finished:
            return
        from tqdm.auto import tqdm

        self._progress_bar = tqdm(
            total=self.arguments.max_train_steps,
            initial=self.global_step,
            disable=not self.is_main_process,
            unit="step",
        )
        if hasattr(dataset, "read_batches"):
            loader = self._stream_loader(dataset, collate_fn)
        else:
            loader = ((batch, None) for batch in self._map_loader(dataset, collate_fn, shuffle))
        try:
            for batch, stream_state in loader:
                if isinstance(batch, dict):
                    self.broken_images.update(batch.pop("broken_images", ()))
                self._stream_state = stream_state
                yield self.to_device(batch)
                if self.is_finished:
                    return
        finally:
            self._progress_bar.close()

    def _map_loader(self, dataset, collate_fn: Callable, shuffle: bool) -> DataLoader:
        if self._dataset_size not in (None, len(dataset)):
            raise ValueError(
                f"the data set has {len(dataset)} samples, but the checkpoint was written with {self._dataset_size}: "
                "continue with the same data, or start afresh with resume_from_checkpoint=none."
            )
        self._dataset_size = len(dataset)
        sampler = ProcessBatchSampler(
            SampleOrder(len(dataset), self.arguments.seed, shuffle),
            position=self.samples_seen,
            steps=self.arguments.max_train_steps - self.global_step,
            batch_size=self.arguments.train_batch_size,
            micro_batches=self.arguments.gradient_accumulation_steps,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return DataLoader(
            _SamplesByEpoch(dataset),
            batch_sampler=sampler,
            collate_fn=collate_fn,
            num_workers=self.arguments.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global generator, at every start once
        )

    def _stream_loader(self, dataset, collate_fn: Callable) -> DataLoader:
        workers = self.arguments.dataloader_num_workers
        reader = StreamReader(
            dataset,
            collate_fn,
            self._stream_state,
            batch_size=self.arguments.train_batch_size,
            micro_batches=self.arguments.gradient_accumulation_steps,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_threads=max(1, workers),
        )
        return DataLoader(
            reader,
            batch_size=None,
            num_workers=min(1, workers),  # one process reads the stream, with a thread per worker asked for
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )

    def to_device(self, batch):
        """Moves the tensors of a batch (a tensor, or a dict, list or tuple of them) to the device."""
        if torch.is_tensor(batch):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, dict):
            return {name: self.to_device(value) for name, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    def accumulate(self, *models: nn.Module):
        """The context of one micro-batch: gradients are exchanged between processes only in the last of a step."""
        return self.accelerator.accumulate(*models)

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Gradients of the loss of a micro-batch: scaled for fp16, and averaged over the micro-batches of a step."""
        self.accelerator.backward(loss, retain_graph=retain_graph)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscales, clips, updates and clears the gradients; does nothing while they accumulate.

        Raises:
            TrainingStoppedError: if the gradients are not finite (with fp16: for so long that the loss scale is gone).
        """
        if not self.accelerator.sync_gradients:
            return
        name = next((name for name, known in self.optimizers.items() if known is optimizer), None)
        if name is None:
            raise ValueError("step() got an optimizer that was not registered with add_optimizer().")
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.arguments.max_grad_norm or float("inf"))
        if torch.isfinite(norm):
            self._window.add({f"grad_norm/{name}": norm})
        elif scaler is None or scaler.get_scale() < 1.0:
            self._stop(f"the gradients of {name!r} are not finite in step {self.global_step + 1}")
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad()

    def log(self, metrics: dict) -> None:
        """Adds the scalars of one micro-batch to the means that are written every `logging_steps`."""
        self._window.add(metrics)

    def finish_step(self) -> None:
        """Ends a micro-batch; after the last of a step: schedules, averages, metrics, guards, validation, checkpoint."""
        if not self.accelerator.sync_gradients:
            return
        arguments = self.arguments
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self._learning_rates = {name: scheduler.get_last_lr()[0] for name, scheduler in self.schedulers.items()}
        for scheduler in self.schedulers.values():
            scheduler.step()
        for ema in self.emas.values():
            ema.update()
        self.global_step += 1
        self.samples_seen += arguments.train_batch_size
        self._window_images += arguments.train_batch_size
        self.is_finished = self._reached_the_end()
        if self._progress_bar is not None:
            self._progress_bar.update()
        if self.global_step % arguments.logging_steps == 0 or self.is_finished:
            self._report()
        validation_due = arguments.validation_steps and self.global_step % arguments.validation_steps == 0
        if self._validation is not None and (validation_due or self.is_finished):
            self._validate()
        if self.global_step % arguments.checkpointing_steps == 0 or self.is_finished:
            with self._outside_of_speed():
                self.save_checkpoint()

    def finish(self) -> None:
        """Closes the trackers and the process group. Save the trained model before."""
        self.accelerator.end_training()

    # ---- metrics and guards ----------------------------------------------------------------------------------------

    def _report(self) -> None:
        now = time.perf_counter()
        row = {"step": self.global_step, "epoch": self._epoch()}
        row.update({f"learning_rate/{name}": rate for name, rate in self._learning_rates.items()})
        row.update(self._window.take(lambda sums: self.accelerator.reduce(sums, "sum")))
        row["images_per_second"] = self._window_images / max(now - self._window_clock, 1e-9)
        row["seconds"] = self._elapsed()
        row["broken_images"] = self._count_broken_images()
        self._window_clock, self._window_images = now, 0
        self._write_row(row)
        if self._progress_bar is not None:
            shown = {name: f"{value:.4g}" for name, value in row.items() if "loss" in name or "perplexity" in name}
            self._progress_bar.set_postfix(shown)
        self._guard(row)

    def _guard(self, row: dict) -> None:
        bad = [
            name for name, value in row.items() if isinstance(value, float) and not torch.isfinite(torch.tensor(value))
        ]
        if bad:
            self._stop(
                f"{', '.join(bad)} not finite in the {self.arguments.logging_steps} steps up to {self.global_step}"
            )
        perplexity = row.get("codebook_perplexity")
        if perplexity is not None:
            low = perplexity < self.arguments.min_codebook_perplexity
            self._low_perplexity_rows = self._low_perplexity_rows + 1 if low else 0
            if self._low_perplexity_rows >= self.arguments.codebook_patience:
                self._stop(
                    f"the codebook has collapsed: its perplexity is {perplexity:.3f}, and has been below "
                    f"min_codebook_perplexity={self.arguments.min_codebook_perplexity} in the last "
                    f"{self._low_perplexity_rows} rows of metrics, up to step {self.global_step}"
                )

    def _stop(self, reason: str) -> None:
        """Saves the state for a look at it, under a name that is never resumed unasked, and raises."""
        failed = self.output_dir / f"checkpoint-{self.global_step}-failed"
        self.save_checkpoint(failed)
        good = list(find_checkpoints(self.output_dir).values())
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
        raise TrainingStoppedError(
            f"Training stopped: {reason}. The state is saved in {failed}; {last}. A lower learning_rate, a longer "
            "lr_warmup_steps or another seed may help."
        )

    def _validate(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._outside_of_speed())
            stack.enter_context(preserved_random_state())
            stack.enter_context(torch.no_grad())
            for name in self.emas:
                stack.enter_context(self.ema_weights(name))
            for model in self.models.values():
                stack.enter_context(_in_eval_mode(model))
            metrics = self._validation() or {}
        self._write_row({"step": self.global_step, **{f"validation/{name}": float(v) for name, v in metrics.items()}})

    def log_images(self, name: str, images: torch.Tensor) -> None:
        """Writes a grid of `images` `(N, 3, H, W)` in [-1, 1] to `output_dir/pictures`, and to the tracker."""
        if self.is_main_process:
            track_images(self.accelerator, self.output_dir / "pictures", name, images, self.global_step)

    def ema_weights(self, name: str):
        """A context in which a model has its averaged weights (its own, if no average is kept)."""
        return self.emas[name].applied() if name in self.emas else ExitStack()

    def _write_row(self, row: dict) -> None:
        if self.is_main_process and len(row) > 1:
            self.metrics_file.append(row)
            values = {name: value for name, value in row.items() if name != "step"}
            self.accelerator.log(values, step=self.global_step)

    def _count_broken_images(self) -> int:
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            self.broken_images.update(gather_object(sorted(self.broken_images)))
        return len(self.broken_images)

    def _epoch(self) -> float:
        return self.samples_seen / self._dataset_size if self._dataset_size else 0.0

    @contextmanager
    def _outside_of_speed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._window_clock += time.perf_counter() - start

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._clock

    def _reached_the_end(self) -> bool:
        budget = self.arguments.max_train_minutes
        out_of_time = False
        if budget is not None:
            elapsed = self._elapsed() if self._clock else self._seconds
            # The clocks of the processes differ: the main process decides.
            flag = torch.tensor([int(elapsed >= 60 * budget)], device=self.device)
            if self.accelerator.num_processes > 1:
                torch.distributed.broadcast(flag, 0)
            out_of_time = bool(flag.item())
        return out_of_time or self.global_step >= self.arguments.max_train_steps

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _components(self) -> dict[str, object]:
        parts = {**self.models, **self.optimizers, **self.states}
        parts.update({f"{name}-scheduler": scheduler for name, scheduler in self.schedulers.items()})
        parts.update({f"{name}-ema": ema for name, ema in self.emas.items()})
        if self.accelerator.scaler is not None:
            parts["grad_scaler"] = self.accelerator.scaler
        return parts

    def save_checkpoint(self, path: str | Path | None = None) -> Path:
        """Writes `output_dir/checkpoint-<step>`, which appears complete or not at all; called by every process."""
        name = f"checkpoint-{self.global_step}"
        path = Path(path) if path is not None else self.output_dir / name
        draft = draft_folder(path) if self.is_main_process else None
        draft = self._from_main_process(draft)
        own = {"random": get_random_state(), "window": self._window.state_dict()}
        torch.save(own, draft / f"process-{self.accelerator.process_index}.pt")
        self._count_broken_images()
        if self.is_main_process:
            for part_name, part in self._components().items():
                torch.save(part.state_dict(), draft / f"{part_name}.pt")
            (draft / "run.json").write_text(json.dumps(self._position(), indent=1))
        self.accelerator.wait_for_everyone()
        if self.is_main_process:
            publish_folder(draft, path)
            rotate_checkpoints(self.output_dir, self.arguments.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def _position(self) -> dict:
        return {
            "step": self.global_step,
            "samples_seen": self.samples_seen,
            "dataset_size": self._dataset_size,
            "stream": self._stream_state,
            "seconds": self._elapsed(),
            "low_perplexity_rows": self._low_perplexity_rows,
            "broken_images": sorted(self.broken_images),
            "num_processes": self.accelerator.num_processes,
            "arguments": asdict(self.arguments),
        }

    def _from_main_process(self, value):
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def _checkpoint_to_resume(self) -> Path | None:
        wanted = self.arguments.resume_from_checkpoint
        if wanted == "none":
            return None
        if wanted == "latest":
            return next(reversed(find_checkpoints(self.output_dir).values()), None)
        if not (Path(wanted) / "run.json").exists():
            raise ValueError(f'resume_from_checkpoint={wanted!r}: it must be "latest", "none" or a checkpoint folder.')
        return Path(wanted)

    def _load_checkpoint(self, path: Path) -> None:
        position = json.loads((path / "run.json").read_text())
        for name, part in self._components().items():
            file = path / f"{name}.pt"
            if not file.exists():
                raise ValueError(f"the checkpoint {path} has no {name!r}: it belongs to a run with other parts.")
            part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.global_step = position["step"]
        self.samples_seen = position["samples_seen"]
        self._dataset_size = position["dataset_size"]
        self._stream_state = position["stream"]
        self._seconds = position["seconds"]
        self._low_perplexity_rows = position["low_perplexity_rows"]
        self.broken_images = set(position["broken_images"])
        if position["num_processes"] == self.accelerator.num_processes:
            own = torch.load(path / f"process-{self.accelerator.process_index}.pt", weights_only=True)
            set_random_state(own["random"])
            self._window.load_state_dict(own["window"], self.device)
        else:
            from accelerate.utils import set_seed

            set_seed(self.arguments.seed + self.accelerator.process_index + 1000 * self.global_step)
            logger.warning(
                "The checkpoint was written by %d processes, this run has %d: the data go on where they were, but what "
                "the model draws at random (dropout, for example) differs from an unbroken run.",
                position["num_processes"],
                self.accelerator.num_processes,
            )

    # ---- small things ----------------------------------------------------------------------------------------------

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _say(self, message: str) -> None:
        self.accelerator.print(message)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
