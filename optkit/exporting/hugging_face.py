"""Models of transformers from a folder on disk, and example inputs for them by what their main input is called."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from optkit.errors import UsageError
from optkit.exporting.eager import quiet

_BATCH, _LENGTH = 2, 16


def open_folder(folder: Path) -> tuple[Any, Any, dict[str, dict[int, str]]]:
    """The model of ``config.json`` and safetensors, its example inputs and free axes; nothing is downloaded.

    Raises:
        UsageError: It cannot be loaded, or weights are missing: transformers itself would draw them at random.
    """
    import transformers

    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: no .safetensors in it",
            hint="pickled weights are not loaded: model.save_pretrained(folder)",
        )
    trusted = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, **trusted)
            wanted = (config.architectures or [None])[0]
            kind = getattr(transformers, wanted or "", None) or transformers.AutoModel
            own = trusted if kind is transformers.AutoModel else {"local_files_only": True}
            model, info = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **own)
    except Exception as error:
        raise UsageError(
            f"{folder}: transformers cannot load it: {str(error).strip().partition(chr(10))[0][:300]}"
        ) from error
    if wrong := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        rest = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"{folder}: no weights for {', '.join(wrong[:5])}{rest} of {type(model).__name__}",
            hint="config.json names another architecture than the one that was saved: model.save_pretrained(folder)",
        )
    return model, *example(model)


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
            mask = torch.ones((_BATCH, _LENGTH), dtype=torch.int64)
            mask[-1, _LENGTH * 3 // 4 :] = 0
            inputs["attention_mask"] = mask
            dynamic["attention_mask"] = {0: "batch", 1: "sequence"}
        if "token_type_ids" in takes and getattr(text, "type_vocab_size", 0) > 1:
            # Left out, every token would be of the first kind, and a pair of texts could never be told apart.
            inputs["token_type_ids"] = (
                (torch.arange(_LENGTH) >= _LENGTH // 2).long().expand(_BATCH, -1).clone()
            )
            dynamic["token_type_ids"] = {0: "batch", 1: "sequence"}
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
