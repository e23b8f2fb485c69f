"""What a run takes at the server: seconds of aggregation, and memory."""

import re
import threading
import time
from pathlib import Path
from typing import Any

from fedmerge.memory import read

_going: list["Costs"] = []  # several runs may go on in one process
_lock = threading.Lock()


class Costs:
    """A clock that runs while the server aggregates, and the most memory that its process held meanwhile.

    Attributes:
        seconds: Of alignment, merging, repair and retraining, without evaluations and controls.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        self._peak: int | None = 0

    def begin(self) -> None:
        """From here on, memory is watched."""
        with _lock:
            _note()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
            except OSError:
                self._peak = None
            _going.append(self)

    def resume(self) -> None:
        """The server aggregates, from now on."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """It does something else, or waits."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def end(self) -> dict[str, Any]:
        """``server_seconds``, and ``peak_memory``: resident bytes of the process, None where the system says none."""
        self.pause()
        with _lock:
            _note()
            _going.remove(self)
        return {"server_seconds": round(self.seconds, 3), "peak_memory": self._peak or None}


def _note() -> None:
    """Keep the high-water mark for all that go on, before it is lost."""
    found = re.search(r"VmHWM:\s*(\d+) kB", read(Path("/proc/self/status")))
    for costs in _going:
        if costs._peak is not None and found:
            costs._peak = max(costs._peak, 1024 * int(found[1]))
