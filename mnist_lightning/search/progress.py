"""What the console shows of a search that runs."""

import itertools
import sys
import time

from tqdm import tqdm

from mnist_lightning.search.plan import Search, open_units, planned
from mnist_lightning.search.results import Results, score

SHOW_SECONDS = 1.0  # the least time between two counts of the trials


class Progress:
    """One line: trials done, the best so far, the time left."""

    def __init__(self, search: Search, results: Results, images: int) -> None:
        self.search, self.results, self.images = search, results, images
        self._count_work()
        self._best: float | None = None
        self._scored = 0
        self._said = self._shown = time.monotonic()
        self._bar = tqdm(
            total=self.total,
            initial=self._done,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} trials, {elapsed}{postfix}",
        )

    def _count_work(self) -> None:
        """Counts what is left to do; again when a round ends."""
        records = self.results.records()
        self._done = len(records)
        self.total = len({*records, *planned(self.search, records)})
        left = open_units(self.search, records, self.images)
        self._work = {unit.name: unit.work for unit in left}
        self._part: dict[str, float] = {}
        # from now on: the work to do, and how much of it is done
        self._to_do, self._worked = sum(self._work.values()), 0.0
        self._started = time.monotonic()

    def note(self, unit: str, part: float) -> None:
        """A worker has done this part of its unit."""
        work = self._work.get(unit, 0.0)
        if unit in self._part:
            self._worked += work * (part - self._part[unit])
        else:
            self._to_do -= work * part
        self._part[unit] = part

    def show(self) -> None:
        """Shows the progress, but not too often: with many trials, counting them takes a while."""
        if time.monotonic() - self._shown > SHOW_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        records = self.results.records()
        done = len(records)
        for record in itertools.islice(records.values(), self._scored, None):  # the new ones
            if scored := score(record, self.search.objective):
                self._best = max(scored.val_acc, self._best or 0.0)
        self._scored = done
        if done == self.total and done > self._done:
            self._count_work()
        facts = self._facts()
        self._bar.total, self._bar.n = self.total, done
        self._bar.set_postfix_str(", ".join(facts))
        if self._bar.disable and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            print(", ".join([f"{done}/{self.total} trials", *facts]), flush=True)

    def _facts(self) -> list[str]:
        facts = []
        if self._best is not None:
            facts.append(f"best trial {self._best:.4f}")
        if self._worked:
            left = (time.monotonic() - self._started) * (self._to_do / self._worked - 1)
            facts.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        return facts

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if not self._bar.disable:
            self._show()
        self._bar.close()
