"""Work that goes on beside the target's first pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Beside:
    """A function that runs in a thread, on a GPU on a stream of its own, until its result is asked for.

    Args:
        work: called once, without gradients, under the caller's autocast.
        device: where it computes.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device):
        self.work, self.device = work, device
        kind = device.type
        self.autocast = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self.stream: Any = None
        if kind == "cuda":
            self.stream = torch.cuda.Stream(device)
            # What it reads was written by the caller's stream.
            self.stream.wait_stream(torch.cuda.current_stream(device))
        executor = ThreadPoolExecutor(1, thread_name_prefix="specfuse-draft")
        self._future = executor.submit(self._run)
        executor.shutdown(wait=False)

    def result(self) -> Any:
        """What the work returned, once it is done; raises what it raised."""
        found = self._future.result()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return found

    def _run(self) -> Any:
        with torch.no_grad(), self.autocast:
            if self.stream is None:
                return self.work()
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                return self.work()
