"""SmolLM2-135M, one step at a time: how likely it finds the next token of docstrings (1 / perplexity).

The texts are docstrings of Python's standard library and of NumPy. The caches of a step are those that the float model, as
``benchmarks/builders/phone.py`` has it, kept of the tokens before: what is judged is each step by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from optkit.benchmarks.builders import gguf, phone
from optkit.benchmarks.docstrings import pairs

METRIC = "1 / perplexity"
# Texts to judge with and to calibrate with; of each, tokens that only lead to what is judged, and one of how many is.
_TEXTS, _CALIBRATION, _AHEAD, _EVERY = 6, 2, 7, 3

Feeds = dict[str, np.ndarray]


def samples() -> Iterator[tuple[Feeds, int]]:
    """Steps, each with the token that follows."""
    yield from _steps(_TEXTS, held_out=False)


def score(outputs: Feeds, label: int) -> float:
    """The logarithm of the right token's probability."""
    scores = outputs["scores"].astype(np.float64)[0]
    return float(scores[label] - scores.max() - np.log(np.exp(scores - scores.max()).sum()))


def aggregate(scores: Sequence[float]) -> float:
    """The geometric mean of the probabilities."""
    return float(np.exp(np.mean(scores)))


def calibration() -> Iterator[Feeds]:
    """Steps of texts that no sample reads."""
    for feeds, _ in _steps(_CALIBRATION, held_out=True):
        yield feeds


@cache
def _steps(texts: int, *, held_out: bool) -> tuple[tuple[Feeds, int], ...]:
    tokenizer, (module, _) = _tokenizer(), phone.smollm2()
    caches = 2 * len(module.blk)
    found = []
    with torch.no_grad():
        for _, document in pairs(texts, held_out=held_out):
            tokens = tokenizer.encode(document).ids[: phone.PLACES + 1]
            layer = module.blk[0]
            kept = [torch.zeros(1, layer.shared, phone.PLACES, layer.size) for _ in range(caches)]
            for place, (token, after) in enumerate(pairwise(tokens)):
                given = {"token": np.array([token]), "place": np.array([place])}
                given |= {f"in_{i}": kept_.numpy() for i, kept_ in enumerate(kept)}
                if place >= _AHEAD and place % _EVERY == 0:
                    found.append((given, after))
                _, *kept = module(torch.tensor([token]), torch.tensor([place]), *kept)
    return tuple(found)


@cache
def _tokenizer() -> Tokenizer:
    """As the file has it: byte pairs, each digit by itself."""
    known, _ = gguf.read(phone.fetched("SmolLM2-135M-Instruct.Q4_1.gguf"))
    vocabulary = {word: i for i, word in enumerate(known["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ", 1)) for line in known["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits, words = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer
