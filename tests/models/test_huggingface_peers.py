"""Both directions against ``transformers`` itself; needs the extra ``peers``."""

import jax
import numpy as np
import pytest

from entangle.models import DecoderConfig, language_model, load_pretrained, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peers

CONFIGS = {
    "plain": DecoderConfig(vocab_size=31, max_positions=16, width=12, layers=2, heads=3),
    "inner width": DecoderConfig(vocab_size=31, max_positions=16, width=8, layers=3, heads=1, hidden=20),
    "epsilon": DecoderConfig(vocab_size=17, max_positions=10, width=16, layers=1, heads=8, norm_epsilon=0.05),
}
TOKENS = np.random.default_rng(0).integers(0, 17, (3, 10)).astype(np.int32)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> DecoderConfig:
    return request.param


def their_model(config: DecoderConfig, **changes):
    """A random GPT2LMHeadModel in evaluation mode, biases and LayerNorms drawn too."""
    attributes = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_positions,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.hidden,
        layer_norm_epsilon=config.norm_epsilon,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    model = transformers.GPT2LMHeadModel(attributes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def test_imported_checkpoint_has_their_logits(tmp_path, config):
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, params = load_pretrained(tmp_path / "theirs")
    assert loaded == config
    assert np.std(their_logits(theirs)) > 0.5
    np.testing.assert_allclose(language_model(config).logits(params, TOKENS), their_logits(theirs), rtol=0, atol=1e-5)


def test_checkpoint_of_the_bare_decoder_is_imported(tmp_path, config):
    theirs = their_model(config)
    theirs.transformer.save_pretrained(tmp_path / "theirs")
    _, params = load_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(language_model(config).logits(params, TOKENS), their_logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoint_has_their_logits_in_float32(tmp_path, config, dtype):
    half = their_model(config).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "theirs")
    _, params = load_pretrained(tmp_path / "theirs")
    expected = their_logits(half.float())
    np.testing.assert_allclose(language_model(config).logits(params, TOKENS), expected, rtol=0, atol=1e-5)


def test_exported_checkpoint_has_our_logits_in_transformers(tmp_path, config):
    params = language_model(config).init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    save_pretrained(tmp_path / "ours", config, params)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(their_logits(theirs.eval()), language_model(config).logits(params, TOKENS), atol=1e-5)


def test_exported_checkpoint_trains_in_transformers_without_dropout(tmp_path, config):
    save_pretrained(tmp_path / "ours", config, language_model(config).init(jax.random.key(0)))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(their_logits(theirs.train()), their_logits(theirs.eval()))
