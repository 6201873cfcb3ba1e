"""Calls of TRL's own loss code on given log-probabilities: no trainer is initialised, no model is run.

A trainer is an instance whose ``__init__`` was not run, with the attributes that its loss reads; its model is a table. All
functions return a ``Result``: the loss, and its derivatives by every single token's log-probability.
"""

import contextlib
import warnings
from collections import defaultdict
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # collected for doctests, too, where there is no extra

from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

with warnings.catch_warnings():
    # That these may change without notice is what the tests are for.
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.tpo import TPOTrainer


class Responses(NamedTuple):
    """R rows of T tokens in NumPy float64; of B pairs the chosen ones come first, then the rejected ones.

    Position t of ``[R, T - 1]`` is the prediction of token t + 1, as in TRL.
    """

    log_probs: np.ndarray  # [R, T - 1], of all tokens, prompt and padding too
    ref_log_probs: np.ndarray  # [R, T - 1]
    log_sum_squares: np.ndarray  # [R, T - 1], of the policy
    completion_mask: np.ndarray  # [R, T]
    attention_mask: np.ndarray  # [R, T], prompt and completion
    bits: np.ndarray  # [R, T], token ids 0 and 1

    @property
    def scored(self):
        return self.completion_mask[:, 1:]


class Result(NamedTuple):
    loss: np.ndarray
    slopes: np.ndarray  # [R, T - 1]


def draw(seed, rows=32, width=12, shift=0.0, longest_prompt=4):
    """Rows of ``width`` tokens with the policy ``shift`` nats a token above the reference, on average.

    Log-probabilities are multiples of 1/1024, so that float32 holds their sums exactly. A prompt has a token at least: TRL
    counts completion tokens with and without the first position.
    """
    rng = np.random.default_rng(seed)
    policy = -rng.uniform(0.1, 3.0, (rows, width - 1))
    reference = policy - shift - rng.normal(0.0, 0.5, policy.shape)
    position = np.arange(width)
    prompt = rng.integers(1, longest_prompt + 1, (rows, 1))
    end = rng.integers(prompt + 1, width + 1)
    return Responses(
        *(
            np.minimum(np.round(x * 1024), -1) / 1024
            for x in (policy, reference, policy - rng.uniform(-0.5, 1.0, (rows, 1)))
        ),
        completion_mask=(position >= prompt) & (position < end),
        attention_mask=np.broadcast_to(position < end, (rows, width)),
        bits=rng.integers(0, 2, (rows, width)),
    )


class _Table:
    """In the place of a language model: what it says of a row is looked up by the row's first token.

    With labels it answers as TRL's fused head does, without as a causal language model of a vocabulary of two.
    """

    training = True
    is_gradient_checkpointing = False
    _modules = MappingProxyType({})  # accelerate looks for compiled ones among them

    def __init__(self, log_probs, log_sum_squares, dtype):
        self.log_probs = torch.tensor(log_probs, dtype=dtype, requires_grad=True)
        self.log_sum_squares = torch.tensor(log_sum_squares, dtype=dtype)

    def __call__(self, input_ids, attention_mask, labels=None, use_cache=False, fused_lm_head=False):
        rows = input_ids[:, 0]
        log_probs = self.log_probs[rows]
        if labels is None:
            # The label's logit is its log-probability, the other token has the rest.
            rest = torch.log(-torch.expm1(log_probs))
            first = input_ids[:, 1:] == 0
            logits = torch.stack([torch.where(first, log_probs, rest), torch.where(first, rest, log_probs)], -1)
            return SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)))
        assert fused_lm_head
        scored = labels[:, 1:] != -100
        return SimpleNamespace(
            log_probs=torch.where(scored, log_probs, 0.0),
            log_sum_sq_probs=torch.where(scored, self.log_sum_squares[rows], 0.0),
            entropy=torch.zeros_like(log_probs),
            mean_logits=torch.zeros_like(log_probs),
            is_top1=torch.zeros_like(scored),
        )

    def train(self):
        """The mode of a model, which a table has not."""

    def result(self, loss):
        if self.log_probs.grad is None:
            loss.backward()
        return Result(loss.detach().numpy(), self.log_probs.grad.numpy())


def _policy(responses, dtype):
    return _Table(responses.log_probs, responses.log_sum_squares, dtype)


def _reference(responses, dtype):
    return _Table(responses.ref_log_probs, responses.log_sum_squares, dtype)


def _trainer(trainer_class, **attributes):
    as_is = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=as_is, gather_for_metrics=as_is, backward=lambda loss: loss.backward()
    )
    trainer = object.__new__(trainer_class)
    common = {
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(common | attributes)
    return trainer


def _inputs(responses, rows):
    ids = torch.tensor(responses.bits[rows])
    ids[:, 0] = torch.tensor(rows)
    masks = {
        name: torch.tensor(getattr(responses, name)[rows].astype(int)) for name in ("attention_mask", "completion_mask")
    }
    return {"input_ids": ids, **masks}


@contextlib.contextmanager
def _all_in(dtype):
    """Let TRL compute in one type, also where its code names float32 or leaves the type of a number to PyTorch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with (
            mock.patch.object(torch, "float32", dtype),
            mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.to(dtype)),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def dpo_loss(
    responses,
    *loss_types,
    beta,
    loss_weights=None,
    label_smoothing=0.0,
    discopop_tau=0.05,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    ld_alpha=None,
    use_weighting=False,
    precompute_ref_logps=False,
    dtype=torch.float64,
):
    """``DPOTrainer._compute_loss``; hyperparameters have the names of ``DPOConfig``."""
    model, ref_model = _policy(responses, dtype), _reference(responses, dtype)
    trainer = _trainer(
        DPOTrainer,
        model=model,
        ref_model=ref_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        precompute_ref_logps=precompute_ref_logps,
    )
    inputs = _inputs(responses, np.arange(len(responses.bits)))
    if precompute_ref_logps:
        sums = torch.tensor((responses.ref_log_probs * responses.scored).sum(1), dtype=dtype)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums.chunk(2)
    with _all_in(dtype):
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return model.result(loss)


def kto_loss(responses, loss_type, desirable, kl_responses=None, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """``KTOTrainer._compute_loss`` of single responses; those of ``kl_responses`` give the reference point."""
    dtype = torch.float64
    every = responses
    if kl_responses is not None:
        every = Responses(*(np.concatenate(fields) for fields in zip(responses, kl_responses, strict=True)))
    model, ref_model = _policy(every, dtype), _reference(every, dtype)
    trainer = _trainer(
        KTOTrainer,
        model=model,
        ref_model=ref_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=kl_responses is not None,
        precompute_ref_logps=False,
    )
    count = len(responses.bits)
    inputs = _inputs(every, np.arange(count)) | {"label": torch.tensor(desirable)}
    if kl_responses is not None:
        of_kl = _inputs(every, np.arange(count, len(every.bits)))
        inputs |= {f"KL_{name}": values for name, values in of_kl.items()}
    with _all_in(dtype):
        loss, slopes = model.result(trainer._compute_loss(model, inputs, return_outputs=False))
    assert not slopes[count:].any()
    return Result(loss, slopes[:count])


def _two_branches(responses):
    """What the collator of CPO and ORPO makes of pairs."""
    inputs = _inputs(responses, np.arange(len(responses.bits)))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    fields = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    halves = {name: values.chunk(2) for name, values in fields.items()}
    return {f"{side}_{name}": half[i] for name, half in halves.items() for i, side in enumerate(("chosen", "rejected"))}


def _cpo_trainer(loss_type, beta, label_smoothing=0.0, simpo_gamma=0.5, alpha=0.0, cpo_alpha=0.0):
    return _trainer(
        CPOTrainer,
        is_encoder_decoder=False,
        pad_token_id=0,
        loss_type="simpo" if loss_type == "alphapo" else loss_type,  # as in CPOConfig
        beta=beta,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
        alpha=alpha,
        cpo_alpha=cpo_alpha,
    )


def cpo_step(responses, loss_type, **hyperparameters):
    """``CPOTrainer.get_batch_loss_metrics``; hyperparameters have the names of ``CPOConfig``."""
    model = _policy(responses, torch.float64)
    trainer = _cpo_trainer(loss_type, **hyperparameters)
    with _all_in(torch.float64):
        loss, _ = trainer.get_batch_loss_metrics(model, _two_branches(responses))
    return model.result(loss)


def cpo_loss(chosen, rejected, loss_type, **hyperparameters):
    """``CPOTrainer.cpo_loss`` of ``[B]`` log-probabilities, already averaged where the loss is of averages: ``[B]``."""
    trainer = _cpo_trainer(loss_type, **hyperparameters)
    return trainer.cpo_loss(torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def orpo_step(responses, beta):
    """``ORPOTrainer.get_batch_loss_metrics``; its likelihood is that of prompt and completion."""
    model = _policy(responses, torch.float64)
    trainer = _trainer(ORPOTrainer, is_encoder_decoder=False, padding_value=0, beta=beta)
    with _all_in(torch.float64):
        loss, _ = trainer.get_batch_loss_metrics(model, _two_branches(responses))
    return model.result(loss)


def odds_ratio_loss(chosen, rejected, beta):
    """``ORPOTrainer.odds_ratio_loss`` of ``[B]`` averages, which it takes in float32; to be subtracted: ``[B]``."""
    trainer = _trainer(ORPOTrainer, beta=beta)
    return trainer.odds_ratio_loss(torch.tensor(chosen), torch.tensor(rejected))[0].numpy()


def tpo_loss(responses, loss_type, *, beta, label_smoothing=0.0, tpo_l_gamma=0.5, tpo_alpha=0.0):
    """``TPOTrainer._compute_loss``; where there is a likelihood, its third response is the chosen one."""
    model = _policy(responses, torch.float64)
    trainer = _trainer(
        TPOTrainer,
        model=model,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        tpo_l_gamma=tpo_l_gamma,
        tpo_alpha=tpo_alpha,
    )
    count = len(responses.bits)
    third = np.arange(count // 2) if tpo_alpha else np.arange(0)
    rows = np.concatenate([np.arange(count), third])
    return model.result(trainer._compute_loss(model, _inputs(responses, rows), return_outputs=False))


def online_dpo_step(responses, loss_type, *, beta, seed=0):
    """``OnlineDPOTrainer.training_step`` with these responses as its samples, and rewards that say which were chosen."""
    dtype = torch.float64
    model, ref_model = _policy(responses, dtype), _reference(responses, dtype)
    count = len(responses.bits) // 2
    exchanged = np.random.default_rng(seed).integers(0, 2, count) * count
    rows = np.concatenate([np.arange(count) + exchanged, np.arange(count) + count - exchanged])
    inputs = {name: values[:, 1:] for name, values in _inputs(responses, rows).items()}
    prompts = torch.tensor(rows)[:, None]
    args = {"use_vllm": False, "missing_eos_penalty": None, "loss_type": loss_type, "torch_empty_cache_steps": None}
    trainer = _trainer(
        OnlineDPOTrainer,
        model=model,
        ref_model=ref_model,
        args=SimpleNamespace(**args, optim="adamw_torch", n_gpu=1, gradient_accumulation_steps=1),
        eos_token_ids=[2],
        max_length=responses.bits.shape[1],
        processing_class=SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: [""] * len(ids)),
        reward_funcs=None,
        _beta=beta,
        stats=defaultdict(list),
        _generate=lambda *_: (prompts, torch.ones_like(prompts), inputs["input_ids"], inputs["completion_mask"], None),
        _calculate_rewards_from_functions=lambda **_: torch.tensor(rows < count).double(),
    )
    return model.result(trainer.training_step(model, {"prompt": ["a prompt"] * count}))
