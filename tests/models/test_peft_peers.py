"""Adapters in both directions against PEFT itself; needs the extra ``peers``."""

import dataclasses

import numpy as np
import pytest

from entangle.models import (
    join_params,
    language_model,
    load_adapters,
    load_pretrained,
    save_adapters,
    save_pretrained,
    split_params,
)
from tests.models.test_peft import CONFIGS, TOKENS, drawn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same_with_our_adapters(tmp_path, name):
    config = CONFIGS[name]
    params = drawn(config)
    adapters, base = split_params(params)
    save_pretrained(tmp_path / "base", dataclasses.replace(config, lora=None), base)
    save_adapters(tmp_path / "adapter", config, adapters)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    expected = language_model(config).logits(params, TOKENS)
    np.testing.assert_allclose(their_logits(model), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_that_peft_wrote_compute_the_same_here(tmp_path, name):
    config = dataclasses.replace(CONFIGS[name], lora=None)
    save_pretrained(tmp_path / "base", config, drawn(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
    )
    model = peft.get_peft_model(model, settings)
    model.save_pretrained(tmp_path / "adapter")
    shape, base = load_pretrained(tmp_path / "base")
    found, adapters = load_adapters(tmp_path / "adapter", shape)
    assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (2, 5.0, 0.1)
    logits = language_model(found).logits(join_params(adapters, base), TOKENS)
    assert np.abs(logits - language_model(shape).logits(base, TOKENS)).max() > 1e-3
    np.testing.assert_allclose(their_logits(model), logits, rtol=0, atol=5e-5)
