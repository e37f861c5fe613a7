"""Work of one stream that is finished on another, where the framework does not know of it."""

from contextlib import contextmanager

from .. import checks, cuda_driver
from ..launch import current_stream, is_cuda, make_current


class Handover:
    """From the stream that is current where ``like`` is, behind all that has been queued there so far."""

    def __init__(self, like):
        self._like, self._event = like, None
        if not checks.is_cpu(like) and is_cuda(like):
            make_current(like)
            self._stream, self._event = current_stream(like), cuda_driver.Event()
            self._event.record(self._stream)

    @contextmanager
    def here(self):
        """Run the block on the stream that is current now, behind what the first one had to do, and the first one goes
        on behind the block: Paddle hands out its memory there again without asking who still reads it."""
        stream = None if self._event is None else current_stream(self._like)
        if stream is None or stream == self._stream:
            yield
            return
        self._event.wait(stream)
        try:
            yield
        finally:
            self._event.record(stream)
            self._event.wait(self._stream)
