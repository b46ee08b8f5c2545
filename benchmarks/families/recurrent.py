"""Networks that carry a state from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optkit.benchmarks.families.catalogue import Builder, Built
from optkit.benchmarks.families.hub import BATCH, LENGTH, tokens

_WORDS = 50


class _Keyboard(nn.Module):
    """Next words from an LSTM, as federated keyboards learn them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(_WORDS, 16), nn.LSTM(16, 32, 2, batch_first=True), nn.Linear(32, _WORDS)  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.words(input_ids))
        y: Tensor = self.head(x)
        return y


class _Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru, self.head = nn.Embedding(_WORDS, 16), nn.GRU(16, 24, bidirectional=True), nn.Linear(48, 7)  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.gru(self.words(input_ids).transpose(0, 1))
        y: Tensor = self.head(x.transpose(0, 1))
        return y


class _Transducer(nn.Module):
    """One chunk of sound and the last word through an RNN-T: encoder, predictor and joint network, states in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = nn.LSTM(20, 32, 2, batch_first=True), nn.LSTM(16, 32, batch_first=True)
        self.words, self.joint = nn.Embedding(_WORDS, 16), nn.Linear(32, _WORDS)

    def forward(
        self, frames: Tensor, word: Tensor, h: Tensor, c: Tensor, hp: Tensor, cp: Tensor
    ) -> tuple[Tensor, ...]:
        x, (h, c) = self.encoder(frames, (h, c))
        y, (hp, cp) = self.predictor(self.words(word), (hp, cp))
        return self.joint(torch.tanh(x[:, :, None] + y[:, None])).log_softmax(-1), h, c, hp, cp


class _Tacotron(nn.Module):
    """Text to spectrogram with given frames (teacher forcing): convolutions, a BiLSTM, attention, an LSTM, a post-net."""

    def __init__(self, bins: int = 20) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, 32)
        self.convolve = nn.Sequential(nn.Conv1d(32, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU())
        self.encoder = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.prenet = nn.Sequential(nn.Linear(bins, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.attend, self.decoder = nn.MultiheadAttention(32, 1, batch_first=True), nn.LSTM(64, 32, 2, batch_first=True)  # fmt: skip
        self.frame, self.stop = nn.Linear(64, bins), nn.Linear(64, 1)
        self.post = nn.Sequential(nn.Conv1d(bins, 32, 5, padding=2), nn.BatchNorm1d(32), nn.Tanh(), nn.Conv1d(32, bins, 5, padding=2))  # fmt: skip

    def forward(self, input_ids: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolve(self.words(input_ids).transpose(1, 2)).transpose(1, 2)
        x, _ = self.encoder(x)
        query = self.prenet(frames)
        seen, _ = self.attend(query, x, x, need_weights=False)
        y, _ = self.decoder(torch.cat([query, seen], -1))
        y = torch.cat([y, seen], -1)
        mel = self.frame(y)
        return mel + self.post(mel.transpose(1, 2)).transpose(1, 2), self.stop(y)[..., 0]


_IDS = {"input_ids": {0: "batch", 1: "sequence"}}


def _rnnt() -> Built:
    inputs = {
        "frames": torch.randn(BATCH, 6, 20), "word": tokens(_WORDS, 1), "h": torch.randn(2, BATCH, 32),
        "c": torch.randn(2, BATCH, 32), "hp": torch.randn(1, BATCH, 32), "cp": torch.randn(1, BATCH, 32),
    }  # fmt: skip
    free = {"frames": {0: "batch", 1: "frames"}, "word": {0: "batch"}, **{n: {1: "batch"} for n in ("h", "c", "hp", "cp")}}  # fmt: skip
    return Built(module=_Transducer(), inputs=inputs, dynamic=free)


def _tacotron2() -> Built:
    inputs = {"input_ids": tokens(_WORDS), "frames": torch.randn(BATCH, LENGTH + 8, 20)}
    return Built(module=_Tacotron(), inputs=inputs, dynamic={**_IDS, "frames": {0: "batch", 1: "frames"}})


FAMILIES: Mapping[str, Builder] = {
    "federated_lstm": lambda: Built(module=_Keyboard(), inputs={"input_ids": tokens(_WORDS)}, dynamic=_IDS),
    "gru_tagger": lambda: Built(module=_Tagger(), inputs={"input_ids": tokens(_WORDS)}, dynamic=_IDS),
    "rnnt_streaming_step": _rnnt,
    "tacotron2": _tacotron2,
}
