"""Scalars for TensorBoard, written at once.

tensorboardX's SummaryWriter writes in a thread: on a full disk the thread dies, and training waits
forever for it to take the next value.
"""

import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # made at run time
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)


class Board:
    """A file of events in ``folder``. Those of an earlier run after ``last`` are not shown."""

    def __init__(self, folder: Path, last: int):
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=last + 1, session_log=start))
        self._events.flush()

    def write(self, scalars: dict[str, float], step: int) -> None:
        """OSError where they cannot be written."""
        now = time.time()
        for name, value in scalars.items():
            content = summary.scalar(name, value)
            self._events.write_event(Event(wall_time=now, step=step, summary=content))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
