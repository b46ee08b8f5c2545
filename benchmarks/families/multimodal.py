"""Images and text together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import (
    BATCH,
    LENGTH,
    cached,
    caches,
    config,
    image,
    mask,
    model,
    tokens,
    vision,
)

_WORDS = 99
_TEXT: dict[str, Any] = {
    "vocab_size": _WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_LLAMA: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 128}


def _pair(module: nn.Module, length: int = LENGTH) -> Built:
    inputs = {
        "input_ids": tokens(90, length, batch=3), "pixel_values": image(32), "attention_mask": torch.ones(3, length, dtype=torch.int64)
    }  # fmt: skip
    free = {"input_ids": {0: "texts"}, "attention_mask": {0: "texts"}, "pixel_values": {0: "batch"}}
    return Built(module=module, inputs=inputs, dynamic=free)


def _clip() -> Built:
    text = {**_TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 96}
    return _pair(
        model("CLIPModel", config("CLIPConfig", text_config=text, vision_config=_VISION, projection_dim=32))
    )


def _siglip() -> Built:
    text = {
        **_TEXT,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 98,
        "bos_token_id": 97,
        "pad_token_id": 96,
    }
    return _pair(model("SiglipModel", config("SiglipConfig", text_config=text, vision_config=_VISION)))


def _vilt() -> Built:
    c = config("ViltConfig", max_position_embeddings=40, num_labels=3, **{**_VISION, "vocab_size": _WORDS})
    inputs = {"input_ids": tokens(90), "pixel_values": image(32)}
    return Built(
        module=model("ViltForQuestionAnswering", c), inputs=inputs, dynamic={n: {0: "batch"} for n in inputs}
    )


class _Logits(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, **inputs: Any) -> Tensor:
        found: Tensor = self.model(**inputs).logits
        return found


def _blip2() -> Built:
    c = config(
        "Blip2Config", vision_config=_VISION,
        qformer_config={**_TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config=config("OPTConfig", vocab_size=_WORDS, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64),
        num_query_tokens=4, image_token_index=98, image_text_hidden_size=16,
    )  # fmt: skip
    ids = tokens(90)
    ids[:, 1:5] = 98
    inputs = {"pixel_values": image(32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = {"pixel_values": {0: "batch"}, "input_ids": {0: "batch"}, "attention_mask": {0: "batch"}}
    return Built(module=_Logits(model("Blip2ForConditionalGeneration", c)), inputs=inputs, dynamic=free)


def _llava() -> Built:
    c = config(
        "LlavaConfig", vision_config=config("CLIPVisionConfig", **_VISION), text_config=config("LlamaConfig", **_LLAMA), image_token_index=98,
        vision_feature_layer=-1,
    )  # fmt: skip
    ids = tokens(90, 24)
    ids[:, 1:17] = 98
    inputs = {"input_ids": ids, "pixel_values": image(32), "attention_mask": torch.ones_like(ids)}
    free = {"pixel_values": {0: "batch"}, "input_ids": {0: "batch"}, "attention_mask": {0: "batch"}}
    return Built(module=_Logits(model("LlavaForConditionalGeneration", c)), inputs=inputs, dynamic=free)


def _idefics() -> Built:
    c = config(
        "IdeficsConfig", additional_vocab_size=2, use_resampler=False, cross_layer_interval=1, max_position_embeddings=128,
        vision_config={"embed_dim": 32, "image_size": 32, "patch_size": 8, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **_TEXT,
    )  # fmt: skip
    ids = tokens(90)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(BATCH, 1, 3, 32, 32),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.int64), "use_cache": False,
    }  # fmt: skip
    both = {0: "batch", 1: "sequence"}
    free = {
        "input_ids": both,
        "attention_mask": both,
        "pixel_values": {0: "batch"},
        "image_attention_mask": both,
    }
    return Built(module=_Logits(model("IdeficsForVisionText2Text", c)), inputs=inputs, dynamic=free)


def _layoutlmv3() -> Built:
    c = config(
        "LayoutLMv3Config", **_TEXT, max_position_embeddings=64, coordinate_size=6, shape_size=4, input_size=32, patch_size=8, num_labels=3,
        max_2d_position_embeddings=128, rel_pos_bins=8, max_rel_pos=16, rel_2d_pos_bins=8, max_rel_2d_pos=32,
    )  # fmt: skip
    corner, size = torch.randint(0, 50, (BATCH, LENGTH, 2)), torch.randint(1, 40, (BATCH, LENGTH, 2))
    inputs = {
        "input_ids": tokens(90), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64), "bbox": torch.cat([corner, corner + size], -1), "pixel_values": image(32)
    }  # fmt: skip
    both = {0: "batch", 1: "sequence"}
    free = {"input_ids": both, "attention_mask": both, "bbox": both, "pixel_values": {0: "batch"}}
    return Built(module=model("LayoutLMv3ForTokenClassification", c), inputs=inputs, dynamic=free)


def _donut_encoder() -> Built:
    c = config(
        "DonutSwinConfig", image_size=[32, 32], patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )  # fmt: skip
    return vision(model("DonutSwinModel", c), 32)


def _donut_decode() -> Built:
    c = config(
        "MBartConfig", vocab_size=_WORDS, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=64,
        is_decoder=True, add_cross_attention=True, is_encoder_decoder=False,
    )  # fmt: skip
    inputs = {
        "input_ids": tokens(90, 1), "attention_mask": mask(BATCH, 9), "encoder_hidden_states": torch.randn(BATCH, 16, 32),
        "past_key_values": _both(), "use_cache": True,
    }  # fmt: skip
    free = {
        "input_ids": {0: "batch"}, "attention_mask": {0: "batch", 1: "past+1"}, "encoder_hidden_states": {0: "batch", 1: "places"},
        **cached(2, "past_key_values.self"), **cached(2, "past_key_values.cross", "places"),
    }  # fmt: skip
    return Built(module=model("MBartForCausalLM", c), inputs=inputs, dynamic=free)


def _both() -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(caches(2, 4, 8), caches(2, 4, 8, past=16))


FAMILIES: Mapping[str, Builder] = {
    "clip": _clip,
    "siglip": _siglip,
    "vilt": _vilt,
    "blip2": _blip2,
    "llava": _llava,
    "idefics": _idefics,
    "layoutlmv3": _layoutlmv3,
    "donut_encoder": _donut_encoder,
    "donut_decode": _donut_decode,
}
