from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optkit.passes.base import Context
from optkit.passes.quantization.embedding import QuantizeEmbedding
from optkit.targets import target
from optkit.testing import check_pass, parse

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (int64[N, T] i) => (float[N, T, 8] y) { e = Gather(table, i) y = Relu(e) }
"""
LOOKED_UP = ["Gather", "Cast", "Gather", "Mul", "Relu"]


def _table(rows: int = 16) -> np.ndarray:
    table = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    table[3] *= 100  # one loud row must not cost the others their precision
    table[4] = 0
    return table


def test_each_row_is_off_by_at_most_half_a_step_of_its_own():
    table = _table()
    after = check_pass(
        QuantizeEmbedding(smallest=1),
        parse(MODEL, table=table),
        ops=LOOKED_UP,
        atol=np.abs(table).max() / 254,
        rtol=0,
    )
    q, scale = (after.graph.initializers[f"table/{end}"].const_value.numpy() for end in ("q", "scale"))
    assert q.dtype == np.int8
    assert np.all(np.abs(q * scale - table) <= np.abs(table).max(1, keepdims=True) / 254 * (1 + 1e-6))


def test_two_look_ups_share_the_table():
    text = MODEL.replace("y = Relu(e)", "f = Gather(table, i) y = Add(e, f)")
    after = check_pass(QuantizeEmbedding(smallest=1), parse(text, table=_table()), atol=1, rtol=0)
    assert sum(v.dtype == ir.DataType.INT8 for v in after.graph.initializers.values()) == 1


@pytest.mark.parametrize(
    "text",
    [
        MODEL.replace("Gather(table", "Gather<axis = 1>(table").replace("float[N, T, 8]", "float[16, N, T]"),
        MODEL.replace(
            "y = Relu(e)", "t = Transpose(table) p = MatMul(e, t) r = MatMul(p, table) y = Relu(r)"
        ),
    ],
)
def test_tables_that_are_read_otherwise_stay(text):
    check_pass(QuantizeEmbedding(smallest=1), parse(text, table=_table()), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"smallest": 1, "ignore": ("Gather",)}])
def test_small_and_ignored_tables_stay(options):
    model = parse(MODEL, table=_table())
    assert QuantizeEmbedding(**options).run(model, Context(target=target("cpu"))) == []


def test_a_table_with_an_infinite_number_stays():
    table = _table()
    table[0, 0] = np.inf
    model = parse(MODEL, table=table)
    assert QuantizeEmbedding(smallest=1).run(model, Context(target=target("cpu"))) == []
