from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.quantization.palette import PalettizeWeights, cluster, places_in, tables_for
from optkit.testing import check_pass, parse

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LINEAR = HEAD + "g (float[N, 64] x) => (float[N, 32] y) { y = MatMul(x, w) }"


def _weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_become_places_in_a_table(bits):
    w = _weight(64, 32)
    after = check_pass(
        PalettizeWeights(bits=bits, smallest=1), parse(LINEAR, w=w), ops=["Gather", "MatMul"], atol=64, rtol=0
    )
    table, indices = (after.graph.initializers[f"w/{n}"].const_value.numpy() for n in ("palette", "indices"))
    assert table.shape == (1 << bits,) and indices.shape == w.shape
    # Each weight has the nearest entry.
    nearest = np.abs(w[..., None] - table).min(-1)
    np.testing.assert_allclose(np.abs(table[indices] - w), nearest, atol=1e-6)


def test_a_weight_of_few_values_is_kept_exactly():
    values = np.array([-1, 0, 0.25, 3], np.float32)
    w = values[np.random.default_rng(0).integers(0, 4, (64, 32))]
    check_pass(PalettizeWeights(bits=2, smallest=1), parse(LINEAR, w=w), ops=["Gather", "MatMul"], atol=1e-4)


def test_groups_of_channels_have_tables_of_their_own():
    w = _weight(64, 32)
    w[:, :16] *= 100
    after = check_pass(PalettizeWeights(bits=4, group=16, smallest=1), parse(LINEAR, w=w), atol=1e4, rtol=0)
    table, indices = (after.graph.initializers[f"w/{n}"].const_value.numpy() for n in ("palette", "indices"))
    assert table.shape == (32,)
    assert indices[:, :16].max() < 16 <= indices[:, 16:].min()
    assert np.square(table[indices] - w)[:, 16:].mean() < 0.02


@pytest.mark.parametrize(
    ("channels", "group", "tables"), [(32, 24, 2), (30, 16, 2), (31, 16, 1), (30, 2, 15), (12, 5, 3)]
)
def test_groups_that_do_not_divide_become_the_nearest_that_do(channels, group, tables):
    graph = LINEAR.replace("N, 32", f"N, {channels}")
    after = check_pass(
        PalettizeWeights(bits=4, group=group, smallest=1),
        parse(graph, w=_weight(64, channels)),
        atol=64,
        rtol=0,
    )
    assert after.graph.initializers["w/palette"].const_value.shape.numpy() == (16 * tables,)


def test_clusters_are_no_worse_than_lloyds_own_fixed_points():
    """Against the definition: centres are means of what is nearest to them, and the error is below a uniform grid's."""
    values = np.concatenate([_weight(4000), _weight(100) * 10])
    centres = cluster(values, 16).astype(np.float64)
    nearest = np.abs(values[:, None] - centres).argmin(1)
    means = np.array([values[nearest == k].mean() if (nearest == k).any() else centres[k] for k in range(16)])
    grid = np.linspace(values.min(), values.max(), 16)
    error, plain = (np.square(np.abs(values[:, None] - c).min(1)).sum() for c in (centres, grid))
    assert error < plain / 4
    assert np.square(np.abs(values[:, None] - means).min(1)).sum() > error * 0.99


def test_other_axes_group_too():
    w = _weight(8, 4, 3, 3)
    tables = tables_for(w, 0, 2, 3)
    indices = places_in(w, 0, tables)
    assert tables.shape == (2, 8) and indices[:4].max() < 8 <= indices[4:].min()


@pytest.mark.parametrize("options", [{"smallest": 2049}, {"ignore": ("MatMul",)}, {"targets": ("Conv",)}])
def test_what_is_not_selected_stays(options):
    check_pass(
        PalettizeWeights(**{"smallest": 1, **options}), parse(LINEAR, w=_weight(64, 32)), ops=["MatMul"]
    )
