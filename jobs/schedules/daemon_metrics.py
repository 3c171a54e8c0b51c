"""The figures of a schedule daemon for Prometheus."""

from collections.abc import Mapping

from jobs.errors import UserError

MISSED_TICKS = "tvq_missed_ticks"
"""Gauge, with the label `schedule`. All daemons of one root say the same."""


class DaemonMetrics:
    """Answers Prometheus at http://HOST:PORT/metrics for as long as the process lives."""

    def __init__(self, host: str, port: int):
        """Raises UserError if the port cannot be had."""
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        # Of our own: the default one tells of this Python, too, and belongs to the process.
        registry = CollectorRegistry()
        text = "Ticks missed since one was last run to its end."
        self._missed = Gauge(MISSED_TICKS, text, ["schedule"], registry=registry)
        self._shown: set[str] = set()
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(
                f"--metrics-port {port}: cannot be had on {host} ({error.strerror}); give another"
            ) from None

    def show(self, missed: Mapping[str, int]) -> None:
        """Sets how many ticks of each schedule were missed; others are shown no more."""
        for schedule in self._shown - missed.keys():
            self._missed.remove(schedule)
        self._shown = set(missed)
        for schedule, count in missed.items():
            self._missed.labels(schedule).set(count)

    def close(self) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()
