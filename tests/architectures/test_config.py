"""Configurations: what they refuse and in which words, parameter counts, the paper's preset."""

import pytest
from sae_lens import SAE, SAEConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args

from sae_nfm import JointNFMSAE, JointNFMSAEConfig, JointNFMTrainingSAEConfig
from sae_nfm.architectures.joint_config import parameter_count

CONFIGS = (JointNFMSAEConfig, JointNFMTrainingSAEConfig)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nfm_top_k": 0}, r"nfm_top_k .*\b1\b.*\bk = 4\b.*None.* 0$"),
        ({"nfm_top_k": 5}, r"nfm_top_k .*\b1\b.*\bk = 4\b.*None.* 5$"),
        ({"nfm_dim": 0}, r"nfm_dim .*\b0\b.* 0$"),
        ({"d_in": -1}, r"d_in .*-1\b"),
        ({"k": 9}, r"\bk .*d_sae = 8\b.* 9\b"),
        ({"head": "gpt"}, "head is 'gpt'.*'fm', 'mlp', 'bilinear', 'none'"),
        ({"square_scale": 0.0}, r"square_scale .* 0\.0$"),
        ({"square_scale": float("nan")}, "square_scale .* nan$"),
        ({"normalize_activations": "batch"}, "normalize_activations"),
    ],
)
def test_bad_values_are_refused_with_a_remedy(config_class, bad, message):
    with pytest.raises(ValueError, match=message):
        config_class(**({"d_in": 3, "d_sae": 8, "k": 4} | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nfm_dropout": 1.0}, r"nfm_dropout .*\[0, 1\).* 1\.0"),
        ({"nfm_weight_init_std": -0.1}, r"nfm_weight_init_std .* -0\.1"),
    ],
)
def test_bad_training_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        JointNFMTrainingSAEConfig(d_in=3, d_sae=8, k=4, **bad)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_from_dict_names_the_unknown_key(config_class):
    config = config_class(d_in=3, d_sae=8, k=4).to_dict() | {"nfm_topk": 2}
    with pytest.raises(ValueError, match=r"\bkey 'nfm_topk'"):
        config_class.from_dict(config)


def test_whatever_decode_needs_is_a_field_of_the_inference_config():
    training = JointNFMTrainingSAEConfig(
        d_in=3, d_sae=8, k=4, nfm_dim=5, nfm_top_k=2, head="mlp", use_linear_path=False, use_square_path=True,
        square_scale=2.5, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False,
    )  # fmt: skip
    inference = SAEConfig.from_dict(training.get_inference_sae_cfg_dict())
    assert isinstance(inference, JointNFMSAEConfig)
    for name in (
        "nfm_dim", "nfm_top_k", "head", "use_linear_path", "use_square_path", "square_scale", "k",
        "rescale_acts_by_decoder_norm", "apply_b_dec_to_input",
    ):  # fmt: skip
        assert getattr(inference, name) == getattr(training, name), name


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("head", ["fm", "mlp", "bilinear", "none"])
def test_parameter_count_is_the_number_of_trainable_numbers(linear, square, head):
    cfg = JointNFMSAEConfig(d_in=3, d_sae=8, k=4, nfm_dim=5, use_linear_path=linear, use_square_path=square, head=head)
    assert parameter_count(cfg) == sum(p.numel() for p in JointNFMSAE(cfg).parameters())


def test_the_paper_preset_has_the_published_parameter_count():
    cfg = JointNFMTrainingSAEConfig.paper(d_in=3200)
    assert (cfg.d_sae, cfg.k, cfg.nfm_top_k, cfg.nfm_dim, cfg.nfm_dropout) == (50_000, 1024, 512, 300, 0.15)
    assert round(parameter_count(cfg) / 1e6) == 496  # arXiv 2507.00269: 496M in all
    small = JointNFMTrainingSAEConfig.paper(d_in=8, d_sae=16, k=4, nfm_top_k=2)
    assert (small.d_sae, small.nfm_dim) == (16, 300)


def test_saelens_command_line_offers_the_architecture_and_its_fields():
    cfg = _parse_cfg_args(
        ["--architecture", "joint_nfm", "--d_in", "16", "--d_sae", "64", "--k", "8", "--nfm_top_k", "4",
         "--head", "mlp", "--use_square_path", "true", "--nfm_dropout", "0.25"]
    )  # fmt: skip
    assert isinstance(cfg.sae, JointNFMTrainingSAEConfig)
    assert (cfg.sae.d_sae, cfg.sae.nfm_top_k, cfg.sae.head, cfg.sae.use_square_path, cfg.sae.nfm_dropout) == (
        64, 4, "mlp", True, 0.25,
    )  # fmt: skip


def test_the_command_line_help_describes_every_field(capsys):
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", "joint_nfm", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Interaction dimensions m: the width of the hidden code h and of V" in text
    assert "Dropout probability on the pooled vector z" in text


def test_sae_from_dict_builds_the_registered_class():
    sae = SAE.from_dict(JointNFMSAEConfig(d_in=3, d_sae=8, k=4).to_dict())
    assert isinstance(sae, JointNFMSAE)
