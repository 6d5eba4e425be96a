"""The text that comes with a model: which it is, that it is told of, and that nothing else is taken for it."""

import pytest

from sae_nfm.common.options import SAMPLED, sampled_text
from sae_nfm.comparison import CompareConfig, DemoConfig
from sae_nfm.data import load_splits, own_text
from sae_nfm.training.run import train_arguments


def test_smollm2_has_documents_of_its_own_and_says_whose(capsys):
    train, held_out = load_splits(None, None, "smollm2")
    assert SAMPLED["smollm2"] in capsys.readouterr().err
    assert {"text"} == {*train.column_names, *held_out.column_names}
    assert not {*train["text"]} & {*held_out["text"]}
    assert len(train) > 3 * len(held_out) > 100
    assert own_text("smollm2", "train", seed=1)["text"] != train["text"]  # in another order
    assert sorted(own_text("smollm2", "train", seed=1)["text"]) == sorted(train["text"])


@pytest.mark.parametrize("model", ["gpt2", None])
def test_another_model_has_none(model):
    with pytest.raises(ValueError, match="--held-out"):
        own_text(model, "validation")


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [("smollm2", None, "SmolLM2"), ("sae-nfm-demo", None, "embedded"), ("smollm2", "x.txt", ""), ("gpt2", None, "")],
)
def test_what_is_said_of_a_text(model, given, told):
    assert told in sampled_text(model, given)
    assert bool(sampled_text(model, given)) is bool(told)


@pytest.mark.parametrize("config", [CompareConfig, DemoConfig])
def test_the_hook_point_is_the_models(config):
    assert config().hook == "blocks.2.hook_resid_post"
    assert config(model="gpt2").hook == "blocks.2.hook_resid_post"
    assert config(model="smollm2").hook == "blocks.9.hook_resid_post"
    assert config(model="smollm2", hook="blocks.3.hook_resid_post").hook == "blocks.3.hook_resid_post"


def test_training_on_smollm2_has_defaults_of_its_own():
    cfg = train_arguments({"model_name": "smollm2"}, argv=()).cfg
    assert (cfg.hook_name, cfg.sae.d_sae, cfg.sae.k) == ("blocks.9.hook_resid_post", 2304, 32)
    assert (cfg.context_size, cfg.exclude_special_tokens, cfg.model_from_pretrained_kwargs) == (256, True, {})
    assert (cfg.lr, cfg.train_batch_size_tokens, cfg.training_tokens) == (2e-3, 512, 100_000)
    assert train_arguments({"model_name": "smollm2", "d_sae": 64}, argv=()).cfg.sae.d_sae == 64
