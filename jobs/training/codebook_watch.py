"""Says when a training's codebooks waste their codes."""

import logging

log = logging.getLogger("tvq.codebooks")

PATIENCE = 100
"""Updates for which something must have lasted: a layer of `tiny` passes through 4 of its 64 codes
at the start and comes back."""
_CURE = "model.kmeans_iterations, model.revive_below or a lower optimizer.learning_rate may mend it"


class CodebookWatch:
    """Warns once of collapsed codebooks, and once of dead codes.

    Policy: collapsed is what `codebook/collapsed_layers` counts, of codes more than half dead by
    `codebook/dead_codes`, for PATIENCE updates in a row.
    """

    def __init__(self, n_codes: int):
        """`n_codes`: of a codebook."""
        self._n_codes = n_codes
        self._collapsed = _Lasting()
        self._dead = _Lasting()

    def see(self, update: int, dead_codes: float, collapsed_layers: int) -> None:
        """The figures after an update."""
        if self._collapsed.begins(collapsed_layers > 0):
            log.warning(
                "update %d: collapsed codebooks in %d layers for %d updates: their keys share a"
                " code or two, and attention beyond the window is blind; %s",
                update, collapsed_layers, PATIENCE, _CURE,
            )  # fmt: skip
        if self._dead.begins(dead_codes > self._n_codes / 2):
            log.warning(
                "update %d: %.0f of the %d codes of a codebook are dead, for %d updates: no key is"
                " near them; %s",
                update, dead_codes, self._n_codes, PATIENCE, _CURE,
            )  # fmt: skip


class _Lasting:
    """Whether something has lasted, said once."""

    def __init__(self) -> None:
        self._updates = 0
        self._said = False

    def begins(self, there: bool) -> bool:
        self._updates = self._updates + 1 if there else 0
        if self._said or self._updates < PATIENCE:
            return False
        self._said = True
        return True
