"""The network's time and memory against the published recurrence, DiT, and the bare matrix products.

    python benchmarks/network.py [--sizes S B XL] [--compile] [--json FILE]

For each size, in one run, its contenders taking turns:
  ours       this FPDM, one layer before and one after the implicit one
  published  (a) a plain transcription of the published recurrence with the same parameters: nothing is computed once,
             and the iterations "without gradient" build their graph all the same. Its linear layers are torch's, in
             float32 on a CPU MKL's, where ours are oneDNN's (fpdm/linear.py)
  pub+linear the same on our linear layers: what the arithmetic saves without the faster kernels
  dit        (b) DiT of the same width, 28 layers deep
  products   (c) only the matrix products of ours, by the same kernels, operands preallocated: the limit
A training step is forward and backward, without the optimiser, with the given n and m. Of each contender's rounds the
fastest counts, and on the CPU time is this process's CPU time: the rest is the machine's other load.
Memory is the peak of the tensors allocated: of activations during the forward pass, of a step with the gradients too.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, would report on itself

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from fpdm import SIZES, Denoiser, DenoiserConfig, build_denoiser
from fpdm.blocks import Attention, Block, unpatchify
from fpdm.linear import linear

DIT_DEPTH = 28
ITERATIONS = (8, 26)  # of a sampling call: 28 calls of 8 are the paper's 280 blocks, 20 of 26 its 560
TRAINING = (6, 6)  # n and m of a training step: the largest of the default recipe
LONG_TAIL = (12, 1)  # where what a graph in the no-gradient part costs shows most
BATCH = {"S": 4, "B": 1, "L": 1, "XL": 1}


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against one contender, the ratio below 1 where ours is faster or smaller."""

    measurement: str
    contender: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    aim: str = ""

    def __str__(self) -> str:
        amounts = f"{self.ours:10.4g} {self.theirs:10.4g} {self.unit:4}"
        return f"{self.measurement:44} {self.contender:10} {amounts} {self.ratio:6.3f}  {self.aim}".rstrip()


class Published:
    """The published recurrence, transcribed, on the parameters of one of our networks.

    `product` computes its linear layers; embeddings and the last layer, a part in hundreds, are the network's own.
    """

    def __init__(self, model: Denoiser, product: Callable[..., Tensor]) -> None:
        self.model, self.product = model, product

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, n: int, m: int) -> Tensor:
        model = self.model
        label = model.y_embedder(y)
        c = model.t_embedder(t, x.dtype) + label
        z = model.x_embedder(x) + model.pos_embed
        for block in model.blocks_pre:
            z = self.block(block, z, label)
        injection = self.linear(z, model.block_pre_projection)
        with nullcontext():
            for _ in range(n):
                z = self.iterate(z, injection, c)
        z = z.detach() if n else z
        for _ in range(m):
            z = self.iterate(z, injection, c)
        for block in model.blocks_post:
            z = self.block(block, z, label)
        return unpatchify(model.final_layer(z, label), model.config.patch_size)

    def iterate(self, z: Tensor, injection: Tensor, c: Tensor) -> Tensor:
        fc1, fc2 = self.model.block_fixed_point_projection_fc1, self.model.block_fixed_point_projection_fc2
        hidden = self.product(torch.cat([z, injection], dim=-1), fc1.weight, fc1.bias)
        return self.block(self.model.block_fixed_point, self.linear(F.gelu(hidden, approximate="tanh"), fc2), c)

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.product(x, layer.weight, layer.bias)

    def block(self, block: Block, x: Tensor, c: Tensor) -> Tensor:
        parts = self.linear(F.silu(c), block.adaLN_modulation[1]).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.unsqueeze(1) for part in parts)
        x = x + gate1 * self.attention(block.attn, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        hidden = F.gelu(self.linear(y, block.mlp.fc1), approximate="tanh")
        return x + gate2 * self.linear(hidden, block.mlp.fc2)

    def attention(self, attention: Attention, x: Tensor) -> Tensor:
        qkv = self.linear(x, attention.qkv).unflatten(-1, (3, attention.config.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        return self.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), attention.proj)


class Products:
    """The matrix products of `calls`, counted from the shapes, with operands allocated before; without a graph."""

    def __init__(self, config: DenoiserConfig, batch: int, device: str) -> None:
        tokens, width, heads = config.num_tokens, config.hidden_size, config.num_heads
        rows, hidden = batch * tokens, int(config.mlp_ratio * config.hidden_size)
        attention = [(batch * heads, tokens, width // heads, tokens), (batch * heads, tokens, tokens, width // heads)]
        layers = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        block = attention + [(1, rows, k, n) for k, n in layers]
        self.block = [self._operands(shape, device) for shape in block]
        self.projection = [
            self._operands((1, rows, *shape), device) for shape in ((width, 2 * width), (2 * width, width))
        ]
        self.once = [self._operands((1, rows, *shape), device) for shape in ((width, width), (width, 2 * width))]

    @staticmethod
    def _operands(shape: tuple[int, int, int, int], device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the product itself, and of its two gradients: a (b, m, k) @ b (b, k, n), dc @ b.T, a.T @ dc."""
        batch, m, k, n = shape
        a, b, c = (torch.randn(batch, *size, device=device) for size in ((m, k), (n, k), (m, n)))
        return [(a, b.mT, c), (c, b, torch.empty_like(a)), (c.mT, a, torch.empty_like(b))]

    @torch.no_grad()
    def __call__(self, outer_depth: int, n: int, m: int, backward: bool) -> None:
        """Products of a call with n iterations without and m with gradient; m of 0 and no backward is sampling."""
        self._run(self.block, outer_depth, backward)
        self._run(self.once, 1, backward)
        for iterations, differentiated in ((n, False), (m, backward)):
            self._run(self.block + self.projection, iterations, differentiated)

    @staticmethod
    def _run(products: list[list[tuple[Tensor, Tensor, Tensor]]], times: int, backward: bool) -> None:
        for _ in range(times):
            for forward, *gradients in products:
                for a, b, out in [forward, *gradients] if backward else [forward]:
                    if len(a) == 1:
                        linear(a[0], b[0].mT)
                    else:
                        torch.bmm(a, b, out=out)


def product_ratio(config: DenoiserConfig, n: int, m: int, backward: bool) -> float:
    """Multiplications of ours over the published recurrence's, in units of width**2 a token."""
    block = 4 + 2 * config.mlp_ratio + 2 * config.num_tokens / config.hidden_size
    times = 3 if backward else 1
    outer = config.blocks(0) * block

    def total(once: int, projection: int) -> float:
        return times * (outer + once) + (n + times * m) * (block + projection)

    return total(3, 4) / total(1, 6)


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = timed(call, device)
            if number:
                times[name].append(seconds)
    return times


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors allocated at once by a call, beyond what was there before."""
    call()  # so that what is kept once and for all is there
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


class Contenders:
    """What is compared at one size: calls without arguments, by name."""

    def __init__(self, size: str, batch: int, device: str) -> None:
        options = SIZES[size] | {"depth": DIT_DEPTH}
        self.ours = build_denoiser(DenoiserConfig(**options), device=device)
        self.dit = build_denoiser(DenoiserConfig(kind="dit", **options), device=device)
        self.published = Published(self.ours, F.linear)
        self.published_on_our_linear = Published(self.ours, linear)
        self.products = Products(self.ours.config, batch, device)
        self.outer_depth = self.ours.config.blocks(0)
        x = torch.randn(batch, 4, 32, 32, device=device)
        self.inputs = x, torch.full((batch,), 500, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def sampling(self, iterations: int, *, compiled: bool) -> dict[str, Callable[[], object]]:
        wrap = torch.compile if compiled else lambda call: call

        def ours() -> Tensor:
            return self.ours(*self.inputs, iterations=iterations).output

        def published() -> Tensor:
            return self.published(*self.inputs, 0, iterations)

        def on_our_linear() -> Tensor:
            return self.published_on_our_linear(*self.inputs, 0, iterations)

        three = {"ours": ours, "published": published, "pub+linear": on_our_linear}
        calls: dict[str, Callable[[], object]] = {name: torch.no_grad()(wrap(call)) for name, call in three.items()}
        if compiled:
            return calls
        calls["dit"] = torch.no_grad()(lambda: self.dit(*self.inputs).output)
        return calls | {"products": lambda: self.products(self.outer_depth, 0, iterations, False)}

    def training(self, n: int, m: int) -> dict[str, Callable[[], object]]:
        return {
            "ours": lambda: self._differentiate(self.ours, self.ours(*self.inputs, iterations=(n, m)).output),
            "published": lambda: self._differentiate(self.ours, self.published(*self.inputs, n, m)),
            "pub+linear": lambda: self._differentiate(self.ours, self.published_on_our_linear(*self.inputs, n, m)),
            "dit": lambda: self._differentiate(self.dit, self.dit(*self.inputs).output),
            "products": lambda: self.products(self.outer_depth, n, m, True),
        }

    def forward(self, n: int, m: int) -> dict[str, Callable[[], object]]:
        return {
            "ours": lambda: self.ours(*self.inputs, iterations=(n, m)).output,
            "published": lambda: self.published(*self.inputs, n, m),
            "dit": lambda: self.dit(*self.inputs).output,
        }

    @staticmethod
    def _differentiate(model: Denoiser, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().mean(), list(model.parameters()))


def time_rows(title: str, times: dict[str, list[float]], aim: float, allowed: float) -> list[Row]:
    """Ours against each contender; the fastest round of each. `allowed`: what the matrix products alone would give."""
    fastest = {name: min(seconds) for name, seconds in times.items()}
    ours = fastest.pop("ours")
    rows = [Row(title, name, "s", ours, theirs, ours / theirs) for name, theirs in fastest.items()]
    aims = {
        "published": f"at most {aim}",
        "pub+linear": f"products alone {allowed:.3f}",
        "products": "at most 1.176 (0.85 of the limit)",
    }
    return [replace(row, aim=aims.get(row.contender, "")) for row in rows]


def memory_rows(title: str, calls: dict[str, Callable[[], object]], aim: str, device: str) -> list[Row]:
    peaks = {
        name: peak_bytes(call, device) / 2**20 for name, call in calls.items() if name not in ("products", "pub+linear")
    }
    ours = peaks.pop("ours")
    return [
        Row(title, name, "MiB", ours, theirs, ours / theirs, aim if name == "published" else "")
        for name, theirs in peaks.items()
    ]


def measure(size: str, contenders: Contenders, rounds: int, device: str, *, compiled: bool) -> Iterator[list[Row]]:
    config = contenders.ours.config
    for count in ITERATIONS:
        allowed = product_ratio(config, 0, count, False)
        times = take_turns(contenders.sampling(count, compiled=False), rounds, device)
        yield time_rows(f"sampling call, {count} iterations", times, 0.92, allowed)
        if compiled:
            times = take_turns(contenders.sampling(count, compiled=True), rounds, device)
            yield time_rows(f"the same compiled, {count} iterations", times, 0.90, allowed)
    n, m = TRAINING
    training = contenders.training(n, m)
    title = f"training step, n = {n}, m = {m}"
    yield time_rows(title, take_turns(training, rounds, device), 0.90, product_ratio(config, n, m, True))
    yield memory_rows("sampling call, peak memory", contenders.sampling(ITERATIONS[0], compiled=False), "", device)
    yield memory_rows(f"{title}, peak memory", training, "", device)
    n, m = LONG_TAIL
    title = f"activations, n = {n}, m = {m}, peak memory"
    yield memory_rows(title, contenders.forward(n, m), "at most 0.30", device)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["S", "B", "XL"])
    parser.add_argument("--rounds", type=count_argument, default=5, help="rounds that count, after one to warm up (5)")
    parser.add_argument("--threads", type=count_argument, default=1, help="of the CPU (1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also compare sampling under torch.compile (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = show_machine()
    found: list[dict[str, object]] = []
    for size in arguments.sizes:
        print(f"\n{size}/2, batch {BATCH[size]}, float32, {arguments.device}, {arguments.threads} threads")
        print(f"{'':44} {'against':10} {'ours':>10} {'theirs':>10}      {'ratio':>6}  aim", flush=True)
        contenders = Contenders(size, BATCH[size], arguments.device)
        for rows in measure(size, contenders, arguments.rounds, arguments.device, compiled=arguments.compile):
            for row in rows:
                print(row, flush=True)
                found.append({"size": size, "batch": BATCH[size], **asdict(row)})
    if arguments.json:
        record = {**machine, "device": arguments.device, "threads": arguments.threads, "rows": found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
