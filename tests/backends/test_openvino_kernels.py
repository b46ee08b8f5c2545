from __future__ import annotations

from types import SimpleNamespace

import pytest

from optkit.backends.openvino.kernels import Layer, available, fastest, layers, preferring, times
from optkit.errors import ModelError

_AVX512 = {"avx512f", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2", "fma"}, ()),
        ({"asimd", "asimddp"}, ()),
        ({*_AVX512, "avx512_vnni"}, ("jit_avx512",)),
        (
            {*_AVX512, "avx512_vnni", "amx_int8", "amx_bf16"},
            ("jit_avx512", "brgconv_avx512", "jit_avx512_amx"),
        ),
    ],
)
def test_kernels_are_those_that_the_processor_has(features, expected):
    assert available(frozenset(features)) == expected


def _planted(table):
    """Measurements by family, of layers "a" and "b" (convolutions) and "r" (a reorder), in microseconds."""

    def measure(kernels):
        family = next(iter(kernels.values()), "default")
        return {name: Layer(*entry) for name, entry in table[family].items()}

    return measure


USUAL = {"a": ("brg", 10.0), "b": ("brg", 10.0), "r": ("reorder", 1.0)}


def test_each_layer_takes_the_kernel_that_is_fastest_there():
    table = {
        "default": USUAL,
        "jit_avx512": {"a": ("jit", 6.0), "b": ("jit", 30.0)},
        "jit_avx512_amx": {"a": ("amx", 5.0), "b": ("amx", 9.0)},
    }
    mixed, *alone = fastest(["a", "b"], ("jit_avx512", "jit_avx512_amx"), _planted(table))
    assert mixed == {"a": "jit_avx512_amx", "b": "jit_avx512_amx"}
    assert alone == []
    table["jit_avx512"]["b"] = ("jit", 7.0)
    mixed, *alone = fastest(["a", "b"], ("jit_avx512", "jit_avx512_amx"), _planted(table))
    assert mixed == {"a": "jit_avx512_amx", "b": "jit_avx512"}
    assert alone == [dict.fromkeys("ab", "jit_avx512")]


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (("jit", 9.6), "hardly faster"),
        (("brg", 5.0), "the same kernel: it is noise"),
        (("jit", 11.0), "slower"),
    ],
)
def test_a_layer_keeps_the_usual_kernel_where_the_other_is(kernel, why):
    table = {"default": USUAL, "jit_avx512": {"a": kernel, "b": ("brg", 10.0), "r": ("reorder", 9.0)}}
    assert fastest(["a", "b"], ("jit_avx512",), _planted(table)) == []


def test_kernels_that_are_faster_everywhere_but_in_their_reorders_are_compared_as_a_whole():
    """Alone "jit" would lose by its reorders; one layer of it may still gain."""
    table = {
        "default": USUAL,
        "jit_avx512": {"a": ("jit", 5.0), "b": ("jit", 10.0), "r": ("reorder", 20.0)},
    }
    assert fastest(["a", "b"], ("jit_avx512",), _planted(table)) == [{"a": "jit_avx512"}]


def test_layers_that_were_fused_away_are_left_alone():
    table = {"default": {"a": ("brg", 10.0)}, "jit_avx512": {"a": ("jit", 5.0)}}
    mixed, *_ = fastest(["a", "gone"], ("jit_avx512",), _planted(table))
    assert mixed == {"a": "jit_avx512"}


def test_of_a_layer_counts_a_run_that_others_did_not_slow_down():
    """Nine runs in ten on a busy machine."""
    runs = 0

    def run():
        nonlocal runs
        runs += 1

    def counters():
        took = 4e-6 if runs % 4 == 0 else 9e-6
        real = SimpleNamespace(total_seconds=lambda: took)
        return [SimpleNamespace(node_name="a", exec_type="jit", real_time=real)]

    assert times(run, counters) == {"a": Layer("jit", pytest.approx(4e-6))}


XML = """<net><layers>
<layer id="0" name="c" type="Convolution"><data strides="1, 1" /><output /></layer>
<layer id="1" name="d" type="Convolution"><data /><rt_info><attribute name="x" version="0" /></rt_info></layer>
<layer id="2" name="g" type="GroupConvolution"><data /></layer>
</layers></net>"""


def test_preferences_are_written_where_openvino_reads_them(tmp_path):
    file = tmp_path / "model.xml"
    file.write_text(XML)
    assert layers(file) == ["c", "d"]
    text = preferring(file, {"c": "jit_avx512", "g": "jit_avx512", "none": "jit_avx512"}).decode()
    wanted = 'value="cpu:jit_avx512_1x1,cpu:jit_avx512"'
    assert text.count(wanted) == 1
    assert text.index("<data strides") < text.index(wanted) < text.index("<output")
    both = preferring(file, {"d": "brgconv_avx512"}).decode()
    assert both.count("<rt_info>") == 1 and "cpu:brgconv_avx512_1x1" in both


@pytest.mark.parametrize("read", [layers, lambda file: preferring(file, {})])
def test_a_file_that_is_no_xml_is_named(tmp_path, read):
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(ModelError, match=r"model\.xml: is not XML"):
        read(tmp_path / "model.xml")
