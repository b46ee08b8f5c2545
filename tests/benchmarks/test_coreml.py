from __future__ import annotations

import numpy as np
import pytest

pytestmark = [pytest.mark.needs("coremltools"), pytest.mark.needs("torch")]


@pytest.mark.parametrize("name", ["crnn_shaped", "decoder_shaped, with state"])
def test_sequences_come_out_as_in_onnx_runtime(name):
    from optkit.benchmarks.coreml import MADE, measure_made

    assert name in MADE
    row = measure_made(name)
    for form in ("fp32", "fp16"):
        assert row["forms"][form]["passed"], row["forms"][form]
    assert row["forms"]["fp16"]["bytes"] < 0.52 * row["bytes"]


@pytest.mark.parametrize("size", [1, 5])
def test_an_output_of_another_size_is_infinitely_far(size):
    from optkit.benchmarks.coreml import difference, noise

    expected, found = {"y": np.ones(4, np.float32)}, {"y": np.ones(size, np.float32)}
    assert difference(expected, found) == np.inf
    assert noise([expected], [found]) == -np.inf


def _gguf(path, kind=3):
    """A file with one pair and the tensor ``w`` of two blocks; the numbers are those of the second value."""
    import struct

    random = np.random.default_rng(0)
    scale, low = np.float16([0.5, 0.25]), np.float16([-1, 3])
    codes = random.integers(0, 16, (2, 32)).astype(np.uint8)
    blocks = b"".join(
        s.tobytes() + m.tobytes() + (c[:16] | c[16:] << 4).tobytes()
        for s, m, c in zip(scale, low, codes, strict=True)
    )
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1)
    head += struct.pack("<Q4sII", 4, b"some", 4, 7) + struct.pack("<Q1sIQQIQ", 1, b"w", 2, 32, 2, kind, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + blocks)
    return codes * scale[:, None].astype(np.float32) + low[:, None].astype(np.float32)


def test_weights_in_four_bits_are_read_from_gguf(tmp_path):
    from optkit.benchmarks.builders import gguf

    expected = _gguf(tmp_path / "model.gguf")
    known, weights = gguf.read(tmp_path / "model.gguf")
    assert known == {"some": 7}
    np.testing.assert_array_equal(weights["w"], expected)


def test_what_gguf_files_hold_that_is_not_read_is_named(tmp_path):
    from optkit.benchmarks.builders import gguf
    from optkit.errors import ModelError

    _gguf(tmp_path / "model.gguf", kind=14)
    with pytest.raises(ModelError, match="numbers of format 14 are not read"):
        gguf.read(tmp_path / "model.gguf")
    (tmp_path / "other.gguf").write_bytes(bytes(64))
    with pytest.raises(ModelError, match="no GGUF file"):
        gguf.read(tmp_path / "other.gguf")


def test_a_decoder_with_a_cache_gives_what_it_gives_without_one():
    """The last of three tokens against attention over all three written out, with grouped heads and turned neighbours."""
    import torch

    from optkit.benchmarks.builders.phone import Decoder

    torch.manual_seed(0)
    module = Decoder(layers=1, width=16, heads=4, shared=2, inner=24, words=11, base=100.0).double()
    tokens, kept = [3, 7, 1], [torch.zeros(1, 2, 5, 4, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for place, token in enumerate(tokens):
            scores, *kept = module(torch.tensor([token]), torch.tensor([place]), *kept)
        layer, x = module.blk[0], module.token_embd(torch.tensor(tokens))
        y = layer.attn_norm(x)
        q, k, v = (f(y).reshape(3, -1, 4) for f in (layer.attn_q, layer.attn_k, layer.attn_v))
        turns = torch.exp(
            1j * torch.arange(3.0, dtype=torch.float64)[:, None, None] * 100.0 ** -torch.tensor([0, 0.5])
        )
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.reshape(3, -1, 2, 2).contiguous()) * turns).reshape(
                t.shape
            )
            for t in (q, k)
        )
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        weights = (torch.einsum("hd,thd->ht", q[2], k) / 2).softmax(-1)
        x = x[2] + layer.attn_output(torch.einsum("ht,thd->hd", weights, v).reshape(-1))
        y = layer.ffn_norm(x)
        x = x + layer.ffn_down(torch.nn.functional.silu(layer.ffn_gate(y)) * layer.ffn_up(y))
        expected = module.output_norm(x) @ module.token_embd.weight.T
    torch.testing.assert_close(scores[0], expected, atol=1e-6, rtol=1e-6)
