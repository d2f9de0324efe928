"""Commits of a training run: the state of all ranks, the rows of metrics before it, and their way back.

A commit is complete or does not exist. Rows are written before it and count from it on: an interrupted commit writes
them again.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from poise.errors import IntegrityError
from poise.observe.events import event
from poise.observe.rows import Rows
from poise.store.checkpoints import Commit
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.restore import node_folder
from poise.train.state import (
    TrainState,
    capture_rng,
    load_state,
    load_window,
    restore_rng,
    save_state,
    save_window,
    seed_rng,
)
from poise.train.telemetry import Telemetry
from poise.train.window import MetricWindow

__all__ = ["Commits"]

_ROWS_FILE = re.compile(r"metrics/rows-(\d+)\.parquet")


class Commits:
    """Writes and restores the state of one run. Every rank calls each method at the same step.

    Attributes:
        last_step: the step that this attempt has committed last; None before.
    """

    def __init__(
        self,
        state: TrainState,
        rows: Rows,
        window: MetricWindow,
        context: Context,
        telemetry: Telemetry,
        *,
        seed: int,
        keep: int,
    ) -> None:
        """`rows` are those since the last commit, `seed` is that of the run, and `keep` the number of checkpoints."""
        self.last_step: int | None = None
        self._state = state
        self._rows = rows
        self._window = window
        self._context = context
        self._telemetry = telemetry
        self._seed = seed
        self._keep = keep
        self._provisional_step: int | None = None

    def write(self, epoch: float, *, provisional: bool = False) -> None:
        """Commit the state; rank 0 writes, and the other ranks wait until the commit is complete.

        The next commit replaces a provisional one.
        """
        rngs = self._context.gather(capture_rng(self._context.device))
        windows = self._context.gather(self._window.tensors())
        self._context.on_main(partial(self._write, epoch, rngs, windows, provisional))
        self._rows.clear()
        self.last_step = self._state.step

    def write_rows(self, step: int) -> None:
        """Write the rows up to `step`, without a checkpoint."""
        run = self._context.run
        self._context.on_main(lambda: run.write(_rows_file(step), self._rows.to_parquet()))

    def restore(self, event_name: str) -> bool:
        """Restore the newest valid checkpoint and record an event of this name; False where there is no checkpoint.

        The event `start` begins an attempt: rows of later steps, which it takes again, no longer count.
        """
        pids = self._context.gather(os.getpid())
        with node_folder(self._context) as folder:
            commit = self._context.on_main(partial(self._fetch_latest, folder.path, event_name, pids))
            if commit is None:
                return False
            folder.fetch(commit, self._context)
            self._context.on_every_rank(partial(self._load_from, folder.path))
        return True

    def _write(
        self, epoch: float, rngs: list[dict[str, Tensor]], windows: list[dict[str, Tensor]], provisional: bool
    ) -> None:
        run = self._context.run
        state = self._state
        started = time.perf_counter()
        timing = Rows()
        timing.add(state.step, epoch, "timing", self._telemetry.timing(state.step))
        self._context.check_lease()
        run.write_files(
            {
                _rows_file(state.step): self._rows.to_parquet(),
                f"metrics/timing-{state.step:08d}.parquet": timing.to_parquet(),
            }
        )
        with scratch_folder() as scratch:
            save_state(state, rngs, scratch)
            save_window(windows, scratch)
            run.checkpoints.commit(
                state.step,
                scratch,
                info={**self._info(), "provisional": provisional},
                appended=run.results.appended(),
                check_lease=self._context.check_lease,
            )
        if self._provisional_step is not None:
            run.checkpoints.remove(self._provisional_step)
        self._provisional_step = state.step if provisional else None
        run.checkpoints.prune(self._keep, {state.best.step} if state.best else set())
        seconds = time.perf_counter() - started
        details: dict[str, object] = {
            "step": state.step,
            "seconds": round(seconds, 3),
            **self._context.attempt_fields(),
        }
        if provisional:
            details["provisional"] = True
        run.append_events([event("commit", **details)])
        self._telemetry.committed(state.step, seconds)

    def _info(self) -> dict[str, float | int | None]:
        best = self._state.best
        return {
            "world_size": self._context.world_size,
            "best_step": best.step if best else None,
            "seed": self._seed,
        }

    def _fetch_latest(self, folder: Path, event_name: str, pids: list[int]) -> Commit | None:
        """Download the newest valid checkpoint into a folder, and record events of it and of each damaged one."""
        run = self._context.run
        commit, damages = run.checkpoints.latest_valid(folder)
        for damage in damages:
            self._context.sink.inc("poise_damaged_checkpoints_total", run=run.name)
            run.append_events([event("damaged", what=str(damage))])
        step = commit.step if commit else 0
        run.append_events([event(event_name, step=step, pids=pids, **self._context.attempt_fields())])
        if event_name == "start":
            self._empty_rows_after(step)
        self.last_step = self._provisional_step = None
        if commit is not None:
            self._remove_provisional_before(commit)
            if self._is_provisional(commit):
                self._provisional_step = commit.step
        return commit

    def _is_provisional(self, commit: Commit) -> bool:
        return bool(self._context.run.checkpoints.info(commit).get("provisional"))

    def _remove_provisional_before(self, commit: Commit) -> None:
        """Remove the provisional commit that `commit` replaces, if an attempt was killed before it had removed it."""
        checkpoints = self._context.run.checkpoints
        older = [each for each in checkpoints.commits() if each.step < commit.step]
        with suppress(IntegrityError):  # a damaged manifest; it is reported when that checkpoint is needed
            if older and self._is_provisional(older[-1]):
                checkpoints.remove(older[-1].step)

    def _load_from(self, folder: Path) -> None:
        """Restore the state, the window of metrics and the random generators of this rank from a checkpoint's files."""
        rank = self._context.rank
        device = self._context.device
        load_state(self._state, folder, device)
        self._window.fill(load_window(folder, rank, self._context.world_size, device))
        if not restore_rng(folder, rank, device):  # the checkpoint was written by fewer ranks
            seed_rng(self._seed, rank, self._state.step)

    def _empty_rows_after(self, step: int) -> None:
        """Empty the files of rows of later steps than `step`, which this attempt takes again.

        An attempt that was interrupted within a commit left them. The next commit may be at another step, so that its
        file does not replace theirs. They are emptied, not removed: their records are in the log of results.
        """
        run = self._context.run
        matches = map(_ROWS_FILE.fullmatch, run.files("metrics/"))
        later = [match[0] for match in matches if match and int(match[1]) > step]
        if later:
            run.write_files(dict.fromkeys(later, Rows().to_parquet()))


def _rows_file(step: int) -> str:
    return f"metrics/rows-{step:08d}.parquet"
