"""The page on which one draws: its file, its server, and what a browser shows."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import trainer
from PIL import Image
from test_drawings import HANDS, photographed
from test_drawings import written as handwritten
from torch import Tensor, nn

from mnist_lightning import (
    Classifier,
    ConvNetwork,
    DataSpec,
    DeepNetwork,
    MNISTDataModule,
    Perceptron,
    ResNet18,
    ShallowNetwork,
)
from mnist_lightning.__main__ import main
from mnist_lightning.data.photos import decode, read_image
from mnist_lightning.data.preparation import prepare
from mnist_lightning.deploy import browser, demo
from mnist_lightning.deploy.browser import Layers, page, read_back, self_contained
from mnist_lightning.nets import ACTIVATIONS, AffineMap

COLOUR = DataSpec(3, 16, 16, ("cat", "dog", "<b>"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), drawn=False)

GRAY = DataSpec(1, 32, 32, ("a", "b"), (0.4,), (0.2,), drawn=False)


@torch.no_grad()
def lively(model: Classifier) -> Classifier:
    """Makes an untrained model answer like a trained one: each image gets other probabilities.

    BatchNorm gets statistics of images, and also negative factors.
    """
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.uniform_(-0.7, 1.5, generator=generator)
            module.bias.uniform_(-0.5, 0.5, generator=generator)
            module.momentum = None  # the mean over all batches
    spots = (torch.rand(64, *model.spec.shape, generator=generator) > 0.98).float()
    strokes = F.max_pool2d(spots, 3, 1, 1)
    model.train()(strokes)
    model.eval()
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear | AffineMap))
    weight, bias = last.parameters()
    weight *= 2 / model(strokes).std(0).mean()
    bias -= model(strokes).mean(0)
    return model


def small(name: str) -> Classifier:
    torch.manual_seed(0)
    if name in ACTIVATIONS:
        return lively(DeepNetwork([30, 20], batch_norm=True, dropout=0.2, activation=name))
    models: dict[str, Callable[[], Classifier]] = {
        "perceptron": Perceptron,
        "shallow": lambda: ShallowNetwork(50),
        "conv": lambda: ConvNetwork([8, 16]),
        "conv_hidden": lambda: ConvNetwork([8, 16], hidden_units=20, kernel_size=5, dropout=0.1),
        "gray": lambda: ConvNetwork([8, 12], spec=GRAY),
        "colour": lambda: ConvNetwork([8, 12], spec=COLOUR),
        "resnet": lambda: ResNet18(spec=DataSpec(height=32, width=32, mean=(0.1,), std=(0.3,))),
        "resnet_small": lambda: ResNet18(small_images=True, spec=DataSpec(height=12, width=12)),
    }
    return lively(models[name]())


# What the file contains


NAMES = ["perceptron", "shallow", "conv", "conv_hidden", "colour", *ACTIVATIONS]


@pytest.mark.parametrize("name", [*NAMES, "resnet"])
def test_the_listed_layers_compute_what_the_network_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PyTorch; the tests in a browser compare what the page's own script computes."""
    monkeypatch.setattr(browser, "MOST_BYTES", 10**8)
    model = small(name)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (5, *model.spec.shape), generator=generator).byte()
    expected = model.predict(images).probabilities
    assert (read_back(self_contained(model))(images) - expected).abs().max() < 1e-4


def test_batch_norm_is_folded_where_nothing_lies_between() -> None:
    ops = [layer["op"] for layer in Layers(small("conv")).listed]
    # after the pooling it cannot be folded: a negative factor would turn its maximum to a minimum
    assert ops == [*["conv", "max_pool", "scale", "relu", "conv", "relu"] * 2, *ops[-3:]]
    assert ops[-3:] == ["global_average", "flatten", "linear"]
    assert [layer["op"] for layer in Layers(small("gelu")).listed] == [
        *("flatten", "linear", "gelu", "linear", "gelu", "linear")
    ]


def parts(text: str) -> tuple[dict[str, Any], np.ndarray]:
    """The model and the weights in the text of a page."""
    found = [re.search(rf'id="{name}">(.*?)</script>', text) for name in ("model", "weights")]
    about, weights = (match[1] for match in found if match)
    return json.loads(about), np.frombuffer(base64.b64decode(weights), "<f4")


def test_the_file_contains_the_weights_and_the_spec(tmp_path: Path) -> None:
    model = small("shallow")
    (tmp_path / "model.html").write_text(self_contained(model))
    about, weights = parts((tmp_path / "model.html").read_text())
    tensors = (p.detach().numpy().ravel() for p in model.parameters())
    assert np.array_equal(weights, np.concatenate(list(tensors)))
    assert DataSpec.of(about["spec"]) == model.spec
    assert about["hidden"] == [50]
    assert about["parameters"] == sum(p.numel() for p in model.parameters())


def test_names_of_classes_cannot_leave_their_place() -> None:
    spec = DataSpec(classes=("</script><script>alert(1)</script>", "<!--", "{{ weights }}"))
    text = page(ShallowNetwork(5, spec=spec).eval())
    assert parts(text)[0]["spec"]["classes"] == list(spec.classes)
    assert text.count("<script") == 3


def test_the_page_names_no_other_host() -> None:
    text = page(small("shallow"))
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.split('id="model"')[0]) == []
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", text)
    assert "default-src 'none'" in browser.policy(alone=True)


def test_a_network_that_is_too_large_is_refused() -> None:
    with torch.device("meta"):
        model = ShallowNetwork(5000)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"15\.9 MB, and html holds up to 10 MB.* demo"):
        self_contained(model)


class OwnForward(ShallowNetwork):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class OwnNet(Classifier):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(nn.Sequential(*layers), 0.1, "sgd")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OwnForward(), "a forward of its own"),
        (OwnNet(nn.Conv2d(1, 4, 3, groups=1, dilation=2)), "dilation"),
        (OwnNet(nn.Conv2d(1, 4, 3, padding="same")), "padding=same"),
        (OwnNet(nn.Flatten(), nn.LayerNorm(784)), "LayerNorm"),
        (OwnNet(nn.Flatten(), nn.GELU(approximate="tanh")), "GELU"),
        (OwnNet(nn.BatchNorm2d(1, track_running_stats=False)), "running statistics"),
    ],
)
def test_layers_that_the_page_does_not_know_are_refused(model: Classifier, message: str) -> None:
    with pytest.raises(ValueError, match=rf"html does not know .*{message}.* demo"):
        Layers(model)


# The server


def serve(model: Classifier, host: str = demo.LOOPBACK) -> Iterator[demo.Server]:
    with demo.listen(host, 0) as listening:
        server = demo.Server(listening, demo.App(model, host))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[demo.Server]:
    yield from serve(small("shallow"))


def test_no_thread_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python aborts if it ends a thread that is in PyTorch, which also frees its tensors there."""
    computing, ended = threading.Event(), threading.Event()
    before = set(threading.enumerate())

    def answer(self: demo.App, picture: bytes) -> dict[str, Any]:
        computing.set()
        assert ended.wait(20)
        return {}

    monkeypatch.setattr(demo.App, "answer", answer)
    monkeypatch.setattr(demo._Handler, "timeout", 3600)
    serving = serve(small("shallow"))
    server = next(serving)
    connect = partial(socket.create_connection, (demo.LOOPBACK, server.port), 20)
    with connect() as silent, connect() as asking:
        silent.sendall(HEAD)  # and never the rest
        asking.sendall(HEAD + b"Content-Length: 1\r\n\r\n1")
        assert computing.wait(20)
        closing = threading.Thread(target=lambda: next(serving, None))
        closing.start()
        assert silent.recv(1) == b""  # the server hangs up, and waits for the answer
        assert closing.is_alive()
        ended.set()
        closing.join(20)
        left = set(threading.enumerate()) - before
        assert not [thread for thread in left if not isinstance(thread, threading.Timer)]


def ask(
    server: demo.Server,
    method: str = "GET",
    path: str = "/",
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(demo.LOOPBACK, server.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content, reply.headers


PICTURE = {"Content_Type": "application/octet-stream"}
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"


def scribble(seed: int, size: int = 200) -> bytes:
    """A PNG with dark lines on light paper."""
    generator = np.random.default_rng(seed)
    pixels = np.full((size, size), 250, np.uint8)
    x, y = generator.integers(size // 4, 3 * size // 4, 2)
    for _ in range(300):
        x, y = np.clip([x + generator.integers(-6, 7), y + generator.integers(-6, 7)], 8, size - 9)
        pixels[y - 4 : y + 5, x - 4 : x + 5] = 20
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_server_answers_as_the_model_does(server: demo.Server, tmp_path: Path) -> None:
    model = small("shallow")
    (tmp_path / "a.png").write_bytes(scribble(0))
    status, content, _ = ask(server, "POST", "/predict", scribble(0), **PICTURE)
    assert status == 200
    said = json.loads(content)
    expected = model.predict([tmp_path / "a.png"]).probabilities[0]
    torch.testing.assert_close(torch.tensor(said["probabilities"]), expected)
    image = read_image(tmp_path / "a.png")
    assert base64.b64decode(said["seen"]) == image.numpy().tobytes()
    with torch.inference_mode():
        hidden = model.net[:3](prepare(image[None], model.spec))[0]
    torch.testing.assert_close(torch.tensor(said["hidden"][0]), hidden)


def test_the_page_of_the_server(server: demo.Server) -> None:
    status, content, headers = ask(server)
    assert status == 200
    assert parts(content.decode())[0]["layers"] is None
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "ython" not in headers["Server"]
    assert ask(server, "HEAD")[:2] == (200, b"")


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers"),
    [
        (403, "GET", "/", None, {"Host": "evil.example"}),
        (403, "GET", "/", None, {"Host": "evil.example:8010"}),
        (403, "GET", "/", None, {"Host": "127.0.0.1.evil.example"}),
        (403, "GET", "/", None, {"Host": ""}),
        (403, "GET", "http://evil.example/", None, {}),
        (200, "GET", "/", None, {"Host": "localhost:8010"}),
        (200, "GET", "/", None, {"Host": "[::1]:8010"}),
        (404, "GET", "/model", None, {}),
        (404, "GET", "/../../etc/passwd", None, {}),
        (404, "GET", "/%2e%2e/%2e%2e/etc/passwd", None, {}),
        (404, "GET", "//etc/passwd", None, {}),
        (405, "POST", "/", b"x", PICTURE),
        (405, "GET", "/predict", None, {}),
        (405, "DELETE", "/predict", None, {}),
        (415, "POST", "/predict", b"x", {}),
        (415, "POST", "/predict", b"x", {"Content_Type": "text/plain"}),
        (400, "POST", "/predict", b"", PICTURE),
        (400, "POST", "/predict", b"no picture", PICTURE),
        (400, "POST", "/predict", scribble(1)[:500], PICTURE),
        (413, "POST", "/predict", b"x" * (demo.MOST_BYTES + 1), PICTURE),
    ],
)
def test_what_is_refused(
    server: demo.Server,
    status: int,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
) -> None:
    answered, content, _ = ask(server, method, path, body, **headers)
    assert answered == status
    if status != 200:
        assert 5 < len(json.loads(content)["error"]) < 150
        assert b"/tmp" not in content


def test_a_blank_picture_shows_nothing(server: demo.Server) -> None:
    file = io.BytesIO()
    Image.new("L", (50, 50), 200).save(file, "PNG")
    status, content, _ = ask(server, "POST", "/predict", file.getvalue(), **PICTURE)
    assert status == 400
    assert "The picture shows nothing" in json.loads(content)["error"]


@pytest.mark.parametrize("body", [b"5\r\nabcde\r\n0\r\n\r\n", b"FFFF\r\nx", b"x"])
def test_a_body_in_chunks_is_refused(server: demo.Server, body: bytes) -> None:
    """Werkzeug's reader of such bodies can crash the process: it must not be reached."""
    for more in (b"", b"Content-Length: 3\r\n"):
        with socket.create_connection((demo.LOOPBACK, server.port), timeout=20) as connection:
            connection.sendall(HEAD + more + b"Transfer-Encoding: chunked\r\n\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 411 ")


def hostile(port: int, generator: random.Random) -> None:
    """Sends one request that no browser sends."""
    noise = generator.randbytes(generator.choice([0, 1, 100, 5000]))
    requests = [
        noise,
        b"GET / HTTP/1.1\r\nHost: " + noise + b"\r\n\r\n",
        b"GET /" + noise + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n",
        b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise,  # the start of TLS
        HEAD + b"Content-Length: 99\r\n\r\n" + noise,
        HEAD + b"Content-Length: -1\r\n\r\n" + noise,
        HEAD + b"Content-Length: x\r\n\r\n" + noise,
        HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + noise,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n" + noise,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + noise,
        HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        HEAD + b"Content-Length: %d\r\n\r\n\x89PNG\r\n\x1a\n" % (len(noise) + 8) + noise,
        b"G\x00T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
    with socket.create_connection((demo.LOOPBACK, port), timeout=20) as connection:
        try:
            connection.sendall(generator.choice(requests))
            if generator.random() < 0.7:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):
                    pass
        except OSError:  # the server may hang up at once
            pass


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_requests_leave_the_server_as_it_was(
    server: demo.Server, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = ask(server, "POST", "/predict", scribble(0), **PICTURE)[1]
    generators = [random.Random(seed) for seed in range(count)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda generator: hostile(server.port, generator), generators))
    assert ask(server, "POST", "/predict", scribble(0), **PICTURE)[1] == before
    assert capfd.readouterr() == ("", "")


def test_connections_that_say_nothing_do_not_keep_others_out(
    server: demo.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo._Handler, "timeout", 0.5)
    silent = [socket.create_connection((demo.LOOPBACK, server.port)) for _ in range(100)]
    assert ask(server)[0] == 200
    for connection in silent:
        connection.close()


def test_it_listens_on_loopback_only(server: demo.Server) -> None:
    assert server.socket.getsockname()[0] == demo.LOOPBACK


def test_a_host_that_was_asked_for_is_answered() -> None:
    app = demo.App(small("shallow"), "studio.local")
    assert app._is_ours("studio.local:8010")
    assert app._is_ours("192.168.1.7:8010")
    assert not app._is_ours("evil.example")


# The command


def checkpoint(model: Classifier, folder: Path, source: str = "digits") -> Path:
    data = MNISTDataModule(source=source, batch_size=64)
    fitting = trainer(limit_train_batches=1, limit_val_batches=0)
    fitting.fit(model, data)
    path = folder / "model.ckpt"
    fitting.save_checkpoint(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["demo", *argv]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) <= 2
    return said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "demo needs trained weights: --ckpt_path"),
        (["--ckpt_path", "nowhere"], "there is no file or folder nowhere"),
        (["--ckpt_path", "x", "--prot", "1"], "no option --prot; all"),
        (["--ckpt_path", "x", "--port", "70000"], "--port 70000: a port is a number up to 65535"),
        (["--ckpt_path", "x", "--port", "x"], "--port: invalid int value"),
    ],
)
def test_bad_commands(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refused(capsys, *argv)


def test_bad_files_and_addresses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_text("no checkpoint")
    assert "truncated" in refused(capsys, "--ckpt_path", str(tmp_path / "x.ckpt"))
    file = str(checkpoint(ShallowNetwork(5), tmp_path))
    capsys.readouterr()
    text = refused(capsys, "--ckpt_path", file, "--host", "192.0.2.1")
    assert "cannot listen on 192.0.2.1, port 8010: " in text
    assert "cannot listen on no.invalid" in refused(
        capsys, "--ckpt_path", file, "--host", "no.invalid"
    )


@pytest.mark.slow
def test_a_port_in_use_is_passed_over_and_said(tmp_path: Path) -> None:
    file = checkpoint(ShallowNetwork(5), tmp_path)
    with demo.listen(demo.LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        words = ["demo", "--ckpt_path", str(file), "--port", str(port)]
        command = [sys.executable, "-m", "mnist_lightning", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            said, where = process.stdout.readline(), process.stdout.readline()
            found = re.fullmatch(rf"port {port} is in use: taking (\d+)\n", said)
            assert found
            assert f"http://127.0.0.1:{found[1]} " in where
            connection = http.client.HTTPConnection(demo.LOOPBACK, int(found[1]), timeout=20)
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
        finally:
            process.send_signal(2)  # Ctrl-C
            assert process.wait(20) == 0


def test_no_free_port_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PORTS_TRIED", 1)
    with demo.listen(demo.LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"the ports from {port} to {port} are in use"):
            demo.listen(demo.LOOPBACK, port)


# In a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


Visit = Callable[..., Any]


@pytest.fixture
def visit(chromium: Any) -> Iterator[Visit]:
    """Opens a page, and at the end of the test looks for errors and for requests elsewhere."""
    said: list[str] = []
    asked: list[str] = []
    pages = []

    def opened(where: str | Path, width: int = 1280, scheme: str = "light", **more: Any) -> Any:
        size = {"width": width, "height": 900}
        page = chromium.new_page(viewport=size, color_scheme=scheme, **more)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(where.as_uri() if isinstance(where, Path) else where)
        pages.append(page)
        return page

    yield opened
    for one in pages:
        one.close()
    assert said == []
    own = ("file:", "data:", "blob:", f"http://{demo.LOOPBACK}:")
    assert [url for url in asked if not url.startswith(own)] == []


def drawings(count: int) -> list[list[list[tuple[float, float]]]]:
    """Random strokes on a sheet of 512 x 512, of all sizes."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        extent = generator.uniform(20, 490)
        origin = generator.uniform(0, 512 - extent, 2)
        strokes = []
        for _ in range(generator.integers(1, 4)):
            steps = generator.normal(0, 1, (generator.integers(1, 30), 2)).cumsum(0)
            steps = (steps - steps.min(0)) / np.maximum(np.ptp(steps, 0), 1e-6)
            strokes.append([tuple(point) for point in (origin + extent * steps).tolist()])
        made.append(strokes)
    return made


DRAWN = """strokes => {
  sheet = { picture: null, strokes };
  paint();
  const png = canvas.toDataURL();
  let bytes;
  try { bytes = read(context.getImageData(0, 0, canvas.width, canvas.height)); }
  catch (error) { return { png, error: error.message }; }
  const { probabilities, seen } = answer(bytes);
  return { png, bytes: [...bytes.values], probabilities, seen: [...seen.values] };
}"""

OPENED = """async png => {
  const file = Uint8Array.from(atob(png), c => c.charCodeAt(0));
  const copy = onPaper(await createImageBitmap(new Blob([file])), 1);
  let bytes;
  try { bytes = read(copy.getContext("2d").getImageData(0, 0, copy.width, copy.height)); }
  catch (error) { return { error: error.message }; }
  return { bytes: [...bytes.values], probabilities: answer(bytes).probabilities };
}"""


def same_error(answer: dict[str, Any], file: Path) -> bool:
    """Whether neither the page nor Python finds ink, which can be in a picture full of lines."""
    if "error" in answer:
        with pytest.raises(ValueError, match="shows nothing"):
            read_image(file)
        assert answer["error"].startswith("The picture shows nothing")
    return "error" in answer


def written(model: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(browser, "MOST_BYTES", 10**8)  # ResNet-18 has 45 MB
    (folder / "model.html").write_text(self_contained(model))
    return folder / "model.html"


DRAWN_ON = ["perceptron", "shallow", "conv", "conv_hidden", "resnet", "resnet_small", *ACTIVATIONS]


@pytest.mark.browser
@pytest.mark.parametrize("name", DRAWN_ON)
def test_100_drawings_give_what_pytorch_gives(
    name: str, visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(name)
    page = visit(written(model, tmp_path, monkeypatch))
    answers, files = [], []
    for number, strokes in enumerate(drawings(130)):
        answer = page.evaluate(DRAWN, strokes)
        file = tmp_path / f"{number}.png"
        file.write_bytes(base64.b64decode(answer["png"].partition(",")[2]))
        if not same_error(answer, file):
            answers.append(answer)
            files.append(file)
    assert len(files) >= 100
    images = torch.stack([read_image(file) for file in files])
    ours = torch.tensor([answer["bytes"] for answer in answers])
    assert torch.equal(ours.reshape(images.shape).byte(), images)
    seen = torch.tensor([answer["seen"] for answer in answers])
    expected = prepare(images, model.spec.unnormalised())
    torch.testing.assert_close(seen.reshape(expected.shape), expected, atol=1e-6, rtol=0)
    probabilities = torch.tensor([answer["probabilities"] for answer in answers])
    expected = model.predict(images).probabilities
    assert (probabilities - expected).abs().max() < 1e-4
    assert expected.std(0).max() > 0.05  # the drawings get different answers


def photograph(seed: int) -> Image.Image:
    """Smooth colours with noise, of any size and shape."""
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(5, 300, 2))
    coarse = generator.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), np.float64)
    noise = generator.normal(0, generator.uniform(0, 30), smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.browser
@pytest.mark.parametrize("channels", [1, 3])
def test_100_photographs_give_what_pytorch_gives(
    channels: int, visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("colour" if channels == 3 else "gray")
    page = visit(written(model, tmp_path, monkeypatch))
    for seed in range(100):
        file = tmp_path / "photograph.png"
        picture = photograph(seed)
        picture.save(file)
        answer = page.evaluate(OPENED, base64.b64encode(file.read_bytes()).decode())
        pixels = decode(file, model.spec.height, channels)
        assert pixels is not None
        ours = torch.tensor(answer["bytes"], dtype=torch.uint8).reshape(pixels.shape)
        tall = picture.height > picture.width  # newer versions of Pillow scale the rows first
        assert np.abs(ours.numpy().astype(int) - pixels).max() <= int(tall)
        expected = model.predict(ours[None]).probabilities[0]
        assert (torch.tensor(answer["probabilities"]) - expected).abs().max() < 1e-4


@pytest.mark.browser
def test_photographed_digits_are_prepared_alike(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Light ink and dark ink, transparent paper, and pictures in gray and in colour."""
    page = visit(written(small("shallow"), tmp_path, monkeypatch))
    count = 0
    for seed in range(40):
        picture = Image.open(io.BytesIO(scribble(seed, 40 + 5 * seed)))
        if seed % 2:
            picture = picture.point(lambda value: 255 - value)
        if seed % 3 == 1:
            picture = picture.convert("RGB").point(lambda value: value * 2 // 3 + 20)
        if seed % 4 == 2:  # ink without paper
            ink = picture.convert("RGBA")
            ink.putalpha(picture.convert("L").point(lambda value: 255 if value < 100 else 0))
            picture = ink
        file = tmp_path / "digit.png"
        picture.save(file)
        answer = page.evaluate(OPENED, base64.b64encode(file.read_bytes()).decode())
        if not same_error(answer, file):
            assert answer["bytes"] == read_image(file).flatten().tolist()
            count += 1
    assert count >= 30


@pytest.mark.browser
def test_shaded_and_ruled_paper_is_prepared_alike(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(written(small("perceptron"), tmp_path, monkeypatch))
    rng = np.random.default_rng(0)
    for number, hands in HANDS.items():
        digit = handwritten(hands[0], 300, 0.05)
        ink = np.zeros((384, 512), np.float32)
        ink[40 : 40 + digit.height, 90 : 90 + digit.width] = np.asarray(digit) / 255
        for how in ("shaded", "shaded and dark", "shaded and ruled"):
            file = tmp_path / "digit.png"
            photographed(ink, how, rng).save(file)
            answer = page.evaluate(OPENED, base64.b64encode(file.read_bytes()).decode())
            assert answer["bytes"] == read_image(file).flatten().tolist(), (number, how)


# the ten digits as a hand draws them: strokes through points, on a sheet of 1 x 1
CIRCLE = [(0.5, 0.15), (0.33, 0.25), (0.27, 0.5), (0.33, 0.76), (0.5, 0.86)]
DIGITS = {
    "0": [[*CIRCLE, (0.67, 0.76), (0.73, 0.5), (0.67, 0.25), (0.5, 0.15)]],
    "1": [[(0.42, 0.26), (0.52, 0.15), (0.52, 0.4), (0.51, 0.86)]],
    "2": [
        [
            *[(0.3, 0.3), (0.38, 0.17), (0.55, 0.14), (0.69, 0.24), (0.68, 0.4), (0.5, 0.62)],
            *[(0.3, 0.83), (0.32, 0.84), (0.5, 0.83), (0.74, 0.84)],
        ]
    ],
    "3": [
        [
            *[(0.3, 0.22), (0.45, 0.14), (0.64, 0.18), (0.68, 0.34), (0.55, 0.46), (0.44, 0.49)],
            *[(0.6, 0.52), (0.72, 0.66), (0.62, 0.82), (0.44, 0.87), (0.28, 0.78)],
        ]
    ],
    "4": [
        [(0.36, 0.16), (0.31, 0.36), (0.3, 0.5), (0.45, 0.53), (0.7, 0.5)],
        [(0.66, 0.18), (0.65, 0.5), (0.62, 0.86)],
    ],
    "5": [
        [
            *[(0.68, 0.16), (0.5, 0.16), (0.36, 0.17), (0.34, 0.3), (0.32, 0.45), (0.48, 0.42)],
            *[(0.64, 0.5), (0.69, 0.65), (0.6, 0.8), (0.44, 0.86), (0.29, 0.8)],
        ]
    ],
    "6": [
        [
            *[(0.6, 0.14), (0.43, 0.28), (0.33, 0.5), (0.32, 0.7), (0.42, 0.85), (0.57, 0.85)],
            *[(0.67, 0.72), (0.62, 0.58), (0.48, 0.55), (0.36, 0.64)],
        ]
    ],
    "7": [[(0.28, 0.18), (0.5, 0.18), (0.73, 0.18), (0.62, 0.4), (0.52, 0.62), (0.46, 0.86)]],
    "8": [
        [
            *[(0.64, 0.22), (0.5, 0.14), (0.36, 0.24), (0.42, 0.4), (0.58, 0.54), (0.67, 0.7)],
            *[(0.58, 0.84), (0.42, 0.84), (0.34, 0.7), (0.44, 0.53), (0.6, 0.38), (0.64, 0.22)],
        ]
    ],
    "9": [
        [
            *[(0.66, 0.26), (0.52, 0.15), (0.37, 0.22), (0.34, 0.38), (0.46, 0.48), (0.6, 0.42)],
            *[(0.66, 0.26), (0.66, 0.45), (0.64, 0.65), (0.6, 0.86)],
        ]
    ],
}


def draw(page: Any, digit: str) -> None:
    """Draws a digit with the mouse."""
    box = page.locator("#canvas").bounding_box()
    for stroke in DIGITS[digit]:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=4)
        page.mouse.up()


def settle(page: Any) -> str:
    """Waits for the answer to the last stroke, and returns it."""
    while page.evaluate("busy || stale"):  # wait_for_function is refused by the page's policy
        page.wait_for_timeout(10)
    return page.locator("#best").inner_text()


@pytest.fixture(scope="module")
def trained() -> Classifier:
    """A network trained on MNIST, or on scikit-learn's digits where MNIST is not there."""
    folder = Path(os.environ.get("MNIST_DATA_DIR") or "data")
    has_mnist = (folder / "MNIST" / "raw").is_dir()
    where = {"source": "mnist", "data_dir": str(folder)} if has_mnist else {"source": "digits"}
    torch.manual_seed(0)
    data = MNISTDataModule(**where, batch_size=64, augment={"rotate": 10, "scale": 0.1})
    model = ConvNetwork([16, 32], hidden_units=64, convolutions=1, lr=0.003)
    trainer(max_epochs=1 if has_mnist else 15, limit_val_batches=0).fit(model, data)
    return model.eval()


@pytest.mark.browser
@pytest.mark.parametrize("with_server", [False, True])
def test_the_ten_digits_are_read(
    with_server: bool, trained: Classifier, visit: Visit, tmp_path: Path
) -> None:
    (tmp_path / "model.html").write_text(self_contained(trained))
    serving = serve(trained) if with_server else iter(())
    running = next(serving, None)
    where = tmp_path / "model.html"
    page = visit(where if running is None else f"http://{demo.LOOPBACK}:{running.port}/")
    answers = ""
    for digit in DIGITS:
        page.get_by_role("button", name="Clear").click() if answers else None
        assert settle(page) == "–"
        draw(page, digit)
        answers += settle(page)
        likeliest = page.locator(".likeliest").inner_text().split()
        assert likeliest[0] == answers[-1]
        assert page.locator("#sure").inner_text() == " ".join(likeliest[1:])
        assert "of 64 are active" in page.locator("#units").inner_text()
    assert next(serving, None) is None  # ends the server
    assert answers == "0123456789"


@pytest.mark.browser
def test_undo_clear_and_pictures(trained: Classifier, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "model.html").write_text(self_contained(trained))
    page = visit(tmp_path / "model.html")
    buttons = {name: page.get_by_role("button", name=name) for name in ("Undo", "Clear")}
    assert all(button.is_disabled() for button in buttons.values())
    draw(page, "4")
    whole = settle(page), page.evaluate("canvas.toDataURL()")
    buttons["Undo"].click()
    settle(page)
    assert page.evaluate("sheet.strokes.length") == 1
    draw(page, "1")
    buttons["Undo"].click()
    buttons["Undo"].click()
    assert settle(page) == "–"
    draw(page, "4")
    assert (settle(page), page.evaluate("canvas.toDataURL()")) == whole
    # a picture takes the place of the drawing, and Undo brings the drawing back
    for number, name in enumerate(("scribble.png", "broken.png", "blank.png")):
        blank = io.BytesIO()
        Image.new("RGB", (30, 20), "red").save(blank, "PNG")
        file = tmp_path / name
        file.write_bytes([scribble(3), b"no picture", blank.getvalue()][number])
        page.locator("#file").set_input_files(file)
        page.wait_for_timeout(300)
        answer, problem = settle(page), page.locator("#problem").inner_text()
        if name == "scribble.png":
            assert answer == trained.predict([file]).classes[0]
            assert problem == ""
        elif name == "broken.png":
            assert problem == "broken.png cannot be read as a picture. Take a PNG or JPEG."
        else:
            assert (answer, problem[:26]) == ("–", "The picture shows nothing:")
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert (settle(page), page.evaluate("canvas.toDataURL()")) == whole
    assert page.locator("#problem").is_hidden()
    page.keyboard.press("Escape")
    assert settle(page) == "–"


@pytest.mark.browser
def test_drawing_by_keyboard(trained: Classifier, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "model.html").write_text(self_contained(trained))
    page = visit(tmp_path / "model.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "canvas"
    for key in ["Shift+ArrowUp"] * 3 + ["Space"] + ["Shift+ArrowDown"] * 6:
        page.keyboard.press(key)
    assert settle(page) == "1"
    page.keyboard.press("Space")
    page.keyboard.press("ArrowLeft")  # the pen is lifted
    assert page.evaluate("sheet.strokes.map(points => points.length)") == [7]


@pytest.mark.browser
def test_drawing_by_finger(trained: Classifier, visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "model.html").write_text(self_contained(trained))
    page = visit(tmp_path / "model.html", width=390, has_touch=True, is_mobile=True)
    box = page.locator("#canvas").bounding_box()
    fingers = page.context.new_cdp_session(page)
    for number, (x, y) in enumerate([*DIGITS["7"][0], (0, 0)]):
        end = number == len(DIGITS["7"][0])
        kind = "touchEnd" if end else "touchMove" if number else "touchStart"
        place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        touches = {"type": kind, "touchPoints": [] if end else [place]}
        fingers.send("Input.dispatchTouchEvent", touches)
    assert settle(page) == "7"
    assert page.evaluate("scrollY") == 0


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["tanh", "colour"])
def test_it_fits_and_can_be_read(
    name: str, width: int, scheme: str, visit: Visit, tmp_path: Path
) -> None:
    (tmp_path / "model.html").write_text(self_contained(small(name)))
    page = visit(tmp_path / "model.html", width, scheme)
    photograph(1).save(tmp_path / "picture.png")
    page.locator("#file").set_input_files(tmp_path / "picture.png")
    page.wait_for_timeout(300)
    settle(page)
    assert page.locator("#problem").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#canvas").bounding_box()["width"] >= 0.4 * width
    assert page.evaluate(_CONTRAST) >= 4.5  # WCAG
    for button in page.locator("button, .button").all():
        assert button.bounding_box()["height"] >= 44  # for a finger


_CONTRAST = """() => {
  const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    const css = getComputedStyle(element).backgroundColor;
    return css === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : css;
  };
  const texts = "h1, h2, p, b, li span, figcaption, button, .button";
  const ratios = [...document.querySelectorAll(texts)]
    .filter(element => element.innerText)
    .map(element => [getComputedStyle(element).color, ground(element)].map(light))
    .map(pair => (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
  return Math.min(...ratios);
}"""
