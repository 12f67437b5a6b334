"""Full disks, crashes while saving, and damaged checkpoints."""

import errno
import logging
import resource
import shutil
import signal

import pytest
import torch
from safetensors import SafetensorError

from hf_vq import VQVAEConfig, VQVAEModel
from hf_vq.training import run_parts
from hf_vq.training.checkpointing import find_checkpoints, remove_unfinished, write_manifest
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run import RunArguments, TrainingRun
from hf_vq.training.sharing import save_trained
from tests.training.toy_run import Interrupted, assert_same_weights, rows, train, weights


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
    "a list of no file": lambda folder: (folder / "files.json").write_text("{}"),
    "a folder in place of the list": lambda folder: [
        (folder / "files.json").unlink(),
        (folder / "files.json").mkdir(),
    ],
    "a folder in place of a file": lambda folder: [(folder / "run.json").unlink(), (folder / "run.json").mkdir()],
    "no list of files": lambda folder: (folder / "files.json").unlink(),
    "whole files of no checkpoint": lambda folder: [(folder / "run.json").unlink(), write_manifest(folder)],
    "another checkpoint": lambda folder: [
        shutil.rmtree(folder),
        shutil.copytree(folder.parent / "checkpoint-9", folder),
    ],
    "a missing file": lambda folder: (folder / "process-0.pt").unlink(),
    "one bit": lambda folder: flip_a_bit(folder / "model-ema.pt"),
}


def put_a_folder(path):
    path.unlink()
    path.mkdir()


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
    if damage == "another checkpoint":  # a good one
        return
    with pytest.raises(ValueError, match="resume_from_checkpoint.*must be a whole checkpoint"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-10-superseded-1"))


def test_no_whole_checkpoint_is_an_error(tmp_path):
    train(tmp_path, max_train_steps=3)
    DAMAGES["one bit"](tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged .*model-ema.pt.*start afresh"):
        train(tmp_path)
    assert train(tmp_path, resume_from_checkpoint="none", max_train_steps=2).global_step == 2


@pytest.mark.parametrize("what", ["a file", "a link to nothing", "a link to a folder"])
def test_what_stands_in_the_place_of_a_checkpoint_is_replaced(unbroken, tmp_path, what):
    place, kept = tmp_path / "run" / "checkpoint-3", tmp_path / "kept"
    place.parent.mkdir()
    kept.mkdir()
    (kept / "mine").write_text("mine")
    if what == "a file":
        place.write_text("no checkpoint")
    else:
        place.symlink_to(kept if what == "a link to a folder" else tmp_path / "nowhere")
    train(place.parent, resume_from_checkpoint="none")
    assert list(find_checkpoints(place.parent)) == [9, 10] and (kept / "mine").read_text() == "mine"
    assert rows(place.parent, validation=True) == unbroken[0]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_stays(unbroken, tmp_path, monkeypatch, caplog):
    """Such as one with a file that somebody reads, on a network's disk."""
    remove = shutil.rmtree

    def refuse(path, *arguments, **options):
        if "checkpoint-3" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, *arguments, **options)

    monkeypatch.setattr("shutil.rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
        assert "checkpoint-3 cannot be removed: " in caplog.text
        assert list(find_checkpoints(tmp_path)) == [9, 10] and rows(tmp_path, validation=True) == unbroken[0]
        train(tmp_path, max_train_steps=11)
    assert ".unfinished-removed-checkpoint-3, left by an interrupted write, cannot be removed" in caplog.text
    monkeypatch.undo()
    assert remove_unfinished(tmp_path) == [".unfinished-removed-checkpoint-3"]


def test_other_data_of_the_same_size_are_named(tmp_path, caplog):
    train(tmp_path, max_train_steps=3)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, max_train_steps=4)
        assert "these are other data" not in caplog.text
        train(tmp_path, max_train_steps=5, first_colour=70)
    assert "The first sample is another than when the checkpoint was written" in caplog.text


def test_what_is_no_row_of_metrics_is_dropped(unbroken, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, interrupt_at=7)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"3\n{}\n[]\n\xff\xfe\n" + file.read_bytes() + b'{"step": null}\n{"step": 7, "lo')
    train(tmp_path)
    assert rows(tmp_path, validation=True) == unbroken[0]
