"""The tiny world's tokenizer: CLIP's byte pairs, with just the merges that its own words need."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.15),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.20),
    "green": (0.15, 0.65, 0.25),
    "cyan": (0.20, 0.80, 0.90),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.55, 0.15, 0.70),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
PLURALS = ("circles", "squares", "triangles", "rings", "crosses", "stars")
NUMBERS = ("two", "three", "four")
SIZES = ("small", "large")
TEXTURES = ("striped", "dotted", "checkered")
SIDES = ("left", "right", "above", "below", "top", "bottom", "middle")
OTHERS = ("a", "an", "of", "at", "in", "on", "the", "and", "background")

WORDS = (*COLOURS, *SHAPES, *PLURALS, *NUMBERS, *SIZES, *TEXTURES, *SIDES, *OTHERS)
LENGTH = 77
"""Tokens of every prompt, as in SD1.5."""

_WORD_END = "</w>"


@lru_cache(maxsize=1)
def _build() -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """Merges in order of rank, and the vocabulary.

    A word's pairs are merged from the left after all earlier merges were tried on it. Merges that
    come later never change how an earlier word is put together, since lower ranks go first: so
    every word is one token in the end.
    """
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = [*word[:-1], word[-1] + _WORD_END]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                best = pairs[0]
                ranks[best] = len(ranks)
                merges.append(best)
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
    symbols = [*_bytes(), *(symbol + _WORD_END for symbol in _bytes())]
    symbols += ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return tuple(merges), {symbol: index for index, symbol in enumerate(symbols)}


def _bytes() -> list[str]:
    """One printable character for each byte, in the order and with the choice of GPT-2's BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def token(word: str) -> int:
    """The id of one of WORDS."""
    return _build()[1][word + _WORD_END]


def vocabulary_size() -> int:
    """How many tokens there are."""
    return len(_build()[1])


def start() -> int:
    """The id that every prompt begins with."""
    return _build()[1]["<|startoftext|>"]


def end() -> int:
    """The id that every prompt ends with and is filled up with: the highest, as in CLIP."""
    return _build()[1]["<|endoftext|>"]


def write_tokenizer(folder: Path) -> None:
    """Write the files that CLIPTokenizer of transformers reads: vocabulary, merges, settings."""
    merges, vocabulary = _build()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text + "\n", "utf-8")
    ends = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(ends, indent=2) + "\n", "utf-8")
    settings = {**ends, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
