"""Tells a store's samples which shards come next, from the first step on and across epochs.

The order is known for all time (`alexprep.pipeline.sampler`), so what will be needed is fetched before it is, and nothing else is.
"""

from __future__ import annotations

from collections import Counter, deque

from alexprep.pipeline.sampler import StepPlan
from alexprep.shards.sample_reader import TarSamples


class ReadAhead:
    """Keeps the shards of the coming steps on their way, as many as may be held in memory.

    Those of the step that is reached come first, then those of the steps behind it, until `held` shards are wanted; a shard is let go when no
    step in sight needs it. In the orders "blocks" and "streams" the next blocks are fetched while some are read.
    """

    def __init__(self, samples: TarSamples, plan: StepPlan, held: int, *, onwards: bool) -> None:
        """`held` is how many shards may be in memory; `onwards`, whether one epoch follows another without a pause."""
        self._samples, self._plan, self._onwards = samples, plan, onwards
        self._held = min(held, int(samples.index["shard"].max(initial=0)) + 1)
        self._forget()

    def _forget(self) -> None:
        self._sight: deque[tuple[int, ...]] = deque()  # the shards of each step from the one that is reached on
        # How many of these steps need a shard; in the order of the first need.
        self._steps_with: Counter[int] = Counter()
        self._reached: tuple[int, int] | None = None
        self._together = 0  # steps from there on that are read at once,
        self._following: tuple[int, int] | None = None  # and the one behind them
        self._next = (0, 0)  # the first step out of sight

    def reach(self, epoch: int, step: int, together: int = 1) -> None:
        """Says that the samples of a step are about to be read, or of several steps `together`. Nothing is done for shards on a disk."""
        if not self._samples.remote or self._reached == (epoch, step):
            return
        before = self._steps_with.keys() | set()
        if self._following == (epoch, step):
            for _ in range(self._together):
                self._pass()
        else:
            self._forget()
            self._next = epoch, step
        self._reached, self._together, self._following = (epoch, step), together, (epoch, step)
        for _ in range(together):
            self._following = self._plan.after(*self._following)
        while len(self._sight) < together or (len(self._steps_with) < self._held and self._follows(epoch)):
            if not self._look():
                break
        if self._steps_with.keys() != before:
            self._samples.want(list(self._steps_with))

    def stop(self) -> None:
        """Ends all fetching, and frees the memory; the next `reach` begins anew."""
        self._forget()
        self._samples.let_go()

    def _pass(self) -> None:
        """The first step in sight is over."""
        for shard in self._sight.popleft():
            self._steps_with[shard] -= 1
            if not self._steps_with[shard]:
                del self._steps_with[shard]

    def _look(self) -> bool:
        """Takes one more step into sight; False where there would be too many shards."""
        rows = self._plan.part(*self._next)[0]
        shards = tuple(dict.fromkeys(self._samples.index["shard"][rows].tolist()))
        if len(self._sight) >= self._together and len(self._steps_with.keys() | set(shards)) > self._held:
            return False
        self._sight.append(shards)
        self._steps_with.update(shards)
        self._next = self._plan.after(*self._next)
        return True

    def _follows(self, epoch: int) -> bool:
        """Whether the first step out of sight will come; no further than an epoch ahead, where a rank has nothing to read in some steps."""
        ahead = self._next[0] - epoch
        return ahead == 0 or (self._onwards and ahead == 1)
