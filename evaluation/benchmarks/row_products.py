"""Where the time of a step and of a block of the verified mode goes: products of a few rows by both kernels, and parts.

    python -m evaluation.benchmarks.row_products --out rows.json

Products: chains of one shape with weights of their own, and of a whole LLM's shapes in order, each a CUDA graph whose
kernels start early, as the engine's do. `one` is the kernel of single rows, `rows` that of `fused_rows`; what each is
off from float64 stands beside. Steps: a model's own step of one and of two rows, which are what drafting reads, too.
Parts: graphs of a block, of its drafting, of its verifying and of the LLM's own step, whole and with kernels left out.
Steps and parts have the kernels that the engine chooses. Microseconds; the last line is one JSON object.
"""

import argparse
import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.benchmarks.report import report
from evaluation.decoding.shapes import SHAPES, build
from llmslm.generation.families import read
from llmslm.generation.plan import Decoder, Linear, Norm
from llmslm.generation.state import CacheShape, DecodeState
from llmslm.generation.step import TorchStep

ONE, ROWS = "one", "rows"
Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Product:
    """One of a layer's products: outputs and inputs; with a norm before it or the residual behind it.

    The norm is an RMS norm, or layer norm with a bias if `centred`.
    """

    name: str
    outputs: int
    inputs: int
    normed: bool = False
    gated: bool = False
    centred: bool = False
    biased: bool = False
    activation: str | None = None

    def linear(self, device: torch.device, dtype: torch.dtype) -> Linear:
        """It with random weights."""
        height = self.outputs * (2 if self.gated else 1)
        weight = torch.randn(height, self.inputs, device=device) / self.inputs**0.5
        bias = torch.randn(height, device=device).to(dtype) if self.biased else None
        return Linear(weight.to(dtype), bias, self.activation, self.gated)


def layer(width: int, wide: int, *, gated: bool, qkv: int | None = None) -> list[Product]:
    """The products of a layer; queries, keys and values are as wide as three inputs if nothing else is said."""
    return [
        Product("qkv", qkv or 3 * width, width, normed=True),
        Product("out", width, width),
        Product("up", wide, width, normed=True, gated=gated, activation="silu" if gated else None),
        Product("down", width, wide),
    ]


def gpt2_layer(width: int) -> list[Product]:
    """The products of a layer of GPT-2: layer norms, and biases everywhere."""
    qkv, out, up, down = layer(width, 4 * width, gated=False)
    qkv, up = replace(qkv, centred=True), replace(up, centred=True, activation="gelu_tanh")
    return [replace(product, biased=True) for product in (qkv, out, up, down)]


LAYERS = {
    "llama-24x576": (layer(576, 1536, gated=True), Product("head", 16384, 576, normed=True), 24),
    "t5-24x512": (layer(512, 2048, gated=False), Product("head", 32128, 512, normed=True), 24),
    "gpt2": (gpt2_layer(768), Product("head", 50257, 768, normed=True, centred=True), 12),
    "llama-4x256": (layer(256, 704, gated=True), Product("head", 16384, 256, normed=True), 4),
    "llama-4x512": (layer(512, 1408, gated=True), Product("head", 16000, 512, normed=True), 4),
    "llama-22x2048": (layer(2048, 5632, gated=True, qkv=2560), Product("head", 32000, 2048, normed=True), 22),
}
STEPS = ["llama-24x576", "llama-4x256", "llama-4x512", "gpt2", "t5-small", "llama-22x2048"]


class Products:
    """Products of one shape or of a layer's, by one kernel.

    Args:
        kernel: `ONE` or `ROWS`.
        rows: of the input.
        device: where; elsewhere than on CUDA, Triton's interpreter runs the kernels.
    """

    def __init__(self, kernel: str, rows: int, device: torch.device) -> None:
        from llmslm.generation.fused import FusedStep

        self.kernel, self.rows, self.device = kernel, rows, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        tiny = torch.zeros(8, 8, device=device, dtype=self.dtype)
        shape = CacheShape(1, 1, 4, 8)
        decoder = Decoder(embedding=tiny, head=Linear(tiny), sublayers=[], shape=shape)
        state = DecodeState(
            shape,
            batch=rows,
            capacity=4,
            encoder_capacity=0,
            mode="plain",
            penalise=False,
            device=device,
            dtype=self.dtype,
        )
        self.step, self.plain = FusedStep(decoder, state, early=device.type == "cuda"), TorchStep(decoder, state)

    def run(self, x: Tensor, linear: Linear, norm: Norm | None, residual: Tensor | None) -> Tensor:
        """One product."""
        from llmslm.generation import fused_rows

        if self.kernel == ROWS:
            return fused_rows.rows_product(x, linear, norm, residual, self.step.options)
        with fused_rows.left_out():
            return self.step.linear(x, linear, norm, residual)

    def norm(self, width: int, *, centred: bool) -> Norm:
        """A random one, with a bias if it is centred."""
        weight = torch.rand(width, device=self.device) + 0.5
        bias = torch.randn(width, device=self.device).to(self.dtype) if centred else None
        return Norm(weight.to(self.dtype), bias, 1e-5, centred)

    def drawn(self, width: int) -> Tensor:
        """Random input, of a root mean square that is not 1."""
        return (3 * torch.randn(self.rows, width, device=self.device)).to(self.dtype)

    def off(self, product: Product) -> float:
        """By how much one product is off from float64, relatively."""
        x, linear = self.drawn(product.inputs), product.linear(self.device, self.dtype)
        norm = self.norm(product.inputs, centred=product.centred) if product.normed else None
        residual = None if product.normed else self.drawn(product.outputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        ours = self.run(x, linear, norm, residual).double()
        bias = None if linear.bias is None else linear.bias.double()
        wide = Linear(linear.weight.double(), bias, linear.activation, linear.gated)
        shift = None if norm is None or norm.bias is None else norm.bias.double()
        wide_norm = norm and Norm(norm.weight.double(), shift, norm.eps, norm.centred)
        exact = self.plain.linear(x.double(), wide, wide_norm, None if residual is None else residual.double())
        return float((ours - exact).norm() / exact.norm())

    def chain(self, products: list[Product], times: int) -> Callable[[], Any]:
        """Products one after another, each with weights of its own and after the one before it."""
        weights = [[product.linear(self.device, self.dtype) for product in products] for _ in range(times)]
        widths = {product.inputs for product in products} | {product.outputs for product in products}
        centred = any(product.centred for product in products)
        norms = {width: self.norm(width, centred=centred) for width in widths}
        inputs = {width: self.drawn(width) for width in widths}

        def work() -> Tensor:
            x = inputs[products[0].inputs]
            residual = {product.outputs: inputs[product.outputs] for product in products if not product.normed}
            for linears in weights:
                for product, linear in zip(products, linears, strict=True):
                    size = self.rows * product.inputs
                    # A product that is too narrow for the next one only comes before it.
                    given = x if x.numel() < size else x.flatten()[:size].view(self.rows, product.inputs)
                    given = given if given.shape[1] == product.inputs else inputs[product.inputs]
                    if product.normed:
                        x = self.run(given, linear, norms[product.inputs], None)
                    else:
                        x = residual[product.outputs] = self.run(given, linear, None, residual[product.outputs])
            return x

        return work


@contextmanager
def changed(owner: Any, name: str, *, value: Any) -> Iterator[None]:
    """An attribute that has another value for a while."""
    own = vars(owner).get(name, changed)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is changed:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@torch.no_grad()
def graph_microseconds(work: Callable[[], Any], rounds: int = 7, replays: int = 10) -> float:
    """What a CUDA graph of this work takes: the median of rounds of replays in a row."""
    torch.cuda.synchronize()
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / replays)
    del kept
    return statistics.median(times)


def measure_products(model: str, kernel: str, rows: int, device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Microseconds a kernel of each shape and of the whole, and what each shape is off from float64."""
    layer_products, head, layers = LAYERS[model]
    products, shapes = Products(kernel, rows, device), [*layer_products, head]
    found = []
    for product in shapes:
        times = 12 if product is head else 120
        microseconds = clock(products.chain([product], times)) / times
        found.append({"product": product.name, "us": microseconds, "off": products.off(product)})
    whole = clock(products.chain(layer_products, layers)) / (layers * len(layer_products))
    found.append({"product": "layers", "us": whole, "off": 0.0})
    return [{"model": model, "kernel": kernel, "rows": rows, **entry} for entry in found]


def _compile_products(model: str, kernel: str, rows: int) -> None:
    """Leave the kernels of these products in Triton's cache."""
    layer_products, head, _ = LAYERS[model]
    products = Products(kernel, rows, torch.device("cuda"))
    for product in [*layer_products, head]:
        products.off(product)
    torch.cuda.synchronize()


def _compile_steps(name: str) -> None:
    """Leave the kernels of a model's steps there."""
    measure_steps(name, torch.device("cuda"), lambda work: float(work() is None))
    torch.cuda.synchronize()


def compile_ahead(jobs: list[Callable[[], None]], workers: int) -> None:
    """Compile in several processes, so that what is measured afterwards finds its kernels."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(job) for job in jobs]:
            error = future.exception()
            if error is not None:
                print(f"not compiled ahead: {type(error).__name__}: {str(error)[:200]}")


@torch.no_grad()
def measure_steps(name: str, device: torch.device, clock: Clock, filled: int = 192) -> list[dict[str, Any]]:
    """Microseconds of a model's own step of one row and of two, behind so many tokens."""
    from llmslm.generation.fused import FusedStep

    decoder = read(build(SHAPES[name], device, torch.bfloat16 if device.type == "cuda" else torch.float16), 256)
    found = []
    for rows in (1, 2):
        state = DecodeState(
            decoder.shape,
            batch=rows,
            capacity=256,
            encoder_capacity=128 if decoder.shape.cross_heads else 0,
            mode="plain",
            penalise=False,
            device=device,
            dtype=decoder.embedding.dtype,
        )
        for everything in (state.valid, state.encoder_valid):
            everything.fill_(True)
        for place in (state.slot, state.position):
            place.fill_(filled)
        step = FusedStep(decoder, state, early=device.type == "cuda")
        found.append({"model": name, "rows": rows, "us": clock(functools.partial(step.logits, filled))})
    return found


def parts(block: Any, size: int) -> dict[str, Callable[[], Any]]:
    """The parts of a block of a `FusedVerifiedBlock`, and of the LLM's own step, each as a function."""
    from llmslm.generation.fused import FusedStep

    llm, step = block.llm, block.llm.block_step
    given = block._placed(llm, size + 1)
    rows, decoder = given.tokens.numel(), llm.decoder
    llm.state.slot.copy_(given.positions[:, 0])
    llm.state.position.copy_(given.positions[:, 0])
    alone = FusedStep(decoder, llm.state, early=step.options["EARLY"])
    x = torch.randn(rows, decoder.embedding.shape[1], device=given.tokens.device).to(decoder.embedding.dtype)
    logits = torch.randn(rows, decoder.head.weight.shape[0], device=x.device).to(x.dtype)

    def unattended(qkv: Tensor, inner: Any, *_others: Any) -> Tensor:
        return qkv.flatten()[: qkv.shape[0] * inner.heads * inner.head_dim].view(qkv.shape[0], -1)

    def not_multiplied(x: Tensor, linear: Linear, *_others: Any, **_named: Any) -> Tensor:
        return x.new_empty(x.shape[0], linear.weight.shape[0] // (2 if linear.gated else 1))

    def without(owner: Any, name: str, stub: Callable[..., Tensor], work: Callable[[], Any]) -> Any:
        with changed(owner, name, value=stub):
            return work()

    def read() -> Tensor:
        return step.read(given.tokens, given.positions, 0)

    def read_one() -> Tensor:
        return alone.logits(0)

    return {
        "step": read_one,
        "step, without attention": functools.partial(without, alone, "attended", unattended, read_one),
        "step, without products": functools.partial(without, alone, "linear", not_multiplied, read_one),
        "block": functools.partial(block.run, size),
        "propose": functools.partial(block.propose, size),
        "verify": functools.partial(block.verify, size),
        "read": read,
        "read, without attention": functools.partial(without, step, "attended", unattended, read),
        "read, without products": functools.partial(without, step, "linear", not_multiplied, read),
        "head": lambda: step.linear(x, decoder.head, decoder.final_norm),
        "keep": lambda: block._keep_largest(logits, given.steps.flatten(), size),
        "read on": block.read_on,
    }


def measure_parts(
    engine: Any, sizes: list[int], clock: Clock, prompt: int = 128, new: int = 128
) -> list[dict[str, Any]]:
    """Microseconds of each part of a block of each size, halfway to the last token."""
    ids = torch.randint(3, 60, (1, prompt), device=engine.llm.device)
    mask = torch.ones_like(ids)
    inputs = {"prompt_ids": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}
    engine.generate(**inputs, max_new_tokens=new, min_new_tokens=new)
    block, found = engine.loops[-1].block, []
    for size in sizes:
        with torch.no_grad():
            block.start()
            block.produced.fill_(new // 2)
            block.ended.fill_(1)  # so that it stays where it is
            for name, work in parts(block, size).items():
                found.append({"size": size, "part": name, "us": clock(work)})
    return found


def table(rows: list[dict[str, Any]], down: tuple[str, ...], across: str, value: str = "us") -> Iterator[str]:
    """Lines of a table."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines = dict.fromkeys(tuple(str(row[key]) for key in down) for row in rows)
    wide = max(len(" ".join(line)) for line in lines)
    yield f"{'':{wide}}" + "".join(f"{column!s:>10}" for column in columns)
    for line in lines:
        cells = {row[across]: row[value] for row in rows if tuple(str(row[key]) for key in down) == line}
        shown = "".join(f"{cells[c]:10.3g}" if c in cells else f"{'':10}" for c in columns)
        yield f"{' '.join(line):{wide}}" + shown


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.row_products", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=["llama-24x576", "gpt2", "llama-22x2048"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 5, 8, 13])
    parser.add_argument("--steps", nargs="*", choices=SHAPES, default=STEPS, help="models whose own step is timed")
    parser.add_argument("--llm", choices=SHAPES, default="llama-24x576")
    parser.add_argument("--slm", choices=SHAPES, default="llama-4x256")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4, 7, 12], help="of blocks, whose parts are timed")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args(args)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    from evaluation.benchmarks.verified_block import made
    from llmslm.generation.fused import WIDEST_BATCH

    device, failed = torch.device("cuda"), []
    torch.manual_seed(0)
    cases = [
        (model, kernel, rows)
        for model in options.models
        for kernel in (ONE, ROWS)
        for rows in options.rows
        if kernel != ONE or rows <= WIDEST_BATCH
    ]
    jobs = [functools.partial(_compile_steps, name) for name in options.steps]
    compile_ahead([*jobs, *(functools.partial(_compile_products, *case) for case in cases)], options.workers)

    def tried(case: Any, measure: Callable[..., list[dict[str, Any]]], *given: Any) -> list[dict[str, Any]]:
        try:
            return measure(*given)
        except Exception as error:  # one that fails does not take the others along
            failed.append({"case": case, "error": f"{type(error).__name__}: {str(error)[:300]}"})
            print(failed[-1])
            return []

    def shown(title: str, *of: Any) -> None:
        print("\n".join([title, *(table(*of) if of[0] else ())]))

    products = [row for case in cases for row in tried(case, measure_products, *case, device, graph_microseconds)]
    shown("microseconds a kernel, by rows", products, ("model", "product", "kernel"), "rows")
    shapes = [row for row in products if row["product"] != "layers"]
    shown("relative difference to float64, by rows", shapes, ("model", "product", "kernel"), "rows", "off")
    steps = [row for name in options.steps for row in tried(name, measure_steps, name, device, graph_microseconds)]
    shown("microseconds of a step, by rows", steps, ("model",), "rows")
    found = []
    if options.sizes:
        engine = made(*(build(SHAPES[name], device, torch.bfloat16) for name in (options.llm, options.slm)))
        found = tried("parts", measure_parts, engine, options.sizes, graph_microseconds)
    shown("microseconds of the parts of a block, by its size", found, ("part",), "size")
    record = {"llm": options.llm, "slm": options.slm, "products": products, "steps": steps, "parts": found}
    report({**record, "failed": failed}, options.out)


if __name__ == "__main__":
    main()
