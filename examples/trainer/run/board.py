"""Scalars for TensorBoard, written immediately.

tensorboardX's SummaryWriter writes in a thread. On a full disk that thread dies, and training waits
forever for it to take the next value.
"""

import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # generated at run time
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)


class Board:
    """A file of events in ``folder``; hides older events after step ``last``."""

    def __init__(self, folder: Path, last: int):
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=last + 1, session_log=start))
        self._events.flush()

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Writes the scalars of one step; OSError if that fails."""
        now = time.time()
        for name, value in scalars.items():
            content = summary.scalar(name, value)
            self._events.write_event(Event(wall_time=now, step=step, summary=content))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
