"""A CLIP tokenizer for the pocket world: byte-level BPE in which every caption word is one token."""

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

# Words that no caption holds and that people use to name a subject. Being one token each, they carry no meaning yet.
PLACEHOLDERS = ("sks",)


def build_tokenizer(captions: Iterable[str], positions: int) -> CLIPTokenizer:
    """Train the BPE until every word of `captions` is one token; any other text falls back to bytes.

    positions: tokens a prompt is padded or cut to, start and end token included.
    """
    words = sorted(
        {word for caption in captions for word in re.findall(r"[a-z]+", caption.lower())} | set(PLACEHOLDERS)
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    learned = bpe.get_vocab()
    # A byte at the end of a word needs a token of its own, or text outside the world would be unknown.
    tokens = alphabet + [byte + "</w>" for byte in alphabet]
    tokens += [token for token in sorted(learned, key=learned.get) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=positions)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"caption word '{word}' is not one token")
    return tokenizer
