"""The geometry of pairs as one takes it in PyTorch with ``transformers``: one pair at a time, two backward passes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2LMHeadModel
from transformers.utils import logging


def geometry(folder: Path, tokens: np.ndarray, completion_mask: np.ndarray) -> Callable[[], np.ndarray]:
    """Make the PyTorch side.

    Args:
      folder: a GPT-2 checkpoint.
      tokens: ``[B, 2, T]``; rows are cut where their completions end.
      completion_mask: ``[B, 2, T]`` bool.

    Returns:
      A function that returns ``|g_w|^2, |g_l|^2, <g_w, g_l>`` of every pair, ``[B, 3]``.
    """
    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    parameters = list(model.parameters())  # the tied matrix once

    def gradient(row: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, ...]:
        end = int(np.flatnonzero(mask)[-1]) + 1
        ids = torch.from_numpy(row[None, :end]).long()
        log_probs = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1], -1)
        taken = log_probs.gather(-1, ids[0, 1:, None])[:, 0]
        return torch.autograd.grad(taken[torch.from_numpy(mask[1:end])].sum(), parameters)

    def product(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> float:
        return sum(float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(left, right, strict=True))

    def run() -> np.ndarray:
        found = []
        for rows, masks in zip(tokens, completion_mask, strict=True):
            chosen, rejected = (gradient(row, mask) for row, mask in zip(rows, masks, strict=True))
            found.append((product(chosen, chosen), product(rejected, rejected), product(chosen, rejected)))
        return np.asarray(found)

    return run
