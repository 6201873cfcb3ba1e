"""Token gradients as one would take them in PyTorch with ``transformers``: one backward each, all of them kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2LMHeadModel
from transformers.utils import logging

PART = 2**18


def cosines(folder: Path, tokens: np.ndarray, prompt: int) -> Callable[[], np.ndarray]:
    """Make the PyTorch side.

    Args:
      folder: a GPT-2 checkpoint.
      tokens: ``[2, T]``.
      prompt: tokens of the prompt; the gradients of all later ones are taken.

    Returns:
      A function that returns all cosines of chosen and rejected tokens, ``[N, N]``.
    """
    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    parameters = list(model.parameters())  # the tied matrix once
    count = tokens.shape[1] - prompt

    def run() -> np.ndarray:
        gradients = torch.empty(2, count, sum(p.numel() for p in parameters))
        for side in (0, 1):
            row = torch.from_numpy(tokens[side : side + 1]).long()
            log_probs = torch.log_softmax(model(row).logits[0, :-1], -1)
            taken = log_probs.gather(-1, row[0, 1:, None])[prompt - 1 :, 0]
            for index, log_prob in enumerate(taken):
                found = torch.autograd.grad(log_prob, parameters, retain_graph=True)
                torch.cat([g.flatten() for g in found], out=gradients[side, index])
        # in parts: a sum over 124 million products in float32 is off by more than one percent
        parts = gradients.flatten(0, 1).split(PART, dim=-1)
        products = torch.stack([part @ part.T for part in parts]).double().sum(0)
        norms = products.diagonal().sqrt()
        return (products / torch.outer(norms, norms))[:count, count:].numpy()

    return run


def run_once(folder: Path, tokens: np.ndarray, prompt: int) -> None:
    """Do the PyTorch side once."""
    cosines(folder, tokens, prompt)()
