"""Experiments on gradient entanglement; each module's header has its claim, figure, command, hardware, time and result."""

import sys

from entangle import extras
from entangle.errors import MissingExtraError

try:
    extras.require(
        "train",
        "tyro",
        "matplotlib",
        "markdown_it",
        "flax",
        "orbax",
        "grain",
        "tensorflow_datasets",
        "tokenizers",
        "wandb",
    )
except MissingExtraError as error:
    if sys.argv[0] != "-m":
        raise
    # `python -m experiments.NAME`: no module of it runs yet that could end this in one line
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
