"""Tells somebody that a scheduled flow failed, or that it works again."""

import json
import math
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.errors import UserError
from pipeline.storage import Store

_SECONDS = 15.0
"""A hook that takes longer is given up."""


_TRIES = 3
_PAUSE_SECONDS = 30.0
"""Between two tries."""


class AlertError(Exception):
    """The alert did not get through; its text is one line."""


@dataclass(frozen=True)
class Hook:
    """A command that is given the event as JSON on its standard input, or an address to post to."""

    command: tuple[str, ...] = ()
    """The program and its arguments, run without a shell."""
    webhook: str | None = None
    """An http(s) URL, or `env:NAME`: the variable that holds it where the daemon runs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", tuple(self.command))  # a list, from JSON
        if bool(self.command) == bool(self.webhook):
            raise UserError("an alert is either --alert-command or --alert-webhook; give one")
        if self.webhook and not re.match(r"(https?://[^/@\s]+(/|$)|env:\w+$)", self.webhook):
            raise UserError(
                "--alert-webhook: expected http://... or https://... without a user and password,"
                " or env:NAME for an address that is secret"
            )


class Deliveries:
    """Sends each alert until it got through, or three times.

    Policy: `alerted.json` beside the result is written once it got through or was given up, so
    that a daemon that dies in between leaves it to the next: an alert may come twice, it is not
    lost.
    """

    def __init__(self, clock: Callable[[], float], warn: Callable[[str], None]):
        self._clock = clock
        self._warn = warn
        self._tries: dict[str, tuple[int, float]] = {}

    def deliver(self, hook: Hook, event: dict[str, Any], store: Store) -> bool:
        """Tries it, if it is time to; whether it is done with. `store` is the tick's folder."""
        now = self._clock()
        tries, last = self._tries.get(store.location, (0, -math.inf))
        if now - last < _PAUSE_SECONDS:
            return False
        error = None
        try:
            send(hook, event)
        except AlertError as failure:
            error = str(failure)
        if error and tries + 1 < _TRIES:
            self._tries[store.location] = (tries + 1, now)
            return False
        if error:
            self._warn(f"{event['schedule']} {event['tick']}: the alert was given up: {error}")
        self._tries.pop(store.location, None)
        fields = {"time": now, "error": error}
        store.create("alerted.json", (json.dumps(fields) + "\n").encode())
        return True


def send(hook: Hook, event: dict[str, Any]) -> None:
    """Tells it once.

    Raises:
        AlertError: it did not get through within 15 seconds.
    """
    text = (json.dumps(event) + "\n").encode()
    if hook.command:
        _run(hook.command, text)
    else:
        assert hook.webhook is not None
        _post(hook.webhook, text)


def _run(command: tuple[str, ...], text: bytes) -> None:
    try:
        ended = subprocess.run(
            command,
            input=text,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AlertError(f"{command[0]} took longer than {_SECONDS:.0f} s") from None
    except OSError as error:
        raise AlertError(f"{command[0]}: {error.strerror}") from None
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise AlertError(": ".join([f"{command[0]} ended with {ended.returncode}", *said]))


def _post(webhook: str, text: bytes) -> None:
    url = webhook
    if webhook.startswith("env:"):
        url = os.environ.get(webhook.removeprefix("env:"), "")
        if not re.match(r"https?://", url):
            raise AlertError(f"{webhook}: holds no http(s) address where the daemon runs")
    request = urllib.request.Request(url, text, {"Content-Type": "application/json"})
    # Without the address in what is raised: it may be a secret.
    try:
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        raise AlertError(f"the webhook answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise AlertError(f"the webhook does not answer ({reason})") from None
