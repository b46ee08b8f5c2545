"""Nodes that passes put in know where they belong."""

from __future__ import annotations

import onnx_ir as ir

from optkit.origin import MODULE, SOURCE, inherit

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x) => (float[2] z) {
  q = Cast <to = 10> (x)
  d = Cast <to = 1> (q)
  y = Relu (d)
  h = Cast <to = 10> (y)
  z = Cast <to = 1> (h)
}
"""


def _graph(origin):
    model = ir.from_onnx_text(GRAPH)
    for node in model.graph:
        if node.op_type == "Relu":
            node.metadata_props.update(origin)
    return model


def test_what_is_read_and_what_reads_share_an_origin():
    origin = {MODULE: "head.relu", SOURCE: "net.py:3"}
    model = _graph(origin)
    inherit(model)
    assert [dict(n.metadata_props) for n in model.graph] == [origin] * 5


def test_an_origin_of_its_own_stays():
    model = _graph({MODULE: "head.relu", "more": "not an origin"})
    first = next(iter(model.graph))
    first.metadata_props[SOURCE] = "net.py:9"
    inherit(model)
    found = [dict(n.metadata_props) for n in model.graph]
    assert found[0] == {SOURCE: "net.py:9"}
    assert found[1] == {MODULE: "head.relu"}


def test_a_graph_without_origins_is_left_alone():
    model = _graph({})
    inherit(model)
    assert all(not n.metadata_props for n in model.graph)
