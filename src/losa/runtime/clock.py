"""When tokens come: what `losa bench` and `losa generate` take their speeds from."""

import time
from itertools import pairwise
from statistics import median

import torch


class Clock:
    """A streamer that notes when `generate` hands over the prompt and then every token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[2] - self.times[0]

    @property
    def rate(self) -> float:
        """Tokens per second after the first, by the median token: now and then one pays for a graph that is recorded anew."""
        return 1 / median(after - before for before, after in pairwise(self.times[2:]))
