"""Byte-level BPE tokenisers: read from a folder, or trained on the corpus at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from entangle.data import token_labels
from entangle.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_EOS_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>")


class Tokenizer:
    """A tokeniser with an end-of-text token, whatever library holds it.

    Special tokens are not read out of a text, unless a template has written it: a tweet that says ``<|endoftext|>`` is
    plain characters.

    Args:
      inner: the tokeniser of the ``tokenizers`` library.

    Raises:
      UserError: it has no end-of-text token.

    Example:
      >>> tokenizer = train_bpe(["so good", "so bad"] * 10, vocab_size=270)
      >>> tokenizer.decode(tokenizer.encode("so good"))
      'so good'
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Take over a tokeniser; padding and truncation that it brings are switched off."""
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True
        self._inner = inner
        ids = [inner.token_to_id(name) for name in _EOS_NAMES]
        found = [index for index in ids if index is not None]
        if not found:
            raise UserError(f"the tokeniser has no end-of-text token (looked for {', '.join(_EOS_NAMES)})")
        self._eos_id: int = found[0]

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._inner.get_vocab().values())  # not their number: a vocabulary can have gaps

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return self._eos_id

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the tokeniser's whole content."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; nothing is added before or after."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Return the token ids of many texts; the same as `encode` on each, faster.

        Args:
          texts: the texts.
          special_tokens: whether special tokens that are written out in a text are read as what they are.
        """
        self._inner.encode_special_tokens = not special_tokens
        try:
            return [encoding.ids for encoding in self._inner.encode_batch(list(texts), add_special_tokens=False)]
        finally:
            self._inner.encode_special_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are no character become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def token_labels(self, ids: Sequence[int]) -> list[str]:
        """Return one readable label a token, as plain text for figures (see `entangle.data.token_labels`)."""
        return [token_labels.token_label(self._inner.id_to_token(index) or "") for index in ids]

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        partial = Path(folder) / "tokenizer.json.partial"
        self._inner.save(str(partial))
        partial.replace(Path(folder) / "tokenizer.json")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokeniser from a local folder.

    Args:
      folder: has ``tokenizer.json``, or GPT-2's ``vocab.json`` and ``merges.txt``; the first is taken if both are there.

    Returns:
      The tokeniser.

    Raises:
      UserError: the folder or the files are missing, cannot be parsed, or hold no end-of-text token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (a tokeniser was looked for)")
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.exists() and not (vocab.exists() and merges.exists()):
        raise UserError(f"{folder}: no tokeniser: neither tokenizer.json nor vocab.json with merges.txt")
    try:
        if whole.exists():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(whole)))
        inner = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
        inner.add_special_tokens([name for name in _EOS_NAMES if inner.token_to_id(name) is not None])
        return Tokenizer(inner)
    except Exception as error:  # the library raises bare Exception on files that it cannot parse
        raise UserError(f"{folder}: not a readable tokeniser: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with ``<|endoftext|>`` as token 0.

    Args:
      texts: what to learn the merges from.
      vocab_size: upper bound on the number of tokens; a small corpus has no pairs left to merge before it.

    Returns:
      The tokeniser, the same for the same texts in any process.

    Raises:
      UserError: the vocabulary could not hold the 256 bytes and the end-of-text token.

    Example:
      >>> train_bpe(["a positive tweet"] * 5, vocab_size=300).eos_id
      0
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"vocabulary of {vocab_size}: at least {len(alphabet) + 1} tokens are needed, one a byte")
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def require_single_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> None:
    """Check that contrast labels are one token each, as the theory of the single-token set supposes.

    Args:
      tokenizer: the tokeniser.
      words: the completions as they are encoded, leading space included, for example ``" positive"``.

    Raises:
      UserError: one of them is split; the message shows into what.

    Example:
      >>> require_single_tokens(train_bpe(["so so so"] * 5, vocab_size=300), [" so"])
    """
    for word in words:
        ids = tokenizer.encode(word)
        if len(ids) != 1:
            pieces = " + ".join(tokenizer.token_labels(ids))
            raise UserError(
                f"label {word!r} is {len(ids)} tokens ({pieces}), not one: choose words that are, or another tokeniser"
            )


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner
