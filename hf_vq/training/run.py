"""What every training run shares: processes, precision, the data's position, checkpoints, resuming, metrics.

An example shows its model, its loss and this loop; the rest is here.

```python
arguments, data = HfArgumentParser((RunArguments, DataArguments)).parse_args_into_dataclasses()
run = TrainingRun(arguments)
dataset = load_image_dataset(data, "train", augment=True, seed=arguments.seed)
model = run.add_model("model", VQGANModel(config), ema=True)
discriminator = run.add_model("discriminator", PatchDiscriminator())
optimizer = run.add_optimizer("optimizer", torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate))
d_optimizer = run.add_optimizer("d_optimizer", torch.optim.AdamW(discriminator.parameters()))
run.on_validation(lambda: {"psnr": ...})                # with the averaged weights, in eval mode, without gradients
run.start()                                             # continues from the last checkpoint, if there is one
for batch in run.batches(dataset):                      # micro-batches of this process, on its device
    with run.accumulate(model, discriminator):
        output = model(batch["pixel_values"])
        run.backward(output.loss)
        run.step(optimizer)                             # unscale, clip, update; nothing while gradients accumulate
        run.backward(discriminator_loss)
        run.step(d_optimizer)
        run.log({"loss": output.loss})
        run.log_codes(output.indices, config.num_embeddings)
    run.finish_step()                                   # schedules, EMA, metrics, guards, validation, checkpoint
with run.trained_model("model") as trained:             # whole, with the averaged weights
    if run.is_main_process:
        with atomic_folder(run.output_dir / "tokenizer") as folder:
            trained.save_pretrained(folder)
run.finish()                                            # closes trackers and processes
```

The data order, the augmentation and the learning rate are functions of the seed and the step alone; everything else
that a step depends on is in the checkpoint. A run that was killed continues with the losses that it would have had.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..distributed import from_main_process, gathered, union_over_processes
from ..evaluation.evaluate import evaluation_mode
from .checkpointing import (
    get_random_state,
    last_good_checkpoint,
    preserved_random_state,
    remove_unfinished,
    set_aside_after,
    set_random_state,
)
from .data.cache_identity import first_sample_hash
from .data.image_datasets import collate
from .data.loading import micro_batches, move_to_device
from .data.samplers import micro_batch_sizes, process_slice
from .disk_space import write_failures_named
from .interruption import (
    EXIT_CODES,
    Agreement,
    Interruption,
    SignalReceived,
    agree,
    end_all_on_error,
    until_signal,
)
from .metrics import CodeCounts, MetricGuard, MetricsFile, MetricWindow, Stopwatch, TrainingStoppedError
from .output_lock import FolderInUseError, lock_folder, unlock_folder
from .processes import build_accelerator, end_processes, prepare_model, seed_process
from .run_arguments import RunArguments, learning_rate_factor
from .run_checkpoints import RunCheckpoints
from .run_parts import RunParts
from .sample_generators import sample_generators
from .sharding import gather_model, set_gradient_exchange, shard_model, skeleton_of, unsharded, whole
from .trackers import start_tracker, track_images
from .weight_ema import WeightEMA


__all__ = ["RunArguments", "TrainingRun", "TrainingStoppedError"]

logger = logging.getLogger(__name__)

# Arguments that may differ between two starts of one run without a word.
_FREE_ARGUMENTS = ("resume_from_checkpoint", "output_dir", "report_to", "push_to_hub", "hub_model_id", "cpu")


class TrainingRun:
    """One training run, on one or several processes. See the module's docstring.

    Args:
        arguments (`RunArguments`): how it trains.
        find_unused_parameters (`bool`): for several processes, if some parameters get no gradient in some steps.

    Attributes:
        accelerator (`accelerate.Accelerator`): processes, device and precision.
        parts (`RunParts`): what is trained and saved; its `models`, `optimizers` and `emas` are the run's, too.
        global_step (`int`): optimizer steps done.
        is_finished (`bool`): the last step is done, now or in an earlier start of the same run.
        broken_images (`set[str]`): names of the images that were passed over.
    """

    def __init__(self, arguments: RunArguments, find_unused_parameters: bool = False):
        from accelerate.utils import set_seed

        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        self.accelerator = build_accelerator(arguments, find_unused_parameters)
        end_all_on_error()
        self._lock_output_dir()
        micro_batch_sizes(
            arguments.train_batch_size, arguments.gradient_accumulation_steps, self.accelerator.num_processes
        )
        set_seed(arguments.seed)

        self.parts = RunParts()
        self.models, self.optimizers, self.emas = self.parts.models, self.parts.optimizers, self.parts.emas
        self._prepared: list[nn.Module] = []
        self._checkpoints = RunCheckpoints(
            self.output_dir, self.accelerator, self.parts, arguments.checkpoints_total_limit
        )
        self._checkpoints.check_wanted(arguments.resume_from_checkpoint)
        self.global_step = 0
        self.samples_seen = 0
        self.is_finished = False
        self.broken_images: set[str] = set()
        self._peak_rates: dict[str, list[float]] = {}
        self._dataset_size: int | None = None
        self._first_sample: str | None = None  # its hash
        self._stream_state: dict | None = None
        self._saved_streams: list[dict] | None = None  # of all processes, in the last checkpoint
        self._validation: Callable[[], dict | None] | None = None
        self._started = False
        self._metrics_file = MetricsFile(self.output_dir / "metrics.jsonl")
        self._window = MetricWindow(self.device)
        self._code_counts = CodeCounts()
        self._positions = range(0)
        self._interruption = Interruption()
        self._validation_due = False
        self._last_save = time.monotonic()
        self._saved: Path | None = None  # the last checkpoint, and its step
        self._saved_step = -1
        self._guard = MetricGuard(arguments.min_codebook_perplexity, arguments.codebook_patience)
        self._progress_bar = None
        self._clock = Stopwatch()

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # What is trained

    def add_model(self, name: str, model: nn.Module, ema: bool = False, shard: bool = True) -> nn.Module:
        """Moves a model to the device and prepares it for precision and processes; returns what the loop calls.

        With `ema`, an average of its weights is kept if `ema_decay` is set. Parameters that are not trained must have
        `requires_grad=False` already. Where the run is sharded, so is a model that names its blocks in
        `_no_split_modules`, unless `shard` is false; the others are kept whole on every process. Make its optimizer
        afterwards.
        """
        self._check_new(name)
        if self.arguments.compile:
            model.compile()
        self.models[name] = model
        if self._is_to_be_sharded(name, model, shard):
            prepared = (
                model.to(self.device) if self.accelerator.num_processes > 1 else prepare_model(self.accelerator, model)
            )
            self.parts.skeletons[name] = skeleton_of(model)
            shard_model(model, self.device, self.arguments.mixed_precision)
        else:
            prepared = prepare_model(self.accelerator, model)
        self._prepared.append(prepared)
        if ema and self.arguments.ema_decay:
            self.emas[name] = WeightEMA(model, self.arguments.ema_decay)
        return prepared

    def _is_to_be_sharded(self, name: str, model: nn.Module, shard: bool) -> bool:
        if self.arguments.fsdp == "no":
            return False
        if not shard or not getattr(model, "_no_split_modules", None):
            self.accelerator.print(f"fsdp=full_shard: {name!r} is kept whole on every process.")
            return False
        return True

    def add_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Registers an optimizer. Its learning rates become the peaks of the schedule that the arguments name."""
        self._check_new(name)
        if self.parts.skeletons:
            known = {parameter for model in self.models.values() for parameter in model.parameters()}
            if any(parameter not in known for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    f"the optimizer {name!r} has parameters of no model of this run: make it after add_model()."
                )
        self.optimizers[name] = optimizer
        self._peak_rates[name] = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def add_state(self, name: str, state: Any):
        """Registers anything else with `state_dict()` and `load_state_dict()` that a resumed run needs."""
        self._check_new(name)
        self.parts.states[name] = state
        return state

    def on_validation(self, function: Callable[[], dict | None]) -> Callable[[], dict | None]:
        """Calls `function` every `validation_steps` and after the last step, on every process.

        It runs with the averaged weights, in eval mode, without gradients, and what it draws from the random
        generators does not change the training. The metrics that it returns on the main process, and its seconds, are
        written with the prefix `validation/`. A checkpoint that is due in the same step is written before. What takes
        long is a loop over `until_signal(batches)`.
        """
        self._validation = function
        return function

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module that was given to `add_model`."""
        return self.accelerator.unwrap_model(model)

    def ema_weights(self, name: str):
        """A context in which a model has its averaged weights (its own, if no average is kept)."""
        return self.emas[name].applied() if name in self.emas else ExitStack()

    @contextmanager
    def trained_model(self, name: str) -> Iterator[nn.Module | None]:
        """What is to be saved of a model: in eval mode, with its averaged weights. Entered by every process.

        It is the model itself; of a sharded one, an ordinary copy on the CPU on the main process, `None` on the
        others.
        """
        model = self.models[name]
        with self.ema_weights(name):
            found = gather_model(model, self.parts.skeletons[name]) if name in self.parts.skeletons else model
            yield None if found is None else found.eval()

    def _check_new(self, name: str) -> None:
        if self._started:
            raise ValueError(f"{name!r} is added after start(): add models, optimizers and states before it.")
        if name in self.parts:
            raise ValueError(f"the name {name!r} is taken: every model, optimizer and state needs its own.")

    # The loop

    def start(self) -> int:
        """Continues from a checkpoint as `resume_from_checkpoint` says, and returns the number of steps done."""
        if self.is_main_process:
            for name in remove_unfinished(self.output_dir):
                logger.warning("Removed %s, left by an interrupted write.", self.output_dir / name)
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoints.to_resume(self.arguments.resume_from_checkpoint)
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        else:
            seed_process(self.accelerator, self.arguments.seed)
        self.accelerator.wait_for_everyone()
        if self.is_main_process:
            self._metrics_file.truncate_after(self.global_step)
            for path in set_aside_after(self.output_dir, self.global_step):
                logger.warning("A checkpoint of a later step is kept as %s.", path)
        self._started = True
        self._set_learning_rates()
        self._clock.start()
        self._last_save = time.monotonic()
        self.is_finished = self._agree().reached_the_end
        if self.is_finished:
            self.accelerator.print(f"Already finished at step {self.global_step}, skipping ({self.output_dir}).")
        else:
            beginning = "Starting at" if checkpoint is None else f"Continuing from {checkpoint.name},"
            self.accelerator.print(f"{beginning} step {self.global_step} ({self.output_dir}).")
            start_tracker(self.accelerator, self.arguments, self.output_dir, self.global_step)
        is_missing = self._validation_due and not self._metrics_file.has_validation(self.global_step)
        self._validation_due = from_main_process(is_missing)
        if self._validation_due:
            self._interruption.install()  # the run was ended before it
            try:
                self._validate_or_end()
            finally:
                self._interruption.restore()
        return self.global_step

    def batches(self, dataset: Dataset, collate_fn: Callable = collate, shuffle: bool = True) -> Iterator:
        """This process's micro-batches, on its device, from the run's position in the data to the end of the run.

        Args:
            dataset: map-style (`len()` and, for an augmentation that depends on the epoch, `sample(index, epoch)`;
                else `dataset[index]`), or a `StreamingImageDataset`.
            collate_fn: makes a batch of a list of samples.
            shuffle: a new order in every epoch (a stream is always shuffled within its blocks).
        """
        if not self._started:
            raise ValueError("batches() before start(): start the run first, so that it knows where it stands.")
        if self.is_finished:
            return
        from tqdm.auto import tqdm

        self._check_dataset(dataset)
        arguments = self.arguments
        plan = {
            "batch_size": arguments.train_batch_size,
            "micro_batches": arguments.gradient_accumulation_steps,
            "process_index": self.accelerator.process_index,
            "num_processes": self.accelerator.num_processes,
        }
        if self._saved_streams is not None:
            self._stream_state = dataset.continued_state(
                self._saved_streams, plan["process_index"], plan["num_processes"]
            )
        loader = micro_batches(
            dataset,
            collate_fn,
            plan=plan,
            position=self.samples_seen,
            steps=arguments.max_train_steps - self.global_step,
            seed=arguments.seed,
            shuffle=shuffle,
            stream_state=self._stream_state,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self._progress_bar = tqdm(
            total=arguments.max_train_steps,
            initial=self.global_step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not self.is_main_process,
        )
        self._interruption.install()
        try:
            with self._progress_bar:
                for number, (batch, self._stream_state) in enumerate(loader):
                    self._positions = process_slice(self.samples_seen, **plan)[number % plan["micro_batches"]]
                    if isinstance(batch, dict):
                        self.broken_images.update(batch.pop("broken_images", ()))
                    yield move_to_device(batch, self.device)
                    if self.is_finished:
                        return
        finally:
            self._interruption.restore()

    def _check_dataset(self, dataset) -> None:
        size = len(dataset) if hasattr(dataset, "__len__") else None
        if self.global_step and size != self._dataset_size:
            raise ValueError(
                f"the data set has {size} samples, but {self._dataset_size} when the checkpoint was written: continue "
                "with the same data, or start afresh with resume_from_checkpoint=none."
            )
        self._dataset_size = size
        first = first_sample_hash(dataset) if self.is_main_process else None
        if first is not None and self._first_sample not in (None, first):
            logger.warning("The first sample is another than when the checkpoint was written: these are other data.")
        self._first_sample = first

    def accumulate(self, *models: nn.Module):
        """The context of one micro-batch: gradients are exchanged between processes only in the last of a step."""
        return self._accumulate(*models)

    @contextmanager
    def _accumulate(self, *models: nn.Module) -> Iterator[None]:
        with self.accelerator.accumulate(*models):
            for name in self.parts.skeletons:
                set_gradient_exchange(self.models[name], self.accelerator.sync_gradients)
            yield

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
        norm = whole(nn.utils.clip_grad_norm_(parameters, self.arguments.max_grad_norm or float("inf")))
        # After the exchange of gradients all processes hold the same norm, and so take the same branch.
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

    def log_codes(self, indices: torch.Tensor | tuple[torch.Tensor, ...], num_embeddings: int) -> None:
        """Counts the codes of one micro-batch, for the metric `codebook_perplexity`.

        The metric is the perplexity of the codes of a whole step, over its micro-batches and processes, so that it
        does not depend on their number; with several codebooks it is `codebook_perplexity_0`, `codebook_perplexity_1`,
        ….

        Args:
            indices: int `(B, h, w)`; a tuple of such for the levels of a hierarchy, `(B, h, w, depth)` for residuals.
            num_embeddings: codes of each codebook.
        """
        self._code_counts.add(indices, num_embeddings)

    def sample_generators(self) -> list[torch.Generator]:
        """A generator on the CPU for each sample of the present micro-batch, seeded by its position in the data.

        What they draw does not depend on the number of processes. Every call returns new ones, with the same seeds:
        call it once for a micro-batch.
        """
        return sample_generators(self.arguments.seed, self._positions)

    def finish_step(self) -> None:
        """Ends a micro-batch; after the last of a step: schedule, averages, metrics, guards, validation,
        checkpoint.
        """
        if not self.accelerator.sync_gradients:
            return
        arguments = self.arguments
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        for ema in self.emas.values():
            ema.update()
        self._window.add(self._code_counts.take())
        self.global_step += 1
        self.samples_seen += arguments.train_batch_size
        self._clock.samples += arguments.train_batch_size
        agreed = self._agree()
        self.is_finished = agreed.reached_the_end
        if self._progress_bar is not None:
            self._progress_bar.update()
        if self.global_step % arguments.logging_steps == 0 or self.is_finished:
            self._report()
        self._set_learning_rates()
        self._validation_due = self._validation is not None and (
            self.is_finished or self._is_due(arguments.validation_steps)
        )
        if agreed.signum:
            self._end_by(agreed.signum)
        # before the validation, which may take longer than is left to a run that is told to end
        if self.is_finished or agreed.save_is_due or self._is_due(arguments.checkpointing_steps):
            with self._clock.paused():
                self.save_checkpoint()
        if self._validation_due:
            self._validate_or_end()
        if self.is_finished and (signum := self._agree().signum):  # since the last step
            self._end_by(signum)
        if self.is_finished and self.global_step < arguments.max_train_steps and self.is_main_process:
            logger.warning(
                "max_train_minutes=%g ended the run after %d of max_train_steps=%d steps. The "
                "learning rate's schedule and "
                "the start of a discriminator count steps: choose max_train_steps so that the run ends with them.",
                arguments.max_train_minutes,
                self.global_step,
                arguments.max_train_steps,
            )

    def finish(self) -> None:
        """Closes the trackers and the process group, and gives the output folder free. Save the trained model
        before.
        """
        self._interruption.restore()
        end_processes(self.accelerator, self._prepared)
        unlock_folder(self.output_dir)

    def _lock_output_dir(self) -> None:
        error = None
        if self.is_main_process:
            try:
                lock_folder(self.output_dir)
            except (FolderInUseError, OSError) as caught:
                error = caught
        error = from_main_process(error)
        if error is not None:
            raise error

    def _end_by(self, signum: int) -> None:
        """Saves a checkpoint, if that of this step is not there, and ends the program, as a signal has asked for."""
        path = self._saved if self._saved_step == self.global_step else self.save_checkpoint()
        name = signal.Signals(signum).name
        self.accelerator.print(
            f"\n{name}: ended at step {self.global_step}, saved in {path}; start again to continue."
        )
        self.finish()
        raise SystemExit(EXIT_CODES[signum])

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.global_step % interval == 0

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.arguments, self.global_step)
        for name, optimizer in self.optimizers.items():
            for group, peak in zip(optimizer.param_groups, self._peak_rates[name], strict=True):
                group["lr"] = peak * factor

    def _agree(self) -> Agreement:
        arguments = self.arguments
        minutes = arguments.max_train_minutes
        time_is_up = minutes is not None and self._clock.elapsed() >= 60 * minutes
        minutes = arguments.checkpointing_minutes
        save_is_due = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        is_last = self.global_step >= arguments.max_train_steps
        return agree(self._interruption.signum, is_last, time_is_up, save_is_due)

    # Metrics

    def _report(self) -> None:
        row = {"step": self.global_step}
        if self._dataset_size:
            row["epoch"] = self.samples_seen / self._dataset_size
        row.update({f"learning_rate/{name}": opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()})
        row.update(self._window.take(lambda sums: self.accelerator.reduce(sums, "sum")))
        row["images_per_second"] = self._clock.take_speed()
        row["seconds"] = self._clock.elapsed()
        self.broken_images = union_over_processes(self.broken_images)
        row["broken_images"] = len(self.broken_images)
        self._write_row(row)
        if self._progress_bar is not None:
            shown = {name: f"{value:.4g}" for name, value in row.items() if "loss" in name or "perplexity" in name}
            self._progress_bar.set_postfix(shown, refresh=False)
        reason = self._guard.check(row)
        if reason is not None:
            self._stop(reason)

    def until_signal(self, batches: Iterable) -> Iterator:
        """Passes on the batches of a validation; a signal to any process ends it, as it does a step.

        Each process gives its own; their numbers may differ.
        """
        return until_signal(batches, self._interruption)

    def _validate_or_end(self) -> None:
        """Validates; where a signal ends that, the run ends too, and makes up for it when it is continued."""
        try:
            self._validate()
        except SignalReceived as ended:
            self._end_by(ended.signum)

    def _validate(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._clock.paused())
            stack.enter_context(preserved_random_state())
            stack.enter_context(torch.no_grad())
            for name, model in self.models.items():
                stack.enter_context(self.ema_weights(name))
                if name in self.parts.skeletons:
                    stack.enter_context(unsharded(model))
                stack.enter_context(evaluation_mode(model))
            start = time.perf_counter()
            metrics = {**(self._validation() or {}), "seconds": time.perf_counter() - start}
        self._validation_due = False
        row = {f"validation/{name}": float(value) for name, value in metrics.items()}
        self._write_row({"step": self.global_step, **row})

    def log_images(self, name: str, images: torch.Tensor, columns: int | None = None) -> None:
        """Writes a grid of `images` `(N, 3, H, W)` in [-1, 1] to `output_dir/pictures`, and to the tracker."""
        if self.is_main_process:
            folder = self.output_dir / "pictures"
            with self._writing(folder, "a picture", images.numel()):
                track_images(self.accelerator, folder, name, images, self.global_step, columns)

    def _write_row(self, row: dict) -> None:
        if not self.is_main_process or len(row) < 2:
            return
        with self._writing(self._metrics_file.path, "a row of metrics", len(json.dumps(row))):
            self._metrics_file.append(row)
        with self._writing(self.output_dir / "logs", "what the tracker keeps", len(json.dumps(row))):
            self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def _writing(self, path: Path, what: str, num_bytes: int):
        return write_failures_named(path, what, num_bytes, last_good_checkpoint(self.output_dir))

    def _stop(self, reason: str) -> None:
        """Saves the state for inspection, under a name that is never resumed unasked, and raises."""
        failed = self.save_checkpoint(self.output_dir / f"checkpoint-{self.global_step}-failed")
        raise TrainingStoppedError(
            f"Training stopped: {reason}. The state is saved in {failed}; {last_good_checkpoint(self.output_dir)}. "
            "A lower learning_rate, a longer "
            "warm-up or another seed may help."
        )

    # Checkpoints

    def save_checkpoint(self, path: str | Path | None = None) -> Path:
        """Writes `output_dir/checkpoint-<step>`, which appears complete or not at all.

        Called by every process; all of them, on all machines, must see the same `output_dir`.
        """
        path = Path(path) if path is not None else self.output_dir / f"checkpoint-{self.global_step}"
        self.broken_images = union_over_processes(self.broken_images)
        if self._stream_state is not None:
            self._saved_streams = gathered(self._stream_state)
        self.parts.scaler = self.accelerator.scaler
        own = {"random": get_random_state(), "window": self._window.state_dict()}
        self._checkpoints.save(path, self._position(), own)
        self._last_save = time.monotonic()
        self._saved, self._saved_step = path, self.global_step
        return path

    def _position(self) -> dict:
        return {
            "step": self.global_step,
            "samples_seen": self.samples_seen,
            "dataset_size": self._dataset_size,
            "first_sample": self._first_sample,
            "streams": self._saved_streams,
            "seconds": self._clock.elapsed(),
            "validation_due": self._validation_due,
            "low_perplexity_rows": self._guard.low_rows,
            "broken_images": sorted(self.broken_images),
            "num_processes": self.accelerator.num_processes,
            "arguments": asdict(self.arguments),
        }

    def _load_checkpoint(self, path: Path) -> None:
        self.parts.scaler = self.accelerator.scaler
        position, own = self._checkpoints.load(path)
        self.global_step = position["step"]
        self.samples_seen = position["samples_seen"]
        self._dataset_size = position["dataset_size"]
        self._first_sample = position.get("first_sample")
        self._saved_streams = position["streams"]
        self._clock.seconds_before = position["seconds"]
        self._validation_due = position["validation_due"]
        self._guard.low_rows = position["low_perplexity_rows"]
        self.broken_images = set(position["broken_images"])
        for name, value in asdict(self.arguments).items():
            before = position["arguments"].get(name, value)
            if before != value and name not in _FREE_ARGUMENTS and self.is_main_process:
                logger.warning("Continuing with %s=%r; the checkpoint was written with %r.", name, value, before)
        if own is not None:
            set_random_state(own["random"])
            self._window.load_state_dict(own["window"])
            return
        seed_process(self.accelerator, self.arguments.seed + 1000 * self.global_step)
        if self.is_main_process:
            logger.warning(
                "The checkpoint was written by %d processes and is continued by %d: the data go on where they were, "
                "but what the model draws at random (dropout) differs from an unbroken run.",
                position["num_processes"],
                self.accelerator.num_processes,
            )
