# SPDX-License-Identifier: Apache-2.0
"""What scripts written for transformers do with models and outputs, side by side with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, bool_mask, clip, mostly_slow, to_torch, torch_model
from tiny import CASES, config_of

import vivit_jax

SOME = ("vivit base", "mae cls", "mae pretraining")


@pytest.fixture(scope="module", params=mostly_slow(SOME, "mae pretraining"))
def both(request, tmp_path_factory):
    """(transformers' model, ours, how each is called): the same weights, clip, mask and labels."""
    import torch

    case = request.param
    directory = tmp_path_factory.mktemp("drop_in")
    reference = torch_model(case)
    reference.save_pretrained(directory)
    model, params = vivit_jax.from_pretrained(directory)
    config = config_of(case)
    x, theirs_in, ours_in = clip(config), {}, {}
    if "pretraining" in case:
        mask = bool_mask(config)
        theirs_in["bool_masked_pos"] = torch.from_numpy(mask)
        ours_in["mask"] = vivit_jax.Mask.from_bool(mask)
    elif "cls" in case:
        theirs_in["labels"] = torch.tensor([1, 3])
        ours_in["labels"] = np.array([1, 3])

    def theirs(**flags):
        with torch.no_grad():
            return reference(to_torch(x), **theirs_in, **flags)

    def ours(config=None, **flags):
        used = model if config is None else model.clone(config=config)
        apply = jax.jit(lambda params: used.apply({"params": params}, x, **ours_in, **flags))
        return apply(params)

    return reference, model, theirs, ours


def assert_same(ours, theirs, what="hidden_states"):
    """Arrays, None and tuples of them, or one array for a tuple of them."""
    if theirs is None:
        assert ours is None
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, what)
    else:
        assert_close(ours, theirs.numpy(), what)


def test_outputs_are_read_as_transformers_are(both):
    _, _, theirs, ours = both
    flags = dict(output_hidden_states=True, output_attentions=True)
    theirs, ours = theirs(**flags), ours(**flags)
    assert list(ours.keys()) == list(theirs.keys()) == list(ours) and len(ours) == len(theirs)
    for key, value in theirs.items():
        assert key in ours and ours[key] is getattr(ours, key) is dict(**ours)[key]
        assert_same(ours[key], value)
    assert_same(ours.to_tuple(), theirs.to_tuple())
    for index in (0, -1, slice(2), slice(1, None)):
        assert_same(ours[index], theirs[index])
    with pytest.raises(KeyError):
        ours["nothing"]
    with pytest.raises(IndexError):
        ours[len(ours)]
    assert ours.get("nothing") is None


@pytest.mark.parametrize("flags", [{}, {"output_hidden_states": True}], ids=str)
def test_return_dict_false_is_transformers_tuple(both, flags):
    _, _, theirs, ours = both
    ours = ours(return_dict=False, **flags)
    assert isinstance(ours, tuple)
    assert_same(ours, theirs(return_dict=False, **flags))


LATER = [pytest.param(c, marks=pytest.mark.slow) for c in ((-1,), 1, (), False, (0, 0, -4))]


@pytest.mark.parametrize("chosen", [(0, -1, 7), -2, 0, *LATER])
def test_hidden_states_by_index(both, chosen):
    _, _, theirs, ours = both
    ours = ours(output_hidden_states=chosen).hidden_states
    as_given = list(chosen) if isinstance(chosen, tuple) else chosen
    theirs = theirs(output_hidden_states=as_given)
    assert_same(ours, theirs.hidden_states if "hidden_states" in theirs else None)
    if chosen not in ((), 0, False):
        assert isinstance(ours, tuple)


def test_what_is_no_index_is_an_error(both):
    with pytest.raises(vivit_jax.UserError, match=r"must be true, false or indices .* 'all'"):
        both[3](output_hidden_states="all")
    with pytest.raises(vivit_jax.UserError, match=r"indices of hidden states, got \[1.0\]"):
        both[3](output_hidden_states=[1.0])


def test_the_configs_flags_are_the_default(both, tmp_path):
    reference, model, theirs, ours = both
    reference.config.output_hidden_states = True
    reference.config.output_attentions = True
    try:
        theirs = theirs()
        reference.save_pretrained(tmp_path)
    finally:
        reference.config.output_hidden_states = False
        reference.config.output_attentions = False
    values = json.loads((tmp_path / "config.json").read_text())
    # transformers reads the second one and does not write it.
    (tmp_path / "config.json").write_text(json.dumps(values | {"output_attentions": True}))
    opened, params = vivit_jax.from_pretrained(tmp_path)
    assert opened.config.output_hidden_states and opened.config.output_attentions
    assert_same(ours(opened.config).to_tuple(), theirs.to_tuple())
    quiet = ours(opened.config, output_hidden_states=False, output_attentions=False)
    assert quiet.hidden_states is None and quiet.attentions is None
    vivit_jax.save_pretrained(tmp_path / "again", opened, params)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["output_hidden_states"] is again["output_attentions"] is True


def test_attention_mask_may_be_none_and_nothing_else(both):
    _, model, _, ours = both
    assert ours(attention_mask=None).to_tuple()
    with pytest.raises(vivit_jax.UserError, match="attention_mask must be None, got ndarray"):
        ours(attention_mask=np.ones((2, 19), np.int64))


def test_decoder_states_are_beside_what_transformers_returns():
    config = config_of("mae pretraining")
    model, mask = CASES["mae pretraining"][0](config), vivit_jax.Mask.from_bool(bool_mask(config))
    shapes = jax.eval_shape(
        lambda key: model.init_with_output(key, clip(config), mask, output_hidden_states=True),
        jax.random.key(0),
    )[0]
    assert shapes.decoder_hidden_states.shape == (3, 2, config.num_tokens, 24)
    assert "decoder_hidden_states" not in shapes and len(shapes.to_tuple()) == 3
    assert jnp.issubdtype(shapes[0].dtype, jnp.floating)
