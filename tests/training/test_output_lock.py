import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
from contextlib import contextmanager

import pytest

from hf_vq.training import output_lock
from hf_vq.training.data.cache_identity import cache_lock
from hf_vq.training.output_lock import FolderInUseError, lock_folder, unlock_folder


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    for path in list(output_lock._held):
        unlock_folder(path.parent)


def lock_in_another_process(folder):
    """What it raised, in words; empty if it has got the lock."""

    def run(sender):
        output_lock._held.clear()  # of its parent
        try:
            lock_folder(folder)
            sender.send("")
        except FolderInUseError as error:
            sender.send(str(error))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)
    folder.mkdir()
    lock_folder(link)
    lock_folder(folder)  # once more in the same process
    for path in (folder, link):
        refused = lock_in_another_process(path)
        assert (
            f"another run writes here: {path} is locked by process {os.getpid()} on {socket.gethostname()}" in refused
        )
    unlock_folder(folder)
    assert lock_in_another_process(folder) == ""
    lock_folder(folder)  # the other is gone


def test_the_lock_of_another_machine_is_named(tmp_path, monkeypatch, caplog):
    """Of one that was killed, or whose lock does not reach here: the file system may not say which."""
    (tmp_path / ".lock").write_text(json.dumps({"process": 17, "host": "other"}))
    with caplog.at_level(logging.WARNING):
        lock_folder(tmp_path)
    assert f"{tmp_path} was last locked by process 17 on other, which has not released it" in caplog.text
    caplog.clear()
    unlock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == ""
    monkeypatch.setattr(socket, "gethostname", lambda: "a third")
    with caplog.at_level(logging.WARNING):
        lock_folder(tmp_path)
    assert not caplog.text and json.loads((tmp_path / ".lock").read_text())["host"] == "a third"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": 3}', "null"])
def test_any_content_of_the_lock_is_taken(tmp_path, caplog, content):
    (tmp_path / ".lock").write_text(content)
    lock_folder(tmp_path)
    assert not caplog.text and json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog, number):
    def refuse(*arguments):
        raise OSError(number, "No locks")

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING):
        lock_folder(tmp_path)
    assert f"{tmp_path} cannot be locked" in caplog.text and "one run alone writes there" in caplog.text
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning) if number == errno.ENOSYS else nothing():
        with cache_lock(tmp_path / "codes", is_writer=True):
            pass
    assert number == errno.ENOSYS or f"{tmp_path / 'codes'} cannot be locked" in caplog.text


@contextmanager
def nothing():
    yield


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="`output_dir` must be a folder, got a file.*file'"):
        lock_folder(tmp_path / "file")
    with pytest.raises(OSError, match=r"the lock of the folder .*file/run could not be written \(NotADirectoryError"):
        lock_folder(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine" and not output_lock._held


def test_a_disk_that_is_full_when_the_lock_is_written_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match=r"the lock of the folder .* could not be written \(OSError.* are free"):
            lock_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not output_lock._held
    lock_folder(tmp_path)
