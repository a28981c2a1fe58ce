"""``python -m mnist_lightning demo --ckpt_path RUN``: a page on which one draws, on this machine.

Werkzeug serves it, which TensorBoard brings: there is nothing else to install. Its server is meant
for one machine, which is enough here. Limits of size, time and connections are set below.
"""

import argparse
import errno
import ipaddress
import json
import socket
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
from werkzeug.wrappers import Request, Response

from mnist_lightning.console import PROGRAM
from mnist_lightning.deploy.options import make_parser, parse
from mnist_lightning.files import reason
from mnist_lightning.runs.ensembles import as_one
from mnist_lightning.runs.folder import LOGS, find_checkpoint

if TYPE_CHECKING:
    from mnist_lightning.models.classifier import Classifier

LOOPBACK, PORT = "127.0.0.1", 8010
MOST_BYTES = 5 * 2**20  # of a picture
_PORTS_TRIED = 20
_MOST_CONNECTIONS = 32  # at once; a browser has six
_SILENCE = 10  # seconds to wait for a client that sends nothing
_SECONDS = 30  # for a whole request

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def main(argv: Sequence[str]) -> int:
    """Shows the page until Ctrl-C.

    Raises:
        ValueError: an option is wrong, the checkpoint cannot be used, or no port is free.
    """
    given = _parse(as_one(argv))
    find_checkpoint(given.ckpt_path, Path(LOGS))  # before PyTorch is imported, which takes seconds
    from mnist_lightning.deploy.trained import Trained
    from mnist_lightning.models.classifier import Classifier
    from mnist_lightning.quiet import quiet

    with quiet(training=False):
        model = Trained(given.ckpt_path, given.model, given.trust).model
    if not isinstance(model, Classifier):
        raise ValueError(f"demo is for a Classifier, and {given.ckpt_path} is no such model")
    with listen(given.host, given.port) as listening:
        server = Server(listening, App(model, given.host))
        if given.port and server.port != given.port:
            print(f"port {given.port} is in use: taking {server.port}")
        print(f"draw on {_address(given.host, server.port)}   (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "demo",
        "Show a page on which one draws with the mouse or a finger, or drops a picture,"
        " and the network answers at once.",
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="the address to listen on; 0.0.0.0 lets other machines in (default: only this one)",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"{PORT} by default; if it is in use, the next one"
    )
    given = parse(parser, argv)
    if not 0 <= given.port < 2**16:
        raise ValueError(f"--port {given.port}: a port is a number up to {2**16 - 1}")
    return given


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that listens on the port, or on the next one that is free.

    Raises:
        ValueError: this machine does not have the address, or no port is free.
    """
    last = min(port + _PORTS_TRIED, 2**16) if port else 1
    for candidate in range(port, last):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, candidate), family=family, backlog=128)
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise ValueError(
                    f"cannot listen on {host}, port {candidate}: {reason(error)}. Give another:"
                    " --host, --port"
                ) from error
    raise ValueError(f"the ports from {port} to {last - 1} are in use: give another one, --port")


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        return f"http://{LOOPBACK}:{port}, from elsewhere under this machine's IP address"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class App:
    """The page and the answers, as a WSGI application.

    Args:
        model: answers.
        host: the address that the server listens on.
    """

    def __init__(self, model: "Classifier", host: str = LOOPBACK) -> None:
        from mnist_lightning.deploy import browser

        self.model, self._host = model, host
        self._page = browser.page(model)
        self._answer = partial(browser.answer, model)
        # a page of another site must not show this one in a frame; only a header can say this
        self._policy = f"{browser.policy(alone=False)}; frame-ancestors 'none'"
        self._one_at_a_time = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ, populate_request=False)
        request.max_content_length = MOST_BYTES
        try:
            response = self._respond(request)
        except RequestEntityTooLarge:
            response = _refusal(413, f"The picture has more than {MOST_BYTES // 2**20} MB.")
        except HTTPException as error:
            response = _refusal(error.code or 400, error.name)
        except ValueError as error:
            response = _refusal(400, str(error))
        response.headers.update({**HEADERS, "Content-Security-Policy": self._policy})
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        if not self._is_ours(request.environ.get("HTTP_HOST", "")):
            return _refusal(403, "Ask for the IP address, or start demo with --host NAME.")
        if request.path == "/":
            if request.method not in ("GET", "HEAD"):
                return _refusal(405, "The page can only be read.")
            return Response(self._page, mimetype="text/html")
        if request.path != "/predict":
            return _refusal(404, "There is nothing here.")
        if request.method != "POST":
            return _refusal(405, "Send a picture with POST.")
        # a page of another site would have to ask for this type first, and gets no permission
        if request.mimetype != "application/octet-stream":
            return _refusal(415, "Send the picture as application/octet-stream.")
        # Werkzeug's reader of bodies in chunks crashes Python if a client hangs up within a chunk
        if request.content_length is None or "HTTP_TRANSFER_ENCODING" in request.environ:
            return _refusal(411, "Say the size of the picture: Content-Length.")
        return _json(200, self.answer(request.get_data(cache=False)))

    def _is_ours(self, host: str) -> bool:
        """Whether the address that the browser asked for can be this server's.

        A page of another site can let its own name lead here (DNS rebinding), but not a number.
        """
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name.lower() in ("localhost", self._host.lower()):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def answer(self, picture: bytes) -> dict[str, Any]:
        """Answers for the content of an image file.

        Raises:
            ValueError: it is no image, or shows nothing.
        """
        from mnist_lightning.data.photos import read_for
        from mnist_lightning.data.preparation import prepare

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "picture")
            file.write_bytes(picture)
            try:
                image = read_for(self.model.spec, file)[None]
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), "The picture")) from error
        with self._one_at_a_time:
            probabilities, hidden = self._answer(image)
        seen = prepare(image, self.model.spec.unnormalised())[0]
        return {
            "probabilities": probabilities,
            "hidden": hidden,
            "seen": b64encode((seen * 255).round().clamp(0, 255).byte().numpy().tobytes()).decode(),
        }


def _json(status: int, content: dict[str, Any]) -> Response:
    return Response(json.dumps(content), status, mimetype="application/json")


def _refusal(status: int, why: str) -> Response:
    return _json(status, {"error": why})


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE

    def version_string(self) -> str:
        return PROGRAM

    def log(self, *_: Any) -> None:
        """Prints nothing: a line for each stroke would hide the address of the page."""


class Server(ThreadedWSGIServer):
    """Serves on a socket that listens already, with a limited number of threads."""

    # Python would end a daemon thread inside PyTorch, which aborts the process
    daemon_threads = False

    def __init__(self, listening: socket.socket, app: App) -> None:
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        host, port = listening.getsockname()[:2]
        super().__init__(host, port, app, _Handler, fd=listening.fileno())

    def process_request(self, request: Any, client_address: Any) -> None:
        self._free.acquire()  # further connections wait
        self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        clock = threading.Timer(_SECONDS, request.shutdown, (socket.SHUT_RDWR,))
        clock.daemon = True
        clock.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            clock.cancel()
            self._open.discard(request)
            self._free.release()

    def server_close(self) -> None:
        """Hangs up on all clients, and waits for the threads, which may be computing an answer."""
        for request in list(self._open):
            with suppress(OSError):  # it has just ended
                request.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing about requests that are none."""
