"""The paper's three sentiment pair sets, and the embedded corpus to make them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from entangle.data import grammar
from entangle.data.records import LabelledText, PreferenceRecord
from entangle.errors import UserError

LABELS = ("negative", "positive")
"""The two labels that are contrasted unless others are named."""

PAIR_SETS: Mapping[str, str] = MappingProxyType(
    {
        "single_token": "",
        "short_suffix": " sentiment.",
        "long_suffix": " sentiment based on my judgement of this tweet.",
    }
)
"""Name of a pair set -> what both completions say after their label; nothing, a few tokens, or many."""

PROMPT = "Tweet: {text}\nSentiment:"
"""The prompt; completions begin with a space."""


class SentimentCorpus(NamedTuple):
    """Labelled tweets, and plain text to learn the language from.

    Attributes:
      train: tweets to make training pairs from.
      held_out: tweets to make evaluation pairs from; no text of it is in ``train``.
      text: texts for language-model pretraining.
    """

    train: list[LabelledText]
    held_out: list[LabelledText]
    text: list[str]


def embedded_corpus(train: int = 2000, held_out: int = 512, text: int = 20_000, seed: int = 0) -> SentimentCorpus:
    """Write a corpus with the package's own grammar; nothing is downloaded.

    Every second text says its tweet's sentiment: a small model learns none from bare tweets, while a pretrained one has
    met it in its text. None of these tweets is in ``train`` or ``held_out``.

    Args:
      train: number of training tweets.
      held_out: number of held-out tweets.
      text: number of further tweets, as language-model text, every second one with " Sentiment: " and its label.
      seed: seed of the grammar.

    Returns:
      The corpus; no tweet occurs twice in it.

    Example:
      >>> corpus = embedded_corpus(train=8, held_out=4, text=20)
      >>> len(corpus.train), len(corpus.held_out), len(corpus.text)
      (8, 4, 20)
    """
    tweets = grammar.generate_tweets(train + held_out + text, seed, LABELS)
    rest = [
        f"{tweet.text} Sentiment: {tweet.label}" if number % 2 else tweet.text
        for number, tweet in enumerate(tweets[train + held_out :])
    ]
    return SentimentCorpus(tweets[:train], tweets[train : train + held_out], rest)


def balanced(texts: Sequence[LabelledText], labels: Sequence[str], count: int) -> list[LabelledText]:
    """Take the same number of texts of each label, alternating.

    A label that is more frequent in one split than in another would move the chosen log-probability of held-out pairs
    by itself, whatever the gradients do.

    Args:
      texts: labelled texts.
      labels: the labels wanted.
      count: at most so many texts in all.

    Returns:
      The first texts of each label, as many as the rarest label has.

    Example:
      >>> texts = [LabelledText("so good", label, "here:1") for label in ("a", "a", "a", "b")]
      >>> [text.label for text in balanced(texts, ("a", "b"), count=10)]
      ['a', 'b']
    """
    by_label = [[text for text in texts if text.label == label] for label in labels]
    rows = list(zip(*by_label, strict=False))[: count // len(labels)]
    return [text for row in rows for text in row]


def sentiment_pairs(
    texts: Sequence[LabelledText], pair_set: str, labels: Sequence[str] = LABELS, words: Sequence[str] | None = None
) -> list[PreferenceRecord]:
    """Make one preference pair of every tweet: its label is chosen, the other of the two is rejected.

    Args:
      texts: labelled tweets.
      pair_set: a name in `PAIR_SETS`.
      labels: the two labels.
      words: what the completions say for the two labels; by default the labels themselves.

    Returns:
      As many pairs, in order.

    Raises:
      UserError: an unknown pair set, not two different labels, or a text with neither of them.

    Example:
      >>> pair = sentiment_pairs([LabelledText("so good", "positive", "here:1")], "short_suffix")[0]
      >>> pair.prompt, pair.chosen, pair.rejected
      ('Tweet: so good\\nSentiment:', ' positive sentiment.', ' negative sentiment.')
    """
    if pair_set not in PAIR_SETS:
        raise UserError(f"unknown pair set {pair_set!r}: one of {', '.join(PAIR_SETS)}")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise UserError(f"two different labels are contrasted, not {', '.join(map(repr, labels))}")
    other = {labels[0]: labels[1], labels[1]: labels[0]}
    for text in texts:
        if text.label not in other:
            raise UserError(f"{text.source}: label {text.label!r} is neither {labels[0]!r} nor {labels[1]!r}")
    said = {label: f" {word}{PAIR_SETS[pair_set]}" for label, word in zip(labels, words or labels, strict=True)}
    return [
        PreferenceRecord(PROMPT.format(text=text.text), said[text.label], said[other[text.label]], text.source)
        for text in texts
    ]
