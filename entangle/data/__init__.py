"""From text to batches: preference pairs and sentiment sets, tokenisation, seekable batches.

Every source (the embedded grammar, a TweetEval folder, sentiment140, a preference JSONL file) ends in a list of
`PreferenceRecord`, goes through one door (`prepare_pairs`, `load_pairs`), becomes arrays of one shape (`encode_pairs`)
and comes out in batches whose order is a function of seed and epoch (`pair_batches`).
"""

from entangle import extras

extras.require("train", "tensorflow_datasets", "array_record", "grain", "tokenizers", "jinja2")

from entangle.data.batches import encode_text, pair_batches, text_batches
from entangle.data.builders import PreferencePairs, StoredPairs, load_pairs, prepare_pairs
from entangle.data.chat_templates import ChatTemplate, load_chat_template
from entangle.data.cleaning import clean_text
from entangle.data.dialogues import hh_rlhf
from entangle.data.encode import EncodedPairs, EncodingReport, encode_pairs
from entangle.data.grammar import generate_tweets
from entangle.data.preferences import BadLine, ReadReport, divide_by_prompt, read_preferences
from entangle.data.records import LabelledText, PreferenceRecord
from entangle.data.sentiment import (
    LABELS,
    PAIR_SETS,
    SentimentCorpus,
    balanced,
    embedded_corpus,
    sentiment_pairs,
)
from entangle.data.sentiment140 import read_tfds_sentiment140
from entangle.data.tokenization import Tokenizer, load_tokenizer, require_single_tokens, train_bpe
from entangle.data.tweeteval import read_tweeteval

__all__ = [
    "LABELS",
    "PAIR_SETS",
    "BadLine",
    "ChatTemplate",
    "EncodedPairs",
    "EncodingReport",
    "LabelledText",
    "PreferencePairs",
    "PreferenceRecord",
    "ReadReport",
    "SentimentCorpus",
    "StoredPairs",
    "Tokenizer",
    "balanced",
    "clean_text",
    "divide_by_prompt",
    "embedded_corpus",
    "encode_pairs",
    "encode_text",
    "generate_tweets",
    "hh_rlhf",
    "load_chat_template",
    "load_pairs",
    "load_tokenizer",
    "pair_batches",
    "prepare_pairs",
    "read_preferences",
    "read_tfds_sentiment140",
    "read_tweeteval",
    "require_single_tokens",
    "sentiment_pairs",
    "text_batches",
    "train_bpe",
]
