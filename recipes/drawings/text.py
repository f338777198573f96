"""The two tokenizers and the two CLIP text encoders, shaped as Stable Diffusion XL expects them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .art import CACHE
from .captions import vocabulary_text

LENGTH = 24  # tokens, start and end marks included
WIDTH = 160
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def learned_merges(phrases: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that join every word of `phrases` into one token, the commonest pairs first."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words = sorted({word for phrase in phrases for word in phrase.replace("-", " ").split()})
    trainer = trainers.BpeTrainer(vocab_size=100_000, show_progress=False, end_of_word_suffix="</w>")
    learner.train_from_iterator(words, trainer)
    return [(str(a), str(b)) for a, b in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer(phrases: list[str], length: int = LENGTH) -> CLIPTokenizer:
    """A CLIP tokenizer over all single bytes and the words of `phrases`, so that any text can be written.

    The end mark has the highest id and also pads, as in CLIP.
    """
    merges = learned_merges(phrases)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), BOS, EOS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def kept_tokenizer(folder: Path = CACHE / "tokenizer") -> CLIPTokenizer:
    """The recipe's tokenizer, made once: words that are equally common come in another order each time."""
    if not folder.exists():
        build_tokenizer(vocabulary_text()).save_pretrained(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Three layers: the UNet reads the last but one, so two of them shape each token."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass
class Text:
    """Tokenizer and encoders together (both tokenizers of the pipeline are this one)."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def ids(self, captions: list[str]) -> torch.Tensor:
        """Token ids (n, 24), padded."""
        encoded = self.tokenizer(
            captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        ids: torch.Tensor = encoded.input_ids
        return ids

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (n, 24, 320) and pooled ones (n, 160), computed as the SDXL pipeline does."""
        one = self.first(ids, output_hidden_states=True)
        two = self.second(ids, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def build() -> Text:
    """Fresh encoders over the recipe's tokenizer."""
    tokenizer = kept_tokenizer()
    config = text_config(tokenizer)
    return Text(tokenizer, CLIPTextModel(config), CLIPTextModelWithProjection(config))
