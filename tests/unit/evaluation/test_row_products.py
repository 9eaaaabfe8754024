"""What times products of a few rows and the parts of a block computes what it says; its clock needs a CUDA device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from evaluation.benchmarks import row_products
from evaluation.benchmarks.row_products import Product
from evaluation.benchmarks.verified_block import made
from llmslm.generation import fused, fused_rows, verified_loop
from llmslm.generation.fused_block import FusedBlockStep, FusedVerifiedBlock
from tests.unit.generation.families import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs there")
CPU = torch.device("cpu")


def runs(work: Callable[[], Any]) -> float:
    work()
    return 1.0


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "tile_for", lambda rows, columns, batch, gated: fused.Tile(16, 64, 1, 2))
    monkeypatch.setattr(fused, "_attention_tile", lambda programs, head_dim: {"BLOCK_L": 64, "num_warps": 1})
    shapes = [Product("qkv", 24, 40, True), Product("out", 40, 40), Product("up", 48, 40, True, True)]
    layers = ([*shapes, Product("down", 40, 48)], Product("head", 50, 40, True), 1)
    monkeypatch.setitem(row_products.LAYERS, "tiny", layers)


@pytest.mark.parametrize("kernel", [row_products.ONE, row_products.ROWS])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_are_chained_and_right(kernel: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = row_products.Products.chain
    monkeypatch.setattr(row_products.Products, "chain", lambda self, products, times: chain(self, products, 2))
    found = row_products.measure_products("tiny", kernel, rows, CPU, runs)
    assert [row["product"] for row in found] == ["qkv", "out", "up", "down", "head", "layers"]
    assert all(row["off"] < 2e-3 for row in found)
    lines = list(row_products.table(found, ("product", "kernel"), "rows"))
    assert len(lines) == 7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, by what lies where products are left out
def test_parts_of_a_block_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmslm.generation.side.block_step_for", lambda decoder, state: FusedBlockStep(decoder, state, early=False)
    )
    monkeypatch.setattr(verified_loop, "block_for", FusedVerifiedBlock)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    engine = made(*(LlamaForCausalLM(config).eval() for _ in range(2)))
    fewest = fused_rows.FEWEST_ROWS
    found = row_products.measure_parts(engine, [2], runs, 5, 2)
    assert len({(row["fewest"], row["part"]) for row in found}) == len(found) == 24
    assert fused_rows.FEWEST_ROWS == fewest


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_steps_go_to_the_matrix_units_where_they_are_told_to(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(row_products.SHAPES, "tiny", lambda: tiny(family))
    given, product = [], fused_rows.rows_product
    monkeypatch.setattr(fused_rows, "rows_product", lambda x, *rest: given.append(x.shape[0]) or product(x, *rest))

    def clock(work: Callable[[], Any]) -> float:
        given.clear()
        assert work().isfinite().all()
        return float(len(given))

    found = row_products.measure_steps("tiny", CPU, clock, 5)
    products = {(row["rows"], row["fewest"]): row["us"] for row in found}
    assert products[1, 3] == products[2, 3] == 0 < products[1, 1] == products[2, 1]


def test_what_fails_does_not_take_the_rest_along(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def measured(model: str, kernel: str, rows: int, *_: Any) -> list[dict[str, Any]]:
        return [{"model": model, "kernel": kernel, "rows": rows, "product": "qkv", "us": 1.5, "off": 0.0}]

    def fails(*_: Any) -> list[dict[str, Any]]:
        raise RuntimeError("out of memory")

    records: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(row_products, "compile_ahead", lambda jobs, workers: None)
    monkeypatch.setattr(row_products, "measure_products", measured)
    monkeypatch.setattr(row_products, "measure_steps", fails)
    monkeypatch.setattr(row_products, "report", lambda record, out: records.append(record))
    row_products.main(["--models", "tiny", "--rows", "1", "13", "--steps", "gpt2", "--sizes"])
    assert [(row["kernel"], row["rows"]) for row in records[0]["products"]] == [("one", 1), ("rows", 1), ("rows", 13)]
    assert records[0]["failed"] == [{"case": "gpt2", "error": "RuntimeError: out of memory"}]
    assert "tiny qkv rows       1.5       1.5" in capsys.readouterr().out


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        row_products.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
