"""What a run takes at the server: seconds of aggregation, and memory."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from fedmerge.memory import read


@dataclass(frozen=True)
class Costs:
    """What a run took at the server, as ``env.json`` says it.

    Attributes:
        device: Where the server computed, ``"cpu"`` or ``"cuda"``.
        server_seconds: Of alignment, merging, repair and retraining, without evaluations and controls.
        peak_memory: The most resident bytes of the process, None where the system says none.
    """

    device: str
    server_seconds: float
    peak_memory: int | None = None


class Clock:
    """Runs while the server aggregates, and watches the most memory that its process holds until the end.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        self._watched = True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
        except OSError:
            self._watched = False

    def resume(self) -> None:
        """The server aggregates, from now on."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """It does something else, or waits."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def end(self, device: str) -> Costs:
        """What was taken on ``device``."""
        self.pause()
        peak = re.search(r"VmHWM:\s*(\d+) kB", read(Path("/proc/self/status"))) if self._watched else None
        return Costs(device, round(self.seconds, 3), 1024 * int(peak[1]) if peak else None)
