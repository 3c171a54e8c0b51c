"""What a flow has done at a tick, in the store that the runs lie in.

<root>/flows/<name>/<tick>/lease.json    who runs it (pipeline/claims.py)
                           pinned.json   the champion that this tick compares with
                           <stage>.json  a stage that is done: the key of its inputs, its output
                           result.json   the whole is done
"""

import json
from typing import Any

from jobs.errors import UserError
from jobs.schedules.launchers import State
from jobs.schedules.ticks import is_by_hand, is_tick_id
from pipeline.claims import Claim, holder_of
from pipeline.storage import Location, Store, open_store


class FlowFolder:
    """The files of one flow at one tick."""

    def __init__(self, root: Location, name: str, tick: str):
        if not is_tick_id(tick):
            raise UserError(f"tick {tick!r}: expected a UTC instant such as 20260329T010000Z")
        self.tick = tick
        self.store: Store = open_store(root).child(f"flows/{name}/{tick}")

    def claim(self) -> Claim:
        """The right to run it."""
        return Claim(self.store)

    def read(self, file: str) -> dict[str, Any] | None:
        """A file's fields; None where there is none."""
        try:
            return json.loads(self.store.read(file))
        except FileNotFoundError:
            return None

    def write(self, file: str, fields: dict[str, Any]) -> None:
        """Writes or overwrites a file."""
        self.store.write(file, _json(fields))

    def pin(self, file: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Writes a file unless there is one; returns what it says from now on."""
        self.store.create(file, _json(fields))
        return json.loads(self.store.read(file))


def flow_state(root: Location, name: str, tick: str) -> State | None:
    """How it stands with the run of a flow at a tick, wherever it runs; None: nobody runs it."""
    folder = FlowFolder(root, name, tick)
    if folder.store.exists("result.json"):
        return "succeeded"
    holder = holder_of(folder.store)
    return "running" if holder and folder.claim().is_alive(holder) else None


def unfinished_tick(root: Location, name: str) -> str | None:
    """The newest tick that was begun by hand and is not done, to go on with; None if all are."""
    files: dict[str, set[str]] = {}
    for entry in open_store(root).child(f"flows/{name}").list():
        tick, _, file = entry.name.partition("/")
        if is_tick_id(tick):
            files.setdefault(tick, set()).add(file)
    open_ticks = [tick for tick, has in files.items() if "result.json" not in has]
    newest = max(open_ticks, default=None)
    return newest if newest and is_by_hand(newest) else None


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()
