"""DPO as one runs it with TRL: its ``DPOTrainer``, stopped before every step until it is its turn."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from scripts.benchmarks.measuring import Contender


def contender(
    folder: Path, tokens: np.ndarray, prompt: int, pairs: int, *, beta: float, learning_rate: float
) -> Contender:
    """Make TRL's side: a round begins when the trainer has its batch and ends when it has the next one.

    Args:
      folder: has the GPT-2 checkpoints ``policy`` and ``reference``.
      tokens: all pairs in their order, ``[N, 2, T]``; the last of a row ends a text, and is nowhere else.
      prompt: tokens of every prompt.
      pairs: of a step.
      beta: of DPO.
      learning_rate: of AdamW, constant.

    Returns:
      A step on the next pairs; after the last come the first again.
    """
    logging.disable_progress_bar()
    policy, reference = (
        GPT2LMHeadModel.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="sdpa")
        for name in ("policy", "reference")
    )
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=pairs,
        train_sampling_strategy="sequential",
        # more than are run: training waits for its turn and ends with the process
        num_train_epochs=1000,
        beta=beta,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    turns = _Turns()
    trainer = DPOTrainer(
        policy,
        reference,
        settings,
        train_dataset=Dataset.from_dict(_texts(tokens, prompt)),
        processing_class=_words(int(tokens.max()) + 1, int(tokens[0, 0, -1])),
        callbacks=[turns],
    )
    _check_tokens(trainer.train_dataset, tokens, prompt)
    turns.start(trainer)
    return Contender("trl", turns.run)


class _Turns(TrainerCallback):
    """Hands the processor to the trainer's thread for one step at a time."""

    def __init__(self) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[float | Exception] = queue.Queue()
        self.loss = float("nan")

    def start(self, trainer: Any) -> None:
        """Let the trainer go on to its first step; a thread that waits does not keep the process from ending."""
        step = trainer.training_step

        def kept(*arguments: Any, **named: Any) -> torch.Tensor:
            loss = step(*arguments, **named)
            self.loss = float(loss)
            return loss

        def train() -> None:
            try:
                trainer.train()
            except Exception as error:
                self.done.put(error)

        trainer.training_step = kept
        threading.Thread(target=train, daemon=True).start()
        self._wait()

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        """Tell that the step before is over, wait for the turn of the next one."""
        self.done.put(self.loss)
        self.go.get()

    def run(self) -> float:
        """Let the trainer do a step; returns its loss."""
        self.go.put(None)
        return self._wait()

    def _wait(self) -> float:
        told = self.done.get()
        if isinstance(told, Exception):
            raise told
        return told


def _texts(tokens: np.ndarray, prompt: int) -> dict[str, list[str]]:
    """Texts of words that are the tokens' numbers; the trainer adds the end itself."""
    parts = {"prompt": tokens[:, 0, :prompt], "chosen": tokens[:, 0, prompt:-1], "rejected": tokens[:, 1, prompt:-1]}
    return {name: [" ".join(map(str, row)) + " " for row in rows] for name, rows in parts.items()}


def _words(vocabulary: int, end: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the tokens' numbers."""
    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(end), pad_token=str(end))


def _check_tokens(rows: Dataset, tokens: np.ndarray, prompt: int) -> None:
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        found = np.concatenate([rows["prompt_ids"][:], rows[name][:]], axis=1)
        np.testing.assert_array_equal(found, tokens[:, side])
