"""TensorBoard's event files, without torch."""

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from luffy.loggers.sink import Opening


class TensorBoard:
    appends = True
    last = -1

    def __init__(self, opening: Opening) -> None:
        self._writer = EventFileWriter(str(opening.folder))

    def write(self, step: int, numbers: dict[str, float], at: float) -> None:
        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        self._writer.add_event(Event(wall_time=at, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
