"""Encoders of text, and networks that read one text and write another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, LENGTH, TEXT, cached, config, mask, model, tokens

_WORDS = 100
_BERT: dict[str, Any] = {
    "vocab_size": _WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 128,
}  # fmt: skip


def _text(module: nn.Module) -> Built:
    return Built(module=module, inputs={"input_ids": tokens(_WORDS), "attention_mask": mask()}, dynamic=TEXT)


def _bert() -> Built:
    return _text(model("BertModel", config("BertConfig", **_BERT)))


class _BiEncoder(nn.Module):
    """Mean of what the mask keeps, of length one, as sentence encoders give it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model("BertModel", config("BertConfig", **_BERT))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(x.dtype)
        return nn.functional.normalize((x * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=-1)


def _cross_encoder() -> Built:
    return _text(model("BertForSequenceClassification", config("BertConfig", num_labels=1, **_BERT)))


def _reward_model() -> Built:
    c = config(
        "LlamaConfig", vocab_size=_WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return _text(model("LlamaForSequenceClassification", c))


_T5: dict[str, Any] = {
    "vocab_size": _WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip


def _t5_encoder() -> Built:
    return _text(model("T5EncoderModel", config("T5Config", **_T5)))


class _Decode(nn.Module):
    """One step of a decoder: what the encoder said goes in, and the cache goes in and out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, decoder_input_ids: Tensor, states: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        out = self.model(
            decoder_input_ids=decoder_input_ids, encoder_outputs=(states,), attention_mask=attention_mask,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits, out.past_key_values.self_attention_cache


def _t5_decode() -> Built:
    from transformers import DynamicCache, EncoderDecoderCache

    past, own, cross = 8, DynamicCache(), DynamicCache()
    for layer in range(2):
        own.update(torch.randn(BATCH, 4, past, 16), torch.randn(BATCH, 4, past, 16), layer)
        cross.update(torch.randn(BATCH, 4, LENGTH, 16), torch.randn(BATCH, 4, LENGTH, 16), layer)
    inputs = {
        "decoder_input_ids": tokens(_WORDS, 1), "states": torch.randn(BATCH, LENGTH, 64), "attention_mask": mask(),
        "cache": EncoderDecoderCache(own, cross),
    }  # fmt: skip
    free = {
        "decoder_input_ids": {0: "batch"}, "states": {0: "batch", 1: "sequence"}, "attention_mask": TEXT["attention_mask"],
        **cached(2, "cache.self"), **cached(2, "cache.cross", "sequence"),
    }  # fmt: skip
    return Built(
        module=_Decode(model("T5ForConditionalGeneration", config("T5Config", **_T5))),
        inputs=inputs,
        dynamic=free,
    )


def _codet5_full() -> Built:
    inputs = {
        "input_ids": tokens(_WORDS), "attention_mask": mask(), "decoder_input_ids": tokens(_WORDS, 6), "use_cache": False
    }  # fmt: skip
    free = {**TEXT, "decoder_input_ids": {0: "batch", 1: "target"}}
    return Built(
        module=model("T5ForConditionalGeneration", config("T5Config", **_T5)), inputs=inputs, dynamic=free
    )


FAMILIES: Mapping[str, Builder] = {
    "bert": _bert,
    "bi_encoder": lambda: _text(_BiEncoder()),
    "cross_encoder": _cross_encoder,
    "reward_model": _reward_model,
    "t5_encoder": _t5_encoder,
    "t5_decode": _t5_decode,
    "codet5_full": _codet5_full,
}
