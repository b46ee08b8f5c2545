"""Video: frames in, a label out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, config, mask, model, tokens

_SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip


def _video(module: nn.Module) -> Built:
    return Built(
        module=module, inputs={"pixel_values": torch.randn(BATCH, 4, 3, 16, 16)}, dynamic={"pixel_values": {0: "batch"}}
    )  # fmt: skip


def _vivit() -> Built:
    c = config(
        "VivitConfig", tubelet_size=[2, 8, 8], **{k: v for k, v in _SMALL.items() if k != "patch_size"}
    )
    return _video(model("VivitForVideoClassification", c))


def _xclip() -> Built:
    c = config(
        "XCLIPConfig",
        text_config={"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 98, "bos_token_id": 97},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 4, "mit_num_hidden_layers": 1, "num_frames": 4},
        projection_dim=32, prompt_num_attention_heads=4, prompt_layers=1,
    )  # fmt: skip
    inputs = {
        "pixel_values": torch.randn(BATCH, 4, 3, 16, 16), "input_ids": tokens(97, batch=3), "attention_mask": mask(3, 12), "return_loss": False
    }  # fmt: skip
    free = {"pixel_values": {0: "batch"}, "input_ids": {0: "texts"}, "attention_mask": {0: "texts"}}
    return Built(module=model("XCLIPModel", c), inputs=inputs, dynamic=free)


FAMILIES: Mapping[str, Builder] = {
    "timesformer": lambda: _video(model("TimesformerForVideoClassification", config("TimesformerConfig", **_SMALL))),
    "videomae": lambda: _video(model("VideoMAEForVideoClassification", config("VideoMAEConfig", tubelet_size=2, **_SMALL))),
    "vivit": _vivit,
    "xclip": _xclip,
}  # fmt: skip
