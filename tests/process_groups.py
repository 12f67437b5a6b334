"""A function in several real processes: forks of this one, joined by gloo."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


SECONDS = 240  # a busy machine may need that long for what takes one
_SINGLETONS = ("AcceleratorState", "GradientState")


def in_processes(count: int, folder: Path, function: Callable, *arguments) -> list:
    """What `function(*arguments)` returns in each of `count` processes, by rank; each may read its rank from torch.

    Raises:
        AssertionError: a process raised, or did not end in time: with what each of its threads does.
    """
    context = multiprocessing.get_context("fork")
    rendezvous = folder / f"rendezvous-{len(list(folder.iterdir()))}"
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, folder, rendezvous, pipe[1], function, arguments))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = []
    try:
        for receiver, _ in pipes:
            assert receiver.poll(SECONDS), _where_they_are(processes, folder)
            value, error = pickle.loads(receiver.recv_bytes())
            assert error is None, error
            results.append(value)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results


def _where_they_are(processes: list, folder: Path) -> str:
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        os.kill(process.pid, signal.SIGUSR2)
    time.sleep(1)
    stacks = [f"{process.name}\n{_stacks_of(folder, process.pid).read_text()}" for process in alive]
    return "\n\n".join([f"no answer in {SECONDS} seconds", *stacks])


def _stacks_of(folder: Path, pid: int) -> Path:
    return folder / f"stacks-{pid}.txt"


def _run(rank: int, count: int, folder: Path, rendezvous: Path, pipe, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2, _stacks_of(folder, os.getpid()).open("w"))
    if "accelerate" in sys.modules:  # its singletons know the parent's one process
        AcceleratorState, GradientState = (getattr(sys.modules["accelerate.state"], name) for name in _SINGLETONS)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")  # for who asks; the processes meet in a file
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
        dist.barrier()  # whoever leaves while another still connects takes that one down
        pipe.send_bytes(pickle.dumps((function(*arguments), None)))  # `send` shares a tensor's memory
        if dist.is_initialized():  # a command ends the group itself
            dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
