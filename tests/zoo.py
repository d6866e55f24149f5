"""Many models and operators whose cores are taken back anywhere inside their requests: are the results the same?

Run by test_zoo.py in a process of its own: `python -m tests.zoo SECONDS NAME...` prints one JSON line for each of the
zoo, or for those named, that was tried for SECONDS each. The borrower has one thread and one lender, on words that
nobody else uses; a thread of this process plays the lender.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ts_plugin.lending import library
from ts_plugin.lending.words import HEAD, SIZE, SLOT
from ts_plugin.worker import openmp

openmp.load()

import torch  # noqa: E402 - libgomp first

WANTED = HEAD.size + SLOT.size + 4  # where the lender's word lies
Model = tuple[str, Callable[[Any], Any], torch.Tensor]


def vision() -> Iterator[Model]:
    import torchvision

    image = torch.rand(1, 3, 96, 96)
    for name in ("resnet18", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x1_0", "convnext_tiny"):
        model = getattr(torchvision.models, name)(weights=None).eval()
        yield name, model, image
        if name in ("resnet18", "mobilenet_v3_small"):
            traced = torch.jit.trace(model, image, check_trace=False)  # type: ignore[no-untyped-call]
            yield f"{name} traced", traced, image
            yield f"{name} frozen", torch.jit.optimize_for_inference(torch.jit.freeze(traced)), image
    transformer = torchvision.models.VisionTransformer(96, 16, 4, 4, 128, 256).eval()
    torch.nn.init.normal_(transformer.heads[0].weight)  # zero at first, as everything that comes out is then
    yield "vit", transformer, image
    yield "swin", torchvision.models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4]).eval(), image


def layers() -> Iterator[Model]:
    lstm = torch.nn.LSTM(256, 256, 2, batch_first=True).eval()
    yield "lstm", lambda x: lstm(x)[0], torch.rand(1, 50, 256)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    yield "transformer", torch.nn.TransformerEncoder(layer, 2).eval(), torch.rand(2, 128, 256)
    dense = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 512))
    yield "dynamic int8", _quantized(dense), torch.rand(64, 512)
    bag = torch.nn.EmbeddingBag(20000, 256, mode="mean").eval()
    yield "embedding bag", bag, torch.randint(0, 20000, (512, 64))


def _quantized(model: torch.nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})  # type: ignore[no-untyped-call]


def operators() -> Iterator[Model]:
    square = torch.rand(600, 400)
    yield "fft sort cumsum", lambda x: torch.fft.rfft2(x).abs().sort(-1).values.cumsum(-1), torch.rand(32, 128, 128)
    yield (
        "scans and reductions",
        lambda x: torch.stack([x.cumsum(0).sum(), x.logcumsumexp(1).max(), x.topk(50, 1).values.sum(), x.std(0).sum()]),
        square,
    )
    yield (
        "indices",
        lambda x: torch.stack([torch.nn.functional.embedding((x[0] * 100).long(), x).sum(), x.unique().sum()]),
        square,
    )
    yield (
        "histc median svd softmax",
        lambda x: torch.stack(
            [
                x.histc(50).sum(),
                x.median(1).values.sum(),
                torch.linalg.svdvals(x[:64, :64]).sum(),
                (x @ x.T).softmax(-1).sum(),
            ]
        ),
        square,
    )
    yield (
        "bmm conv1d conv3d",
        lambda x: torch.cat(
            [
                torch.bmm(x, x).flatten(),
                torch.nn.functional.conv1d(x, x.new_ones(8, x.shape[1], 3)).flatten(),
                torch.nn.functional.conv3d(x[None, None], x.new_ones(4, 1, 3, 3, 3)).flatten(),
            ]
        ),
        torch.rand(24, 96, 96),
    )


def compiled() -> Iterator[Model]:
    """Code that Inductor writes, with loops of its own."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.LayerNorm(512))
    yield "compiled", torch.compile(model.eval()), torch.rand(256, 512)


ZOO = {"vision": vision, "layers": layers, "operators": operators, "compiled": compiled}


class Flicker(threading.Thread):
    """The lender: wants its slice for a moment, at random times."""

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(daemon=True)
        self._memory = memory
        SLOT.pack_into(memory, HEAD.size + SLOT.size, 0, 0, 0, 0, 0, 0, 0, 10**12)  # no region is long for it
        self.took = 0.01  # seconds of the latest request

    def run(self) -> None:
        chance = random.Random(1)
        while True:
            self._memory[WANTED] = 0
            time.sleep(chance.random() * 1.5 * self.took)
            self._memory[WANTED] = 1
            time.sleep(0.0003)


def main(seconds: float, parts: list[str]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    memory = mmap.mmap(-1, SIZE)
    worker = library.Worker(memory, -1, 0, pid=os.getpid(), start_time=0)
    worker.plan(0, 1, None, [(1, 1, None)])
    worker.end()
    if why := library.what_keeps_from_borrowing():
        sys.exit(why)
    flicker = Flicker(memory)
    flicker.start()
    for part in parts or ZOO:
        with torch.inference_mode():
            for name, model, example in ZOO[part]():
                print(json.dumps({"part": part, **tried(name, model, example, worker, flicker, seconds)}), flush=True)


def tried(
    name: str, model: Callable[[Any], Any], example: torch.Tensor, worker: library.Worker, flicker: Flicker, span: float
) -> dict[str, Any]:
    narrow = model(example).clone()
    torch.set_num_threads(2)
    wide = model(example).clone()
    torch.set_num_threads(1)
    usual = (narrow - wide).abs().max().item()
    worst, requests, began, taken, regions = 0.0, 0, 0, 0, 0
    end = time.monotonic() + span
    while time.monotonic() < end:
        library.what_keeps_from_borrowing()  # sees to what torch.compile has loaded, as each request does
        started = time.monotonic()
        worker.begin(2, 0.0)
        try:
            result = model(example)
        finally:
            answer = worker.end()
        flicker.took = time.monotonic() - started
        worst = max(worst, (result - narrow).abs().max().item())
        requests, began = requests + 1, began + (answer.began == 2)
        taken, regions = taken + (answer.handed_back or answer.lost), regions + answer.regions
    return {
        "name": name,
        "requests": requests,
        "wide": began,
        "taken": taken,
        "regions": regions,
        "worst": worst,
        "allowed": max(10 * usual, 2e-5 * narrow.abs().max().item()),
    }


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
