"""all-MiniLM-L6-v2 as users export it: a BERT module, written out, through ``torch.onnx.export``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LAYERS, _HEADS, _WIDTH, _INNER, _EPSILON = 6, 12, 384, 1536, 1e-12
_VOCABULARY, _POSITIONS, _TYPES = 30522, 512, 2


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], _HEADS, _WIDTH // _HEADS)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(_WIDTH // _HEADS) + mask).softmax(-1)
        mixed: Tensor = weights @ v
        return mixed.transpose(1, 2).reshape(x.shape)


class _Output(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, _WIDTH), nn.LayerNorm(_WIDTH, _EPSILON)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(self.dense(x) + residual)
        return y


class _Layer(nn.Module):
    # The nesting is that of the checkpoint, so that its names fit.
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": _SelfAttention(), "output": _Output(_WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(_WIDTH, _INNER)})
        self.output = _Output(_INNER)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        y: Tensor = self.output(nn.functional.gelu(self.intermediate["dense"](x)), x)
        return y


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position_embeddings = nn.Embedding(_POSITIONS, _WIDTH)
        self.token_type_embeddings = nn.Embedding(_TYPES, _WIDTH)
        self.LayerNorm = nn.LayerNorm(_WIDTH, _EPSILON)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        kinds = torch.zeros_like(tokens)
        words, kind, place = self.word_embeddings, self.token_type_embeddings, self.position_embeddings
        x: Tensor = self.LayerNorm(words(tokens) + kind(kinds) + place(places))
        return x


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer() for _ in range(_LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class SentenceEncoder(nn.Module):
    """Tokens to unit vectors: BERT, then the mean over the tokens that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(), _Encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``[batch, tokens]`` twice -> ``[batch, 384]``."""
        kept = attention_mask.to(torch.float32)
        # As in Hugging Face's eager attention: the largest negative number hides a token.
        mask = (1.0 - kept[:, None, None, :]) * torch.finfo(torch.float32).min
        x = self.encoder(self.embeddings(input_ids), mask)
        mean = (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def build(folder: Path, path: Path) -> None:
    """Export the encoder with the weights of ``folder/model.safetensors`` to ``path``."""
    module = SentenceEncoder().eval()
    weights = {
        name: torch.from_numpy(array) for name, array in _safetensors(folder / "model.safetensors").items()
    }
    wanted = module.state_dict()
    module.load_state_dict({name: weights[name] for name in wanted})
    ids = torch.arange(1000, 1032).reshape(2, 16)
    shape: dict[int, Any] = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        module,
        (ids, torch.ones_like(ids)),
        path,
        dynamo=True,
        external_data=False,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        verbose=False,
    )


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """Float tensors of a safetensors file: a header in JSON behind its length, then the raw bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    arrays = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"]).copy()
    return arrays
