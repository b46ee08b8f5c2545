"""Decoders of text: the first pass over a prompt, and one step with a cache whose length is free."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, TEXT, cached, caches, config, mask, model, tokens

_WORDS, _PAST = 100, 8
_COMMON: dict[str, Any] = {"vocab_size": _WORDS, "num_hidden_layers": 2, "max_position_embeddings": 128}
_LLAMA: dict[str, Any] = {
    **_COMMON, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def _prefill(module: nn.Module) -> Built:
    inputs = {"input_ids": tokens(_WORDS), "attention_mask": mask(), "use_cache": True}
    return Built(module=module, inputs=inputs, dynamic=TEXT)


def _decode(module: nn.Module, heads: int, width: int, length: int = 1) -> Built:
    inputs = {
        "input_ids": tokens(_WORDS, length), "attention_mask": mask(BATCH, _PAST + length),
        "past_key_values": caches(2, heads, width, _PAST), "use_cache": True,
    }  # fmt: skip
    ids: dict[int, str] = {0: "batch", 1: "sequence"} if length > 1 else {0: "batch"}
    whole = "past+sequence" if length > 1 else "past+1"
    free = {"input_ids": ids, "attention_mask": {0: "batch", 1: whole}, **cached(2)}
    return Built(module=module, inputs=inputs, dynamic=free)


def _gpt2() -> nn.Module:
    return model("GPT2LMHeadModel", config("GPT2Config", vocab_size=_WORDS, n_positions=128, n_embd=64, n_layer=2, n_head=4))  # fmt: skip


def _llama() -> nn.Module:
    return model("LlamaForCausalLM", config("LlamaConfig", **_LLAMA))


def _mistral() -> nn.Module:
    return model("MistralForCausalLM", config("MistralConfig", sliding_window=16, **_LLAMA))


def _mixtral() -> nn.Module:
    c = config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **_LLAMA)
    return model("MixtralForCausalLM", c)


def _qwen_moe() -> nn.Module:
    c = config(
        "Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64, **_LLAMA
    )  # fmt: skip
    return model("Qwen2MoeForCausalLM", c)


def _starcoder() -> nn.Module:
    c = config("GPTBigCodeConfig", vocab_size=_WORDS, n_positions=128, n_embd=64, n_layer=2, n_head=4, multi_query=True)  # fmt: skip
    return model("GPTBigCodeForCausalLM", c)


def _lora_llama() -> Built:
    peft = importlib.import_module("peft")
    c = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return _prefill(peft.get_peft_model(_llama(), c).merge_and_unload())


class _StaticCache(nn.Module):
    """One step that writes into a cache of fixed length at a given place: the state comes in and goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _llama()
        self.layers = 2

    def forward(
        self, input_ids: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        cache = _Slots(keys, values, position)
        length = keys.shape[3]
        seen = torch.arange(length, device=keys.device)[None] <= position
        out = self.model(
            input_ids=input_ids,
            attention_mask=seen[:, None, None, :].expand(input_ids.shape[0], 1, 1, -1),
            position_ids=position[None].expand(input_ids.shape[0], -1),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits, torch.stack(cache.keys), torch.stack(cache.values)


class _Slots:
    """What transformers asks of a cache, over tensors that are given."""

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = list(keys.unbind(0)), list(values.unbind(0)), position

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer] = self.keys[layer].index_copy(2, self.position, key)
        self.values[layer] = self.values[layer].index_copy(2, self.position, value)
        return self.keys[layer], self.values[layer]


def _static_cache() -> Built:
    room = torch.zeros(2, BATCH, 2, 32, 16)
    room[:, :, :, :5] = torch.randn(2, BATCH, 2, 5, 16)
    inputs = {
        "input_ids": tokens(_WORDS, 1), "position": torch.tensor([5]), "keys": room, "values": room.clone().flip(-1)
    }  # fmt: skip
    free = {"input_ids": {0: "batch"}, "keys": {1: "batch", 3: "room"}, "values": {1: "batch", 3: "room"}}
    return Built(module=_StaticCache(), inputs=inputs, dynamic=free)


def _mamba() -> nn.Module:
    return model("MambaForCausalLM", config("MambaConfig", vocab_size=_WORDS, hidden_size=32, state_size=8, num_hidden_layers=2, expand=2))  # fmt: skip


def _mamba2() -> nn.Module:
    c = config(
        "Mamba2Config", vocab_size=_WORDS, hidden_size=32, state_size=8, num_hidden_layers=2, expand=2, num_heads=4, head_dim=16, n_groups=1, chunk_size=8
    )  # fmt: skip
    return model("Mamba2ForCausalLM", c)


def _scan(module: nn.Module) -> Built:
    inputs = {"input_ids": tokens(_WORDS, 10), "use_cache": False}
    return Built(module=module, inputs=inputs, dynamic={"input_ids": {0: "batch", 1: "sequence"}})


class _StateStep(nn.Module):
    """One token through a state-space model: the states of its layers come in and go out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, input_ids: Tensor, windows: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        transformers = importlib.import_module("transformers")
        cache = transformers.DynamicCache(config=self.model.config)
        for layer, window, state in zip(cache.layers, windows.unbind(0), states.unbind(0), strict=True):
            layer.update_conv_state(window)
            layer.update_recurrent_state(state)
        out = self.model(input_ids=input_ids, cache_params=cache, use_cache=True)
        return (
            out.logits, torch.stack([layer.conv_states[0] for layer in cache.layers]),
            torch.stack([layer.recurrent_states[0] for layer in cache.layers]),
        )  # fmt: skip


class _Retention(nn.Module):
    """Retention of RetNet, arXiv:2307.08621: all steps at once (eq. 5), or one step with a state (eq. 6)."""

    def __init__(self, width: int = 32, heads: int = 4, recurrent: bool = False) -> None:
        super().__init__()
        self.heads, self.recurrent = heads, recurrent
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.norm = nn.GroupNorm(heads, width)
        self.register_buffer("decay", 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float32)))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
        b, t, width = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if state is not None:
            state = state * self.decay[:, None, None] + k.transpose(-1, -2) @ v
            y = q @ state
        else:
            place = torch.arange(t, device=x.device)
            apart = (place[:, None] - place[None]).clamp(min=0)
            decay = self.decay[:, None, None] ** apart * (place[:, None] >= place[None])
            y = (q @ k.transpose(-1, -2) * decay) @ v
        y = self.norm(y.transpose(1, 2).reshape(b * t, width)).view(b, t, width)
        y = self.o(nn.functional.silu(self.g(x)) * y)
        return y if state is None else (y, state)


class _RetNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        self.layers = nn.ModuleList(_Retention(width) for _ in range(2))
        self.head = nn.Linear(width, _WORDS)

    def forward(self, input_ids: Tensor, states: Tensor | None = None) -> Any:
        x, after = self.words(input_ids), []
        for index, layer in enumerate(self.layers):
            if states is None:
                x = x + layer(x)
            else:
                y, state = layer(x, states[index])
                x = x + y
                after.append(state)
        return self.head(x) if states is None else (self.head(x), torch.stack(after))


def _retnet_parallel() -> Built:
    return Built(
        module=_RetNet(), inputs={"input_ids": tokens(_WORDS)}, dynamic={"input_ids": TEXT["input_ids"]}
    )


def _retnet_recurrent() -> Built:
    inputs = {"input_ids": tokens(_WORDS, 1), "states": torch.randn(2, BATCH, 4, 8, 8)}
    return Built(module=_RetNet(), inputs=inputs, dynamic={"input_ids": {0: "batch"}, "states": {1: "batch"}})


def _mamba_decode() -> Built:
    inputs = {"input_ids": tokens(_WORDS, 1), "windows": torch.randn(2, BATCH, 64, 4), "states": torch.randn(2, BATCH, 64, 8)}  # fmt: skip
    return Built(
        module=_StateStep(_mamba()), inputs=inputs, dynamic={"input_ids": {0: "batch"}, "windows": {1: "batch"}, "states": {1: "batch"}}
    )  # fmt: skip


def _mamba2_decode() -> Built:
    inputs = {"input_ids": tokens(_WORDS, 1), "windows": torch.randn(2, BATCH, 80, 4), "states": torch.randn(2, BATCH, 4, 16, 8)}  # fmt: skip
    return Built(
        module=_StateStep(_mamba2()), inputs=inputs, dynamic={"input_ids": {0: "batch"}, "windows": {1: "batch"}, "states": {1: "batch"}}
    )  # fmt: skip


FAMILIES: Mapping[str, Builder] = {
    "gpt2_prefill": lambda: _prefill(_gpt2()),
    "gpt2_decode": lambda: _decode(_gpt2(), 4, 16),
    "llama_prefill": lambda: _prefill(_llama()),
    "llama_decode": lambda: _decode(_llama(), 2, 16),
    "llama_verify": lambda: _decode(_llama(), 2, 16, 4),
    "llama_static_cache": _static_cache,
    "mistral_prefill": lambda: _prefill(_mistral()),
    "mistral_decode": lambda: _decode(_mistral(), 2, 16),
    "mixtral_prefill": lambda: _prefill(_mixtral()),
    "mixtral_decode": lambda: _decode(_mixtral(), 2, 16),
    "qwen_moe_prefill": lambda: _prefill(_qwen_moe()),
    "qwen_moe_decode": lambda: _decode(_qwen_moe(), 2, 16),
    "starcoder_prefill": lambda: _prefill(_starcoder()),
    "starcoder_decode": lambda: _decode(_starcoder(), 1, 16),
    "lora_llama": _lora_llama,
    "mamba_prefill": lambda: _scan(_mamba()),
    "mamba_decode": _mamba_decode,
    "mamba2_prefill": lambda: _scan(_mamba2()),
    "mamba2_decode": _mamba2_decode,
    "retnet_parallel": _retnet_parallel,
    "retnet_recurrent": _retnet_recurrent,
}
