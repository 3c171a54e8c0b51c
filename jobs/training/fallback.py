"""What a training does that cannot apply an update any more: back to the last good state, on with
the next batch."""

import logging
from typing import Any

import jax

from jobs.checkpoints.restore import restore_newest
from jobs.errors import ExitCode, UserError
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.training.programs import Programs

log = logging.getLogger("tvq.fallback")


class Fallback:
    """The way back to the newest checkpoint.

    Policy: due after `training.max_skipped` batches in a row of which no update could be applied:
    then the state itself may be spoiled. State goes back, counters never: training goes on at the
    next batch. After `training.max_fallbacks` of them to one checkpoint, the training ends.

    Every process decides alike, from what the step reduced over all of them.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe, programs: Programs):
        self._run = run
        self._programs = programs
        self._per_batch = recipe.updates_per_batch
        self._limit = recipe.training.max_skipped * recipe.updates_per_batch
        self._most = recipe.training.max_fallbacks
        self._fallen_to: int | None = None
        """Update of the checkpoint last gone back to."""
        self._falls = 0
        """To that one, without a newer in between."""

    def is_due(self, skipped_in_a_row: int) -> bool:
        """After so many updates skipped since the last one that was applied."""
        return skipped_in_a_row >= self._limit

    def go_back(self, state: Any, next_batch: int, skipped_in_a_row: int) -> Any:
        """The newest checkpoint's state at the present one's position; the present one is deleted.

        No save may be under way.

        Args:
            state: the present one.
            next_batch: the batch to go on with.
            skipped_in_a_row: of the state.

        Raises:
            UserError: gone back to that checkpoint too often already, or there is none.
        """
        first = next_batch - skipped_in_a_row // self._per_batch
        now = state._replace(params=None, codebooks=None, optimizer=None)
        for leaf in jax.tree.leaves((state.params, state.codebooks, state.optimizer)):
            leaf.delete()  # there may be no room for two states
        with jax.transfer_guard("allow"):
            restored = restore_newest(self._run, self._programs.abstract)
        if restored is None:
            raise self._unstable(first, next_batch, "and there is no checkpoint to go back to")
        earlier, checkpoint = restored
        self._falls = self._falls + 1 if checkpoint.update == self._fallen_to else 1
        self._fallen_to = checkpoint.update
        if self._falls > self._most:
            before = f"gone back to the checkpoint at update {self._fallen_to} {self._most} times"
            raise self._unstable(first, next_batch, f"{before} before")
        log.warning(
            "no update of batches %d to %d could be applied: back to the state of update %d,"
            " on with batch %d",
            first, next_batch - 1, checkpoint.update, next_batch,
        )  # fmt: skip
        return self._programs.go_on_from(earlier, now)

    def _unstable(self, first: int, next_batch: int, why: str) -> UserError:
        return UserError(
            f"run {self._run.name}: no update of batches {first} to {next_batch - 1} could be"
            f" applied, {why}; `tvq inspect --run {self._run.name} --step {first}` shows the first"
            " one's documents; begin another run with a lower optimizer.learning_rate or without"
            " them",
            ExitCode.UNSTABLE,
        )
