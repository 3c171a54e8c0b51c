"""Who may write to a run now: the driver that holds its lease, and that driver's newest group."""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Protocol

from jobs.errors import ExitCode, UserError
from jobs.runs.run_directory import RunDirectory
from pipeline.claims import Claim, holder_of
from pipeline.storage import Store

log = logging.getLogger("tvq.lease")

_TAKEN = "another driver has taken the run over and goes on with it; this one ends"


class LeaseLostError(UserError):
    """Another driver or worker group took the run over: this one must not write any more."""

    def __init__(self, message: str, code: ExitCode = ExitCode.BUSY):
        super().__init__(message, code)


class Held(Protocol):
    """What one driver at a time may write to: a run's folder, or a registered model's."""

    name: str
    store: Store


class Lease:
    """The right to write to a run, held by one driver at a time.

    Policy: a claim of `lease.json` that the holder renews every `renew_seconds`; when it may be
    taken over is said in `pipeline.claims.Claim`. Before every commit the holder (or a worker
    acting for it) reads whose it is: whoever lost the lease stops. So does a driver whose renewal
    finds it gone (`check`).
    """

    def __init__(
        self,
        run: Held,
        *,
        clock: Callable[[], float] = time.time,
        renew_seconds: float = 5,
        expire_seconds: float = 60,
        busy: str = "run {name}: is being trained by {holder}; wait for it, stop it, or choose"
        " another name with --run",
    ):
        """`busy` is what is said where somebody else holds it."""
        self._claim = Claim(run.store, clock=clock, expire_seconds=expire_seconds)
        self.owner = self._claim.owner
        self._name = run.name
        self._busy = busy
        self._clock = clock
        self._renew_seconds = renew_seconds

    @contextlib.contextmanager
    def held(self) -> Iterator["Lease"]:
        """Takes the lease, renews it in the background, and gives it back.

        Raises:
            UserError: somebody else holds it; names owner, host and age.
        """
        if holder := self._claim.take():
            age = self._clock() - holder.heartbeat
            who = (
                f"process {holder.pid} on {holder.host} (lease {holder.owner[:8]}, renewed"
                f" {age:.0f} s ago)"
            )
            raise UserError(self._busy.format(name=self._name, holder=who), ExitCode.BUSY)
        with self._claim.kept(self._renew_seconds, f"run {self._name}"):
            yield self

    def check(self) -> None:
        """Raises LeaseLostError if another driver has taken the run over, as far as is known."""
        if self._claim.is_lost:
            raise LeaseLostError(f"run {self._name}: {_TAKEN}")


def is_held(run: RunDirectory) -> bool:
    """Whether a driver holds the run now; for who looks and writes nothing."""
    claim = Claim(run.store)
    holder = claim.holder()
    return holder is not None and claim.is_alive(holder)


def died_at(run: RunDirectory) -> float | None:
    """When a driver that died with the lease renewed it last, Unix time.

    None where the lease is held or was given back: a driver that ends by itself gives it back.
    """
    claim = Claim(run.store)
    holder = claim.holder()
    return holder.heartbeat if holder is not None and not claim.is_alive(holder) else None


class Fence:
    """The right of one worker group to commit: its driver holds the lease and it is the newest."""

    def __init__(self, run: RunDirectory, owner: str):
        self._run = run
        self._owner = owner
        self._group = uuid.uuid4().hex

    def raise_over_others(self) -> None:
        """Makes this group the newest; called once by rank 0 when the group starts."""
        self.check(group=False)
        fields = json.dumps({"group": self._group}, indent=2) + "\n"
        self._run.store.write("group.json", fields.encode())

    def check(self, *, group: bool = True) -> None:
        """To be called right before a commit.

        Raises:
            LeaseLostError: another driver holds the lease, or a newer group has started.
            CorpusError: the store does not say.
        """
        holder = holder_of(self._run.store)
        if holder is None or holder.owner != self._owner:
            raise LeaseLostError(f"run {self._run.name}: {_TAKEN}")
        if group and self._newest_group() != self._group:
            raise LeaseLostError(
                f"run {self._run.name}: a newer worker group has started; this one ends"
            )

    def _newest_group(self) -> str | None:
        try:
            return json.loads(self._run.store.read("group.json"))["group"]
        except FileNotFoundError:
            return None
