"""Handles Ctrl-C and SIGTERM, so that a run can save first."""

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
    """Remembers Ctrl-C and SIGTERM, so that the loop can save; a second Ctrl-C stops immediately.

    If several processes train, a signal to any of them stops all of them after the same step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._looks = 0
        self._several = processes.several()
        self._before: dict[int, Any] = {}
        # With several processes, jax itself catches SIGTERM and informs the others.
        handlers = {signal.SIGINT: self._pass_on} if self._several else {}
        handlers = handlers or {signal.SIGINT: self._note, signal.SIGTERM: self._note}
        for number, handler in handlers.items():
            try:
                self._before[number] = signal.signal(number, handler)
            except ValueError:  # only the main thread can handle signals
                return

    def requested(self) -> bool:
        """Whether to stop now; all processes must call this equally often."""
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

    def uninstall(self) -> None:
        """Restores the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def forget(unraisable: "UnraisableHookArgs") -> None:
    """A ``sys.unraisablehook`` that prints nothing and does not lose a Ctrl-C.

    After a compilation the first Python code that runs is often jax's callback for the garbage
    collector, and Python ignores exceptions that are raised there.
    """
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Thread(target=_interrupt_again, daemon=True).start()


def _interrupt_again() -> None:
    """Waits until the main thread has left ``forget``, where the signal would be lost again."""
    while True:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code is not forget.__code__:
            frame = frame.f_back
        if frame is None:
            return _thread.interrupt_main()
        time.sleep(0.001)
