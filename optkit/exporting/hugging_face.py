"""Example inputs for models of transformers, by what their main input is called."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from optkit.errors import UsageError

_BATCH, _LENGTH = 2, 16


def example(model: Any) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Inputs for ``model``, and the axes that are free as a rule.

    Raises:
        UsageError: Nothing is known about its main input.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    inputs: dict[str, Any] = {}
    dynamic: dict[str, dict[int, str]] = {}
    random = torch.Generator().manual_seed(0)

    def tokens(name: str) -> None:
        size = int(getattr(text, "vocab_size", 100))
        inputs[name] = torch.randint(0, size, (_BATCH, _LENGTH), generator=random)
        dynamic[name] = {0: "batch", 1: "sequence"}

    if "input_ids" in takes:
        tokens("input_ids")
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones((_BATCH, _LENGTH), dtype=torch.int64)
            dynamic["attention_mask"] = {0: "batch", 1: "sequence"}
        if "decoder_input_ids" in takes:
            tokens("decoder_input_ids")
            dynamic["decoder_input_ids"] = {0: "batch", 1: "target"}
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None) or 224, getattr(vision, "num_channels", 3)
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.randn((_BATCH, channels, high, wide), generator=random)
        dynamic["pixel_values"] = {0: "batch"}
    if "input_values" in takes:
        inputs["input_values"] = torch.randn((_BATCH, 16000), generator=random)
        dynamic["input_values"] = {0: "batch", 1: "samples"}
    if "input_features" in takes:
        bins, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.randn((_BATCH, bins, frames), generator=random)
        dynamic["input_features"] = {0: "batch"}
        if "decoder_input_ids" in takes and "decoder_input_ids" not in inputs:
            tokens("decoder_input_ids")
    if not inputs:
        raise UsageError(
            f"{type(model).__name__}: no example inputs are known for it",
            hint="give inputs, or write a factory that returns (module, inputs)",
        )
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs, dynamic
