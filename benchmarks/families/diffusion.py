"""Diffusion: the networks that are called in each step, and the autoencoders around them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, image

_BLOCKS: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 8,
}  # fmt: skip
_CONDITIONED: Mapping[str, Mapping[int, str]] = {
    "sample": {0: "batch"}, "timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}
}  # fmt: skip


def _make(kind: str, **fields: Any) -> nn.Module:
    made: nn.Module = getattr(importlib.import_module("diffusers"), kind)(**fields)
    return made


def _step(size: int = 8, width: int = 32) -> dict[str, Any]:
    return {
        "sample": torch.randn(BATCH, 4, size, size), "timestep": torch.full((BATCH,), 10.0),
        "encoder_hidden_states": torch.randn(BATCH, 6, width),
    }  # fmt: skip


def _sd_unet() -> Built:
    net = _make(
        "UNet2DConditionModel", sample_size=8, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_BLOCKS
    )
    return Built(module=net, inputs=_step(), dynamic=_CONDITIONED)


class _Lcm(nn.Module):
    """One step of a consistency model: the guidance scale is embedded, and the step solved."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _make(
            "UNet2DConditionModel", sample_size=8, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), time_cond_proj_dim=16, **_BLOCKS
        )  # fmt: skip

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor
    ) -> Tensor:
        noise = self.net(sample, timestep, encoder_hidden_states, timestep_cond=guidance).sample
        scaled = (timestep / 10).view(-1, 1, 1, 1)
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * sample + out * (sample - 0.5 * noise)


def _lcm_unet() -> Built:
    return Built(
        module=_Lcm(), inputs={**_step(), "guidance": torch.randn(BATCH, 16)}, dynamic={**_CONDITIONED, "guidance": {0: "batch"}}
    )  # fmt: skip


def _controlnet() -> Built:
    net = _make("ControlNetModel", conditioning_embedding_out_channels=(8, 16), **_BLOCKS)
    inputs = {**_step(), "controlnet_cond": image(16), "return_dict": False}
    return Built(module=net, inputs=inputs, dynamic={**_CONDITIONED, "controlnet_cond": {0: "batch"}})


class _Half(nn.Module):
    def __init__(self, encode: bool) -> None:
        super().__init__()
        self.net = _make(
            "AutoencoderKL", block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8, sample_size=16,
        )  # fmt: skip
        self.encode = encode

    def forward(self, sample: Tensor) -> Tensor:
        if self.encode:
            found: Tensor = self.net.encode(sample).latent_dist.mean
            return found
        y: Tensor = self.net.decode(sample).sample
        return y


def _vae_encoder() -> Built:
    free = {"sample": {0: "batch"}}
    return Built(module=_Half(True), inputs={"sample": image(16)}, dynamic=free)


def _vae_decoder() -> Built:
    free = {"sample": {0: "batch", 2: "height", 3: "width"}}
    return Built(module=_Half(False), inputs={"sample": torch.randn(BATCH, 4, 8, 8)}, dynamic=free)


def _video_unet() -> Built:
    net = _make(
        "UNet3DConditionModel", sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    inputs = {**_step(), "sample": torch.randn(BATCH, 4, 3, 8, 8), "return_dict": False}
    return Built(module=net, inputs=inputs, dynamic={n: {0: "batch"} for n in _CONDITIONED})


def _dit() -> Built:
    net = _make(
        "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2]), "return_dict": False
    }  # fmt: skip
    return Built(
        module=net, inputs=inputs, dynamic={n: {0: "batch"} for n in ("hidden_states", "timestep", "class_labels")}
    )  # fmt: skip


def _flux() -> Built:
    net = _make(
        "FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 16, 16), "encoder_hidden_states": torch.randn(BATCH, 6, 32), "pooled_projections": torch.randn(BATCH, 32),
        "timestep": torch.rand(BATCH), "img_ids": torch.rand(16, 3).round(), "txt_ids": torch.zeros(6, 3), "return_dict": False,
    }  # fmt: skip
    free = {
        "hidden_states": {0: "batch", 1: "places"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}, "pooled_projections": {0: "batch"},
        "timestep": {0: "batch"}, "img_ids": {0: "places"}, "txt_ids": {0: "sequence"},
    }  # fmt: skip
    return Built(module=net, inputs=inputs, dynamic=free)


def _cogvideox() -> Built:
    net = _make(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=32,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(BATCH, 2, 4, 8, 8), "encoder_hidden_states": torch.randn(BATCH, 6, 32), "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }  # fmt: skip
    return Built(
        module=net, inputs=inputs, dynamic={n: {0: "batch"} for n in ("hidden_states", "encoder_hidden_states", "timestep")}
    )  # fmt: skip


FAMILIES: Mapping[str, Builder] = {
    "sd_unet": _sd_unet,
    "lcm_unet": _lcm_unet,
    "controlnet": _controlnet,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
    "video_unet": _video_unet,
    "dit": _dit,
    "flux": _flux,
    "cogvideox": _cogvideox,
}
