"""Ctrl-C and SIGTERM, so that a run can save first."""

import _thread
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from jax.experimental import multihost_utils

from examples.trainer.cluster import processes

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class StopRequest:
    """Notes Ctrl-C and SIGTERM, so that the loop can save first; a second Ctrl-C stops at once.

    Among several processes a signal to any of them stops all, after the same step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._looks = 0
        self._several = processes.several()
        self._before: dict[int, Any] = {}
        # Among several, SIGTERM is caught by jax, which tells the others.
        handlers = {signal.SIGINT: self._pass_on} if self._several else {}
        handlers = handlers or {signal.SIGINT: self._note, signal.SIGTERM: self._note}
        for number, handler in handlers.items():
            try:
                self._before[number] = signal.signal(number, handler)
            except ValueError:  # not in the main thread: signals are somebody else's
                return

    def requested(self) -> bool:
        """Whether to stop now; every process must ask equally often."""
        if self._several and not self._noted:
            self._looks += 1
            self._noted = multihost_utils.reached_preemption_sync_point(self._looks)
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def forget(unraisable: "UnraisableHookArgs") -> None:
    """A ``sys.unraisablehook`` that tells nothing, and loses no Ctrl-C.

    After compiling, the first Python code is often jax's callback for the garbage collector, and
    what is raised there ends nothing.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Thread(target=_interrupt_again, daemon=True).start()


def _interrupt_again() -> None:
    """As soon as the main thread is out of ``forget``, where it would be lost again."""
    while True:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code is not forget.__code__:
            frame = frame.f_back
        if frame is None:
            return _thread.interrupt_main()
        time.sleep(0.001)
