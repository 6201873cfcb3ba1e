import dataclasses

import jax
import pytest

from entangle.errors import UserError
from entangle.models import PRESETS, DecoderConfig, language_model, preset

VALID = {"vocab_size": 10, "max_positions": 8, "width": 6, "layers": 1, "heads": 2}


def parameter_count(config: DecoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(language_model(config).init, jax.random.key(0))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive whole number, got 0"),
        ({"vocab_size": 3.0}, "vocab_size must be a positive whole number, got 3.0"),
        ({"hidden": -1}, "hidden must be a positive whole number, got -1"),
        ({"heads": True}, "heads must be a positive whole number, got True"),
        ({"width": 7}, "width 7 is not a multiple of heads 2"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be a positive number, got 0.0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be a positive number, got nan"),
        ({"norm_epsilon": None}, "norm_epsilon must be a positive number, got None"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        DecoderConfig(**VALID | change)


def test_hidden_width_defaults_to_four_widths():
    assert DecoderConfig(**VALID).hidden_width == 24
    assert DecoderConfig(**VALID, hidden=5).hidden_width == 5


def test_gpt2_preset_has_the_published_number_of_parameters():
    # GPT-2 small as released, tied head: 50257*768 + 1024*768 + 12*(12*768^2 + 13*768) + 2*768.
    assert parameter_count(preset("gpt2", 50257)) == 124_439_808


def test_small_preset_is_about_a_million():
    # 4096*128 + 256*128 + 4*(12*128^2 + 13*128) + 2*128
    assert parameter_count(preset("small", 4096)) == 1_350_400


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("hidden", [None, 5])
def test_parameters_are_counted_from_the_shapes(name, hidden):
    config = dataclasses.replace(preset(name, 1000), hidden=hidden)
    assert config.parameters == parameter_count(config)


def test_every_preset_takes_its_vocabulary_from_the_caller():
    assert {name: preset(name, 300).vocab_size for name in PRESETS} == dict.fromkeys(PRESETS, 300)


def test_unknown_preset_is_refused_with_the_names():
    with pytest.raises(UserError, match="unknown model preset 'huge': choose from tiny, mini, small, gpt2"):
        preset("huge", 300)
