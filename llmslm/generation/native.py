"""One decode step on the CPU, by `native.c`: compiled on first use, in about a second, and kept for later processes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep

# Rows up to which this step was the faster one: GPT-2's shape, two threads of an AMD EPYC with AVX-512. Its time over
# that of plain torch with oneDNN's products: float32 0.6 at 1 row, 0.4 at 4, 0.8 at 16, 1.3 at 64; bfloat16 0.4, 0.4,
# 0.9, 1.3; 8 bits 0.5, 0.5, 1.3, 1.9.
WIDEST_BATCH = {torch.float32: 16, torch.bfloat16: 16, torch.int8: 8}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-lm")
_EMBED, _NORM, _LINEAR, _SELF_ATTENTION, _CROSS_ATTENTION = range(5)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}
_COUNTS = ("kind", "dtype", "rows", "columns", "activation", "gated", "heads", "kv_heads", "head_dim", "capacity")
_POINTERS = ("in_", "out", "weight", "table", "row_scale", "bias", "residual", "norm", "k_norm", "cos", "sin")


class Op(ctypes.Structure):
    """An operation, as `native.c` has it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_COUNTS, "distances", "offset")),
        *((name, ctypes.c_double) for name in ("eps", "scale", "k_eps")),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "distance_bias", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("valid", "token", "position")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled `native.c`; None where there is no C compiler that can make it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.system() != "Linux":
        return None
    source = Path(__file__).with_name("native.c")
    path = _cache_folder() / f"native-{_fingerprint(source, compiler)}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}.part")
            command = [*compiler.split(), str(source), *_FLAGS, "-o", str(aside)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            aside.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmslm"


def _fingerprint(source: Path, compiler: str) -> str:
    """Of all that the compiled library depends on: a home folder may be shared by different machines."""
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))]
    parts = [source.read_text(), compiler, *_FLAGS, *flags[:1]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def can_run(decoder: Decoder, batch: int) -> bool:
    """Whether `NativeStep` serves this decoder at this batch size, and there is a compiler."""
    linears = [linear for sublayer in decoder.sublayers for linear in (sublayer.into, sublayer.out)]
    widest = min(WIDEST_BATCH.get(linear.weight.dtype, 0) for linear in [*linears, decoder.head])
    cached = decoder.embedding.dtype in (torch.float32, torch.bfloat16)
    return cached and batch <= widest and library() is not None


class NativeStep(TorchStep):
    """The step of `TorchStep` as one call; activations are in float32 whatever the weights are.

    Args:
        decoder: what to compute.
        state: what it reads and advances; its buffers keep their place.
    """

    def __init__(self, decoder: Decoder, state: DecodeState) -> None:
        super().__init__(decoder, state)
        found = library()
        assert found is not None
        self._library = found
        self._kept: list[Tensor] = []  # what pointers of the operations point to
        self._ops: list[Op] = []
        width = decoder.embedding.shape[1]
        linears = [linear for sublayer in decoder.sublayers for linear in (sublayer.into, sublayer.out)]
        widest = max(max(linear.weight.shape) for linear in linears)
        self._x, self._normed, self._inner, self._attended = (
            torch.empty(state.batch, size) for size in (width, width, widest, widest)
        )
        self._logits = torch.empty(state.batch, decoder.head.weight.shape[0])
        self._build()
        self._program = (Op * len(self._ops))(*self._ops)
        self._longest = max(state.capacity, state.encoder_capacity) + 16
        self._scratch = torch.empty(0)

    def logits(self, filled: int) -> Tensor:
        """See `TorchStep.logits`; the next call overwrites what this one returns."""
        threads = torch.get_num_threads()
        if self._scratch.numel() < threads * self._longest:
            self._scratch = torch.empty(threads * self._longest)
        sizes = (len(self._program), self.state.batch, filled)
        self._library.run(
            self._program,
            *map(ctypes.c_int64, sizes),
            ctypes.c_void_p(self._scratch.data_ptr()),
            ctypes.c_int64(self._longest),
            ctypes.c_int64(threads),
        )
        return self._logits

    def take_largest(self, logits: Tensor, rules: TokenRules) -> None:
        """See `TorchStep.take_largest`."""
        state = self.state
        if logits is not self._logits:
            super().take_largest(logits, rules)
            return
        token = torch.empty_like(state.token)
        self._library.largest(
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int64(state.batch),
            ctypes.c_int64(logits.shape[1]),
            ctypes.c_void_p(rules.eos.data_ptr()),
            ctypes.c_int64(rules.eos.numel()),
            ctypes.c_void_p(state.step.data_ptr()),
            ctypes.c_int64(int(state.min_new)),
            ctypes.c_void_p(token.data_ptr()),
        )
        state.advance(token, eos=rules.eos, pad=rules.pad)
        state.move_on()

    def _build(self) -> None:
        decoder, state = self.decoder, self.state
        x, embedding = self._x, decoder.embedding
        self._add(
            _EMBED,
            dtype=_DTYPES[embedding.dtype],
            columns=embedding.shape[1],
            scale=decoder.embedding_scale,
            offset=decoder.position_offset,
            weight=embedding,
            table=decoder.positions,
            out=x,
            token=state.token,
            position=state.position,
        )
        self._add_norm(decoder.embedding_norm, x, x)
        for sublayer in decoder.sublayers:
            before = self._add_norm(sublayer.before, x, self._normed)
            self._add_linear(sublayer.into, before, self._inner)
            inner = self._inner
            if isinstance(sublayer.inner, SelfAttention):
                inner = self._add_self_attention(sublayer.inner)
            elif isinstance(sublayer.inner, CrossAttention):
                inner = self._add_cross_attention(sublayer.inner)
            self._add_linear(sublayer.out, inner, x, residual=x)
            self._add_norm(sublayer.after, x, x)
        self._add_linear(decoder.head, self._add_norm(decoder.final_norm, x, self._normed), self._logits)

    def _add(self, kind: int, **fields: Any) -> None:
        op = Op(kind=kind)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            if value is not None:
                setattr(op, name, value)
        self._ops.append(op)

    def _add_norm(self, norm: Norm | None, x: Tensor, out: Tensor) -> Tensor:
        """Add a norm, and give where its result lies; no norm leaves it where it is."""
        if norm is None:
            return x
        fields = {"columns": norm.weight.shape[0], "eps": norm.eps, "scale": norm.scale, "offset": int(norm.centred)}
        self._add(_NORM, in_=x, out=out, norm=_float(norm.weight), bias=_float(norm.bias), **fields)
        return out

    def _add_linear(self, linear: Linear, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        rows, columns = linear.weight.shape
        self._add(
            _LINEAR,
            dtype=_DTYPES[linear.weight.dtype],
            rows=rows // 2 if linear.gated else rows,
            columns=columns,
            activation=_ACTIVATIONS[linear.activation],
            gated=int(linear.gated),
            in_=x,
            out=out,
            weight=linear.weight.contiguous(),
            row_scale=_float(linear.row_scale),
            bias=_float(linear.bias),
            residual=residual,
        )

    def _add_self_attention(self, inner: SelfAttention) -> Tensor:
        decoder, state = self.decoder, self.state
        bias = decoder.distance_bias if inner.biased else None
        keys, values = state.cache[inner.layer]
        self._add(
            _SELF_ATTENTION,
            dtype=_DTYPES[keys.dtype],
            heads=inner.heads,
            kv_heads=inner.kv_heads,
            head_dim=inner.head_dim,
            capacity=state.capacity,
            distances=0 if bias is None else bias.shape[1],
            scale=inner.scale,
            eps=0.0 if inner.q_norm is None else inner.q_norm.eps,
            k_eps=0.0 if inner.k_norm is None else inner.k_norm.eps,
            in_=self._inner,
            out=self._attended,
            norm=None if inner.q_norm is None else _float(inner.q_norm.weight),
            k_norm=None if inner.k_norm is None else _float(inner.k_norm.weight),
            cos=decoder.cos if inner.rotary else None,
            sin=decoder.sin if inner.rotary else None,
            distance_bias=bias,
            keys=keys,
            values=values,
            valid=state.valid,
            position=state.position,
        )
        return self._attended

    def _add_cross_attention(self, inner: CrossAttention) -> Tensor:
        state = self.state
        keys, values = state.cross[inner.layer]
        self._add(
            _CROSS_ATTENTION,
            dtype=_DTYPES[keys.dtype],
            heads=inner.heads,
            kv_heads=inner.heads,
            head_dim=inner.head_dim,
            capacity=state.encoder_capacity,
            scale=inner.scale,
            in_=self._inner,
            out=self._attended,
            keys=keys,
            values=values,
            valid=state.encoder_valid,
        )
        return self._attended


def product(x: Tensor, linear: Linear, residual: Tensor | None = None) -> Tensor:
    """activation(weight x + bias) + residual for a few rows x (rows, in), where `can_run` holds; in x's dtype."""
    found = library()
    assert found is not None
    rows = linear.weight.shape[0] // (2 if linear.gated else 1)
    out = torch.empty(x.shape[0], rows)
    tensors = {"in_": _float(x), "out": out, "weight": linear.weight, "residual": _float(residual)}
    tensors |= {"row_scale": _float(linear.row_scale), "bias": _float(linear.bias)}
    op = Op(kind=_LINEAR, dtype=_DTYPES[linear.weight.dtype], rows=rows, columns=linear.weight.shape[1])
    op.activation, op.gated = _ACTIVATIONS[linear.activation], int(linear.gated)
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(op, name, tensor.data_ptr())
    sizes = map(ctypes.c_int64, (1, x.shape[0], 0))
    found.run((Op * 1)(op), *sizes, None, ctypes.c_int64(0), ctypes.c_int64(torch.get_num_threads()))
    return out.to(x.dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()
