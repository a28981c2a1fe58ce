"""Where the seconds of a small CNN go: the networks of `conv.yaml` and `records/cnn_15s.yaml`.

A step is measured on mini-batches of 128, in fp32 and in bf16, with all cores:

- floor: each convolution and each linear layer alone, forward and backward, added up;
- bare: a plain loop on images that lie ready: channels_last, SGD with momentum, memory that the
  process keeps;
- contiguous: likewise, but not channels_last;
- compiled: bare, with `torch.compile`, whose compilation is not counted;
- ours: `Trainer.fit` with everything that the command `fit` turns on: images taken from the set,
  the training step, metrics, callbacks, log, bar.

Then what mini-batches of other sizes give, and four networks trained on the same mini-batches: one
after the other; as one network of grouped convolutions; by `torch.func.vmap`. And two processes
with a thread each.

Each way is a process of its own, and the ways alternate; floor, bare and ours are measured in three
processes each. A figure is the median over all steps but each run's first five: of mini-batches of
other sizes for an image, of a pair of processes for the images of one.
"""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, mnist, quietly, trainer
from resnet import Clock
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from mnist_lightning.configs import find_config, read_config
from mnist_lightning.models.convolution import ConvNetwork
from mnist_lightning.training.execution import kept_memory

BATCH, MEMBERS = 128, 4
NETWORKS = ("conv", "cnn_15s")
BATCHES = (32, 64, 128, 256, 512)


def model(name: str) -> ConvNetwork:
    settings = read_config(find_config(name))["model"]["init_args"]
    return ConvNetwork(**{**settings, "schedule": "constant"})


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 1, 28, 28), torch.randint(10, (size,))


@contextmanager
def computing(bf16: bool) -> Iterator[None]:
    # without its cache, as in Lightning: weights that change are cast to bf16 in each step
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False)
    with kept_memory(), autocast:
        yield


def timed(step: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each step but the first five."""
    ends = []
    for _ in range(steps + 5):
        step()
        ends.append(time.perf_counter())
    return [end - start for start, end in pairwise(ends[4:])]


def loop(name: str, steps: int, bf16: bool, size: int = BATCH, layout: str = "") -> list[float]:
    net = model(name).net
    if layout == "contiguous":
        net = net.to(memory_format=torch.contiguous_format)
    images, labels = batch(size)
    optimizer = sgd(net)
    forward = torch.compile(net) if layout == "compiled" else net

    def step() -> None:
        loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with computing(bf16):
        return timed(step, steps)


def floor(name: str, steps: int, bf16: bool) -> list[float]:
    """Each layer's inputs are noted in a pass through the network."""
    net = model(name).net
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        needed = bool(calls)  # nobody needs the gradient of the images
        calls.append((layer, inputs[0].detach().requires_grad_(needed), torch.randn_like(output)))

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    with computing(bf16):
        net(batch()[0])
        for layer, _, _ in calls:
            layer._forward_hooks.clear()

        def step() -> None:
            for layer, inputs, gradient in calls:
                layer(inputs).backward(gradient)
            net.zero_grad()

        return timed(step, steps)


def ours(name: str, steps: int, bf16: bool) -> list[float]:
    clock = Clock()
    data = mnist(images=(steps + 6) * BATCH, batch_size=BATCH)
    with quietly() as folder:
        trainer(
            folder,
            clock,
            precision="bf16-mixed" if bf16 else "32-true",
            max_epochs=1,
            limit_val_batches=1,
        ).fit(model(name), data)
    return [end - start for start, end in pairwise(clock.ends[5:])]


class Grouped(nn.Module):
    """Networks as one: their convolutions are groups, their linear layers a batched product."""

    def __init__(self, nets: list[nn.Sequential]) -> None:
        super().__init__()
        self.members = len(nets)
        self.layers = nn.ModuleList(self._joined([*layers]) for layers in _side_by_side(nets))

    def _joined(self, layers: list[nn.Module]) -> nn.Module:
        first: Any = layers[0]
        if isinstance(first, nn.Conv2d):
            joined: Any = nn.Conv2d(
                first.in_channels * self.members,
                first.out_channels * self.members,
                first.kernel_size,  # type: ignore[arg-type]
                padding=first.padding,  # type: ignore[arg-type]
                groups=self.members,
                bias=False,
            )
        elif isinstance(first, nn.BatchNorm2d):
            joined = nn.BatchNorm2d(first.num_features * self.members)
        elif isinstance(first, nn.Linear):
            return Stacked(layers)
        else:
            return first
        state = [layer.state_dict() for layer in layers]
        joined.load_state_dict(
            {
                key: torch.cat([s[key] for s in state]) if s0.ndim else s0
                for key, s0 in state[0].items()
            }
        )
        return joined.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = images.repeat(1, self.members, 1, 1)
        for layer in self.layers:
            if isinstance(layer, nn.Flatten):
                x = x.unflatten(1, (self.members, -1)).flatten(2).transpose(0, 1)
            else:
                x = layer(x)
        return x  # (members, b, classes)


class Stacked(nn.Module):
    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def _side_by_side(nets: list[nn.Sequential]) -> Iterator[tuple[nn.Module, ...]]:
    """The same layer of each network, in order, without the stages around them."""
    for parts in zip(*nets, strict=True):
        if isinstance(parts[0], nn.Sequential):
            yield from _side_by_side(list(parts))
        else:
            yield parts


def one_by_one(name: str, steps: int, bf16: bool) -> list[float]:
    nets = [model(name).net for _ in range(MEMBERS)]
    optimizers = [sgd(net) for net in nets]
    images, labels = batch()

    def step() -> None:
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with computing(bf16):
        return timed(step, steps)


def grouped(name: str, steps: int, bf16: bool) -> list[float]:
    net = Grouped([model(name).net for _ in range(MEMBERS)])  # type: ignore[misc]
    optimizer = sgd(net)
    images, labels = batch()
    labels = labels.repeat(MEMBERS)

    def step() -> None:
        loss = F.cross_entropy(net(images).flatten(0, 1), labels) * MEMBERS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with computing(bf16):
        return timed(step, steps)


def vmapped(name: str, steps: int, bf16: bool) -> list[float]:
    nets = [model(name).net for _ in range(MEMBERS)]
    for net in nets:
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):  # vmap cannot change the running statistics
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    parameters, buffers = stack_module_state(nets)
    skeleton = copy.deepcopy(nets[0]).to("meta")
    images, labels = batch()

    def loss(parameters: Any, buffers: Any) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, (parameters, buffers), (images,)), labels)

    gradients = vmap(grad(loss))
    moments = {key: torch.zeros_like(value) for key, value in parameters.items()}

    @torch.no_grad()
    def step() -> None:
        for key, gradient in gradients(parameters, buffers).items():
            moments[key].mul_(0.9).add_(gradient)
            parameters[key].sub_(0.01 * (gradient + 0.9 * moments[key]))

    with computing(bf16):
        return timed(step, steps)


WAYS: dict[str, Callable[..., list[float]]] = {
    "floor": floor,
    "bare": loop,
    "contiguous": partial(loop, layout="contiguous"),
    "compiled": partial(loop, layout="compiled"),
    "ours": ours,
    **{f"batch {size}": partial(loop, size=size) for size in BATCHES},
    "four, one by one": one_by_one,
    "four, grouped": grouped,
    "four, vmap": vmapped,
}
PAIR = "pair"
MAIN = ("floor", "bare", "ours")  # in several rounds, since processes differ by a fifth


def start(way: str, name: str, steps: int, bf16: bool, threads: int) -> "subprocess.Popen[str]":
    words = [way, name, str(steps), str(int(bf16)), str(threads)]
    return subprocess.Popen(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def measured(way: str, name: str, steps: int, bf16: bool) -> list[float]:
    """Seconds of each step, in a fresh process; of a pair, for the images of one process."""
    if way == PAIR:
        pair = [start("bare", name, steps, bf16, 1) for _ in range(2)]
        both = [json.loads(process.communicate()[0]) for process in pair]
        return [(one + other) / 4 for one, other in zip(*both, strict=True)]
    output, _ = start(way, name, steps, bf16, torch.get_num_threads()).communicate()
    return json.loads(output)  # type: ignore[no-any-return]


def measure(quick: bool) -> dict[str, Any]:
    steps, rounds = (20, 1) if quick else (40, 3)
    seconds: dict[str, list[float]] = {}
    for name in NETWORKS:
        for bf16 in (False, True):
            others = (
                [way for way in (*WAYS, PAIR) if way not in MAIN] if name == NETWORKS[-1] else []
            )
            if bf16 and "four, vmap" in others:
                others.remove("four, vmap")  # its BatchNorm takes no bf16
            for names, times in ((MAIN, rounds), (sorted(others), 1)):
                ways = {way: partial(measured, way, name, steps, bf16) for way in names}
                for way, runs in alternate(ways, times).items():
                    key = f"{name}, {'bf16' if bf16 else 'fp32'}, {way}"
                    images = int(way.split()[1]) if way.startswith("batch") else 1
                    seconds[key] = [step / images for run in runs for step in run]
    return {"images": BATCH, "seconds": seconds}


if __name__ == "__main__":
    way, name, *numbers = sys.argv[1:]
    steps, bf16, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print(json.dumps(WAYS[way](name, steps, bool(bf16))))
