"""Speech and music."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, cached, caches, config, model, tokens

_WHISPER: dict[str, Any] = {
    "vocab_size": 90, "num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 20, "max_target_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


class _Encoder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**inputs).last_hidden_state
        return found


def _whisper_encoder() -> Built:
    whole: Any = model("WhisperModel", config("WhisperConfig", **_WHISPER))
    inputs = {"input_features": torch.randn(BATCH, 16, 40)}
    return Built(module=_Encoder(whole.encoder), inputs=inputs, dynamic={"input_features": {0: "batch"}})


class _Step(nn.Module):
    """One step of the decoder over what the encoder said; the cache goes in and out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, decoder_input_ids: Tensor, states: Tensor, cache: Any) -> Any:
        from transformers.models.moonshine.modeling_moonshine import MoonshineEncoderModelOutput

        said = MoonshineEncoderModelOutput(last_hidden_state=states)
        out = self.model(
            decoder_input_ids=decoder_input_ids, encoder_outputs=said, past_key_values=cache, use_cache=True
        )
        return out.logits, out.past_key_values.self_attention_cache


def _decode(module: nn.Module, heads: int, width: int, places: int, hidden: int) -> Built:
    from transformers import EncoderDecoderCache

    inputs = {
        "decoder_input_ids": tokens(80, 1), "states": torch.randn(BATCH, places, hidden),
        "cache": EncoderDecoderCache(caches(2, heads, width), caches(2, heads, width, past=places)),
    }  # fmt: skip
    free = {
        "decoder_input_ids": {0: "batch"}, "states": {0: "batch", 1: "places"}, **cached(2, "cache.self"),
        **cached(2, "cache.cross", "places"),
    }  # fmt: skip
    return Built(module=_Step(module), inputs=inputs, dynamic=free)


def _wav2vec2() -> Built:
    c = config(
        "Wav2Vec2Config", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16, 16], conv_stride=[5, 4],
        conv_kernel=[10, 8], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=30, num_feat_extract_layers=2,
    )  # fmt: skip
    return Built(
        module=model("Wav2Vec2ForCTC", c), inputs={"input_values": torch.randn(BATCH, 800)},
        dynamic={"input_values": {0: "batch", 1: "samples"}},
    )  # fmt: skip


_MOONSHINE: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
}  # fmt: skip


def _moonshine_encoder() -> Built:
    whole: Any = model("MoonshineModel", config("MoonshineConfig", **_MOONSHINE))
    inputs = {"input_values": torch.randn(BATCH, 4000)}
    return Built(
        module=_Encoder(whole.encoder), inputs=inputs, dynamic={"input_values": {0: "batch", 1: "samples"}}
    )


def _moonshine_streaming() -> Built:
    encoder = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "sliding_windows": [[4, 2], [4, 0]],
    }  # fmt: skip
    c = config(
        "MoonshineStreamingConfig", encoder_config=encoder, vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    whole: Any = model("MoonshineStreamingModel", c)
    inputs = {"input_values": torch.randn(BATCH, 1920)}
    return Built(
        module=_Encoder(whole.encoder), inputs=inputs, dynamic={"input_values": {0: "batch", 1: "samples"}}
    )


def _parakeet() -> Built:
    encoder = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "subsampling_conv_channels": 8,
        "num_mel_bins": 16,
    }  # fmt: skip
    c = config("ParakeetCTCConfig", vocab_size=30, encoder_config=encoder, pad_token_id=29)
    return Built(
        module=model("ParakeetForCTC", c), inputs={"input_features": torch.randn(BATCH, 64, 16)},
        dynamic={"input_features": {0: "batch", 1: "frames"}},
    )  # fmt: skip


class _LogMel(nn.Module):
    """Spectrogram as a front end has it in the graph: windows, the Fourier transform, bands, a logarithm."""

    def __init__(self, size: int = 64, bands: int = 16) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))
        self.register_buffer("bands", torch.rand(size // 2 + 1, bands))

    def forward(self, samples: Tensor) -> Tensor:
        found = torch.stft(samples, self.size, 16, window=self.window, center=False, return_complex=True)
        power = torch.view_as_real(found).square().sum(-1)
        return (power.transpose(1, 2) @ self.bands).clamp(min=1e-6).log()


def _fastspeech2() -> Built:
    c = config(
        "FastSpeech2ConformerConfig", hidden_size=32, vocab_size=30, num_mel_bins=16, encoder_num_attention_heads=2, encoder_layers=1,
        encoder_linear_units=64, decoder_layers=1, decoder_num_attention_heads=2, decoder_linear_units=64, speech_decoder_postnet_layers=2,
        speech_decoder_postnet_units=16, duration_predictor_channels=16, energy_predictor_channels=16, pitch_predictor_channels=16,
        pitch_predictor_layers=2,
    )  # fmt: skip
    return Built(
        module=model("FastSpeech2ConformerModel", c), inputs={"input_ids": tokens(30), "return_dict": False},
        dynamic={"input_ids": {0: "batch"}},
    )  # fmt: skip


class _SpeechT5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        c = config(
            "SpeechT5Config", vocab_size=40, hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, speech_decoder_prenet_units=32, speech_decoder_postnet_units=16,
            speech_decoder_postnet_layers=2, speaker_embedding_dim=16, speech_decoder_prenet_dropout=0.0,
        )  # fmt: skip
        self.model = model("SpeechT5ForTextToSpeech", c)

    def forward(self, input_ids: Tensor, frames: Tensor, speaker: Tensor) -> Tensor:
        found: Tensor = self.model(
            input_ids=input_ids, decoder_input_values=frames, speaker_embeddings=speaker, use_cache=False
        ).spectrogram
        return found


def _speecht5() -> Built:
    inputs = {
        "input_ids": tokens(40), "frames": torch.randn(BATCH, 10, 16), "speaker": torch.randn(BATCH, 16)
    }  # fmt: skip
    free = {
        "input_ids": {0: "batch", 1: "sequence"},
        "frames": {0: "batch", 1: "frames"},
        "speaker": {0: "batch"},
    }
    return Built(module=_SpeechT5(), inputs=inputs, dynamic=free)


def _hifigan() -> Built:
    c = config(
        "SpeechT5HifiGanConfig", model_in_dim=16, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1, 3]],
    )  # fmt: skip
    inputs = {"spectrogram": torch.randn(BATCH, 12, 16)}
    return Built(
        module=model("SpeechT5HifiGan", c), inputs=inputs, dynamic={"spectrogram": {0: "batch", 1: "frames"}}
    )


class _Vits(nn.Module):
    """Without noise: what is said is then the same every time."""

    def __init__(self) -> None:
        super().__init__()
        c = config(
            "VitsConfig", vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, flow_size=32, spectrogram_bins=17,
            upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
            prior_encoder_num_flows=2, prior_encoder_num_wavenet_layers=2, duration_predictor_num_flows=2, depth_separable_num_layers=1, noise_scale=0.0,
            noise_scale_duration=0.0, use_stochastic_duration_prediction=False,
        )  # fmt: skip
        self.model = model("VitsModel", c)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).waveform
        return found


def _vits() -> Built:
    ids = tokens(40)
    both = {0: "batch", 1: "sequence"}
    return Built(
        module=_Vits(), inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, dynamic={"input_ids": both, "attention_mask": both}
    )  # fmt: skip


def _musicgen() -> Built:
    c = config(
        "MusicgenDecoderConfig", vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2,
        max_position_embeddings=64, pad_token_id=40, bos_token_id=40,
    )  # fmt: skip
    from transformers import EncoderDecoderCache

    inputs = {
        "input_ids": torch.randint(0, 40, (BATCH * 2, 1)), "encoder_hidden_states": torch.randn(BATCH, 6, 32),
        "past_key_values": EncoderDecoderCache(caches(2, 4, 8), caches(2, 4, 8, past=6)), "use_cache": True,
    }  # fmt: skip
    free = {
        "input_ids": {0: "batch*2"}, "encoder_hidden_states": {0: "batch", 1: "places"}, **cached(2, "past_key_values.self"),
        **cached(2, "past_key_values.cross", "places"),
    }  # fmt: skip
    return Built(module=model("MusicgenForCausalLM", c), inputs=inputs, dynamic=free)


class _Codec(nn.Module):
    def __init__(self, encode: bool) -> None:
        super().__init__()
        c = config(
            "EncodecConfig", num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16, upsampling_ratios=[4, 2], num_lstm_layers=1,
            num_residual_layers=1, target_bandwidths=[1.5], sampling_rate=24000,
        )  # fmt: skip
        self.model: Any = model("EncodecModel", c)
        self.encode = encode

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model.encoder(x) if self.encode else self.model.decoder(x)
        return y


def _encodec_encode() -> Built:
    return Built(
        module=_Codec(True),
        inputs={"x": torch.randn(BATCH, 1, 64)},
        dynamic={"x": {0: "batch", 2: "samples"}},
    )


def _encodec_decode() -> Built:
    return Built(
        module=_Codec(False),
        inputs={"x": torch.randn(BATCH, 16, 12)},
        dynamic={"x": {0: "batch", 2: "frames"}},
    )


FAMILIES: Mapping[str, Builder] = {
    "whisper_encoder": _whisper_encoder,
    "whisper_decode": lambda: _decode(model("WhisperForConditionalGeneration", config("WhisperConfig", **_WHISPER)), 4, 8, 20, 32),
    "wav2vec2": _wav2vec2,
    "moonshine_encoder": _moonshine_encoder,
    "moonshine_decode": lambda: _decode(model("MoonshineForConditionalGeneration", config("MoonshineConfig", **_MOONSHINE)), 4, 8, 20, 32),
    "moonshine_streaming": _moonshine_streaming,
    "parakeet_ctc": _parakeet,
    "log_mel": lambda: Built(module=_LogMel(), inputs={"samples": torch.randn(BATCH, 400)}, dynamic={"samples": {0: "batch", 1: "samples"}}),
    "fastspeech2_conformer": _fastspeech2,
    "speecht5": _speecht5,
    "hifigan": _hifigan,
    "vits": _vits,
    "musicgen_decode": _musicgen,
    "encodec_encode": _encodec_encode,
    "encodec_decode": _encodec_decode,
}  # fmt: skip
