"""The checkpoints of one run: all processes write one, or none does, and the newest that is whole is continued."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ..distributed import from_main_process, gathered
from .checkpointing import (
    draft_folder,
    draft_path,
    find_checkpoints,
    find_damage,
    last_good_checkpoint,
    publish_folder,
    rotate_checkpoints,
    write_manifest,
)
from .disk_space import write_failure
from .run_parts import RunParts


if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints in the output folder of a run. Every method is called by every process.

    Args:
        output_dir (`Path`): seen by all processes, on all machines.
        accelerator (`accelerate.Accelerator`): the processes.
        parts (`RunParts`): what is saved.
        total_limit (`int`, *optional*): how many checkpoints are kept.
    """

    def __init__(self, output_dir: Path, accelerator: "Accelerator", parts: RunParts, total_limit: int | None):
        self.output_dir = output_dir
        self.accelerator = accelerator
        self.parts = parts
        self.total_limit = total_limit

    def save(self, path: Path, position: dict, own: dict) -> None:
        """Writes the checkpoint `path`, which appears complete or not at all.

        Args:
            position: where the run stands, for JSON; that of the main process is written.
            own: what belongs to this process alone.

        Raises:
            OSError: on all processes, where one of them cannot write; the draft is removed.
        """
        draft = draft_path(path)
        self._on_all_or_none(lambda: self._open_draft(path), path)
        self._on_all_or_none(lambda: self._write(draft, position, own), path)
        self._on_all_or_none(lambda: self._publish(draft, path), path)

    def check_wanted(self, wanted: str) -> None:
        """A ValueError where `resume_from_checkpoint` names no folder, for the start of a run."""
        if wanted not in ("none", "latest") and not Path(wanted).is_dir():
            raise ValueError(
                f'`resume_from_checkpoint` must be "latest", "none" or a checkpoint folder, got {wanted!r}.'
            )

    def to_resume(self, wanted: str) -> Path | None:
        """The checkpoint that `resume_from_checkpoint` means; `None`: start afresh."""
        if wanted == "none":
            return None
        if wanted == "latest":
            path, damage = from_main_process(
                self._newest_whole_checkpoint() if self.accelerator.is_main_process else None
            )
            if path is None and damage:
                raise ValueError(
                    f"every checkpoint in {self.output_dir} is damaged ({damage[0]}): mend it, or start afresh with "
                    "resume_from_checkpoint=none."
                )
            return path
        self.check_wanted(wanted)
        damage = None
        if self.accelerator.is_main_process:
            damage = find_damage(Path(wanted)) or _find_other(Path(wanted))
        damage = from_main_process(damage)
        if damage is not None:
            raise ValueError(f"`resume_from_checkpoint` must be a whole checkpoint, got {wanted!r}: {damage}.")
        return Path(wanted)

    def load(self, path: Path) -> tuple[dict, dict | None]:
        """Gives the parts their states; returns the position, and what is this process's own if as many wrote it."""
        self.parts.load(path)
        position = json.loads((path / "run.json").read_text())
        if position["num_processes"] != self.accelerator.num_processes:
            return position, None
        own_file = path / f"process-{self.accelerator.process_index}.pt"
        own = torch.load(own_file, map_location="cpu", weights_only=True)
        for name, buffers in own["buffers"].items():
            self.parts.models[name].load_state_dict(buffers, strict=False)
        return position, own

    def _open_draft(self, path: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        needed, free = self.parts.num_bytes(), shutil.disk_usage(self.output_dir).free
        if needed > free:
            raise OSError(errno.ENOSPC, "the disk is too full")
        draft_folder(path)

    def _write(self, draft: Path, position: dict, own: dict) -> None:
        is_main_process = self.accelerator.is_main_process
        own = {**own, "buffers": {} if is_main_process else self.parts.own_buffers()}  # the main one's: in its models
        torch.save(own, draft / f"process-{self.accelerator.process_index}.pt")
        self.parts.save(draft, is_main_process)
        if is_main_process:
            (draft / "run.json").write_text(json.dumps(position, indent=1))

    def _publish(self, draft: Path, path: Path) -> None:
        if self.accelerator.is_main_process:
            write_manifest(draft)
            publish_folder(draft, path)
            rotate_checkpoints(self.output_dir, self.total_limit)

    def _on_all_or_none(self, write: Callable[[], None], path: Path) -> None:
        """Calls `write` on every process; where one fails, the draft is removed and all raise its error."""
        reason, cause = None, None
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises a RuntimeError
            reason, cause = f"{type(error).__name__}: {error}", error
        reasons = [text for text in gathered(reason) if text is not None]
        if not reasons:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(draft_path(path), ignore_errors=True)
        rest = last_good_checkpoint(path.parent)
        raise write_failure(path, "the checkpoint", reasons[0], self.parts.num_bytes(), rest) from cause

    def _newest_whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is not damaged, and what is wrong with the later ones."""
        damages = []
        for step, path in reversed(find_checkpoints(self.output_dir).items()):
            damage = find_damage(path) or _find_other(path, step)
            if damage is None:
                if damages:
                    logger.warning("Continuing from %s, the last checkpoint that is whole.", path)
                return path, damages
            logger.warning("A checkpoint is damaged and passed over: %s.", damage)
            damages.append(damage)
        return None, damages


def _find_other(path: Path, step: int | None = None) -> str | None:
    """What is wrong with a folder of whole files that is no checkpoint, or has another's name."""
    try:
        found = json.loads((path / "run.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} holds no run.json with a step"
    return None if step in (None, found) else f"{path} holds step {found}"


__all__ = ["RunCheckpoints"]
