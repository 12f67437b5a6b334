"""What ends a run from outside: signals, and an error in one of several processes."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType

from ..distributed import is_distributed, is_main_process, maxima_over_processes


logger = logging.getLogger(__name__)

# How a run exits that a signal has ended: as a shell reports the signal, or, for what a cluster sends before it takes
# the machine away, as a success, so that the job may be queued again.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
REPEAT_SECONDS = 2.0  # a launcher passes on what the terminal, or the cluster, has sent to every process already
CONSEQUENCE_SECONDS = 5.0  # in which a launcher finds the process that failed first


class Interruption:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 has come, for the run to end after its step.

    A second signal, at least two seconds later, ends the process at once.

    Attributes:
        signum (`int`): of the signal, 0 while there is none.
    """

    def __init__(self):
        self.signum = 0
        self._time = 0.0
        self._process = 0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Takes the signals, in the main thread; elsewhere Python has none to take."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._before = {number: signal.signal(number, self._receive) for number in EXIT_CODES}

    def restore(self) -> None:
        """Gives the signals back to what handled them before."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._process:  # a worker that reads data: the run ends it, unless it is told to end
            if signum == signal.SIGTERM:
                os._exit(EXIT_CODES[signum])
        elif self.signum and now - self._time >= REPEAT_SECONDS:
            self.restore()
            if signal.getsignal(signum) == signal.SIG_IGN:  # SIGINT of a command that a shell runs in the background
                signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif not self.signum:
            self.signum, self._time = signum, now


class SignalReceived(Exception):
    """A signal came to some process: `signum`, on all of them."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def until_signal(batches: Iterable, interruption: Interruption) -> Iterator:
    """Passes on batches, of which each process gives its own, in any number.

    Raises:
        SignalReceived: on all processes, before the next batch of the longest.
    """
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        signum, are_left = maxima_over_processes((interruption.signum, batch is not None))
        if signum:
            raise SignalReceived(signum)
        if not are_left:
            return
        if batch is not None:
            yield batch


@dataclass(frozen=True)
class Agreement:
    """What all processes do after a step: end by the signal `signum` (0: none), or at the end of the run, or save."""

    signum: int
    reached_the_end: bool
    save_is_due: bool


def agree(signum: int, is_last_step: bool, time_is_up: bool, save_is_due: bool) -> Agreement:
    """One agreement of all processes, though a signal may reach only one of them; the main process's clock counts."""
    own = (signum, *((time_is_up, save_is_due) if is_main_process() else (False, False)))
    signum, time_is_up, save_is_due = maxima_over_processes(own)
    return Agreement(signum, is_last_step or bool(time_is_up), bool(save_is_due))


def end_all_on_error() -> None:
    """Lets an uncaught error of this process end a distributed run at once, its message last on the screen.

    The error is given to the launcher (torchrun, accelerate launch), which ends the other processes and prints it. A
    process that only lost the connection to a failed one waits for the launcher, so that it is not taken for the
    cause.
    """
    if not is_distributed() or sys.excepthook is _report_and_exit:
        return
    sys.excepthook = _report_and_exit


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)
    if _is_consequence(error):
        time.sleep(CONSEQUENCE_SECONDS)
    traceback.print_exception(kind, error, trace)
    try:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        # the handler formats the exception that is being handled
        try:
            raise error.with_traceback(trace)
        except BaseException as raised:
            get_error_handler().record_exception(raised)
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)  # without waiting for the processes that the error has cut off


def _is_consequence(error: BaseException) -> bool:
    """Whether it says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("connection closed", "connection reset", "gloo", "nccl", "broken pipe")
    )


__all__ = ["EXIT_CODES", "Agreement", "Interruption", "SignalReceived", "agree", "end_all_on_error", "until_signal"]
