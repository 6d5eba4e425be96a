"""`sae_nfm.evaluation.saebench`: what SAEBench reads of an SAE is there, and, where its environment is, its evaluations run.

The environment of `sae_nfm.evaluation.saebench.INSTALL` is named by SAE_NFM_SAEBENCH_PYTHON, the path of its python.
"""

import copy
import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from builders import D_SAE, HOOK, inference_sae, random_activations, random_sae, tiny_model, training_config
from sae_lens import SAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_nfm import demo
from sae_nfm.evaluation.saebench import INSTALL, SAEBenchConfig, Score, _digest, evaluate, main, require, selected_saes
from sae_nfm.evaluation.saelens_evals import EvaluateConfig
from sae_nfm.evaluation.saelens_evals import evaluate_saved as evaluate_with_saelens

PYTHON = os.environ.get("SAE_NFM_SAEBENCH_PYTHON", ".saebench/bin/python")
"""Of an environment with SAEBench, for `make test-saebench`."""
RELEASED = "sae-nfm-demo:blocks.2.hook_resid_post"


def topk(**overrides) -> SAE:
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK, context_size=16)
    return inference_sae(TopKTrainingSAEConfig(d_in=16, d_sae=D_SAE, k=4, metadata=metadata, **overrides))


@pytest.mark.parametrize("make", [lambda: inference_sae(training_config("joint_nfm")), topk])
def test_what_saebench_reads_of_an_sae(make):
    sae = make()
    before = copy.deepcopy(sae.state_dict())
    [(name, given)] = selected_saes({"mine": sae})
    assert name == "mine"
    assert given.W_enc.shape == (16, D_SAE)  # W_enc, W_dec, b_enc: core's weight metrics
    assert given.b_enc.shape == (D_SAE,)
    norms = given.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)  # the tolerance of its check_decoder_norms
    x = random_activations(24).reshape(2, 12, 16)
    acts = given.encode(x)
    assert acts.shape == (2, 12, D_SAE)  # batch, position, feature; dense, for it multiplies by a mask
    assert not acts.is_sparse
    assert acts.count_nonzero(dim=-1).max() <= 4
    # rows of norm 1 are the same function up to rounding
    torch.testing.assert_close(given.decode(acts), sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-4)
    assert (given.cfg.metadata.hook_name, given.cfg.metadata.model_name) == (HOOK, "tiny")
    given.cfg.hook_layer, given.cfg.architecture_str = 0, "..."  # it writes into the config
    assert json.loads(json.dumps(given.cfg.to_dict(), default=str))["d_sae"] == D_SAE
    assert asdict(given.cfg)["d_sae"] == D_SAE
    assert given.to(device="cpu", dtype=torch.float64).encode(x.double()).dtype == torch.float64
    assert all(torch.equal(before[key], weight) for key, weight in sae.state_dict().items())
    assert not given.training


def test_norms_that_cannot_be_folded_exactly_stay():
    sae = topk(rescale_acts_by_decoder_norm=False)
    [(_, given)] = selected_saes({"mine": sae})
    assert torch.equal(given.W_dec, sae.W_dec)


def test_a_sequential_sae_is_taken_as_its_base_is():
    sae = inference_sae(training_config("sequential_nfm"))
    [(_, given)] = selected_saes({"mine": sae})
    x = random_activations()
    assert torch.equal(given(x), sae(x))


def test_an_sae_in_training_is_refused():
    with pytest.raises(ValueError, match=r"'mine'.*\bsave_inference_model\b"):
        selected_saes({"mine": random_sae(training_config("joint_nfm"))})


def test_an_sae_that_belongs_nowhere_is_refused():
    sae = inference_sae(training_config("joint_nfm", metadata=SAEMetadata()))
    with pytest.raises(ValueError, match=r"'mine'.*\bmodel_name\b.*\bhook_name\b.*\bsae\.cfg\.metadata\b"):
        selected_saes({"mine": sae})


def test_probes_are_of_these_weights_and_settings():
    sae, config = topk(), SAEBenchConfig(saes=("mine",))
    digest = _digest(sae, config)
    assert digest == _digest(copy.deepcopy(sae), config)
    assert digest != _digest(sae, replace(config, seed=1))
    assert digest != _digest(sae, replace(config, ks=(1,)))
    with torch.no_grad():
        sae.b_dec[0] += 1
    assert digest != _digest(sae, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": "scr"}, r"\bevaluation\b.*'core', 'sparse_probing', 'mdl'.*'scr'"),
        ({"batches": 0}, r"\bbatches\b.*\b0\b"),
        ({"ks": (0,)}, r"\bks\b.*\(0,\)"),
        ({"evaluation": "mdl"}, r"\bdevice\b.*'cpu'.*\bmdl\b.*--device cuda\b"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        SAEBenchConfig(**settings)


def test_words():
    score = Score(sae="mine", evaluation="core", metrics={"kl": 0.25, "l0": 32.0}, file=Path("a.json"))
    assert score.words() == "mine: SAEBench core\n    kl          0.2500\n    l0         32.0000\n    a.json"


def test_without_saebench_it_says_how_to_get_it(capsys):
    with pytest.raises(ImportError, match=r"\bsae_bench\b.*\bsae_probes\b") as told:
        require()
    assert str(told.value).endswith(INSTALL)
    with pytest.raises(ImportError):
        evaluate({"mine": topk()}, tiny_model(), SAEBenchConfig())
    assert main([RELEASED]) == 2
    assert ".saebench/bin/pip install sae-bench==0.6.0" in capsys.readouterr().err


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [PYTHON, "-W", "ignore", "-m", "sae_nfm.evaluation.saebench", *arguments, "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.saebench
def test_core_finds_what_saelens_finds(tmp_path):
    done = run(tmp_path, RELEASED, "--evaluation", "core", "--batches", "1", "--batch_size_prompts", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "core").iterdir()
    found = json.loads(file.read_text())["eval_result_metrics"]
    release, sae_id = RELEASED.split(":")
    batches = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    ours = evaluate_with_saelens(EvaluateConfig(sae=release, sae_id=sae_id, batch_size_prompts=4, **batches)).metrics
    # the two environments have other versions of numpy and datasets; KL is a difference of rounded probabilities
    for group, name in (
        ("model_behavior_preservation", "kl_div_with_sae"),
        ("model_performance_preservation", "ce_loss_with_sae"),
        ("reconstruction_quality", "cossim"),
        ("sparsity", "l0"),
    ):
        assert found[group][name] == pytest.approx(ours[group][name], rel=1e-3), name
    assert found["sparsity"]["l0"] == 32
    assert f"kl_div_with_sae {found['model_behavior_preservation']['kl_div_with_sae']:.4f}" in " ".join(
        done.stdout.split()
    )


@pytest.mark.saebench
def test_sparse_probing_runs_offline_and_again_in_no_time(tmp_path):
    arguments = ("--probing_datasets", "119_us_state_TX", "--ks", "1", "5")
    done = run(tmp_path, RELEASED, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "sparse_probing").iterdir()
    content = json.loads(file.read_text())
    metrics = content["eval_result_metrics"]["sae"]
    assert content["eval_result_details"][0]["dataset_name"] == "119_us_state_TX"
    assert 0 < metrics["sae_top_1_test_auc"] <= 1
    assert 0.5 < content["eval_result_metrics"]["llm"]["llm_test_auc"] <= 1
    assert metrics["sae_top_2_test_auc"] is None
    probes = {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").rglob("*.json")}
    assert run(tmp_path, RELEASED, *arguments).returncode == 0
    assert probes == {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").rglob("*.json")}
    assert not list(tmp_path.glob("*.partial"))
    refused = run(tmp_path, RELEASED, "--probing_datasets", "no such")
    assert refused.returncode == 2
    assert "sae-probes has no data set no such; it has 5_hist_fig_ismale" in refused.stderr


@pytest.mark.saebench
def test_the_embedded_model_is_the_same_in_both_environments(tmp_path):
    script = (
        "from sae_nfm import demo; import torch; model = demo.load_model(); "
        "print(model(torch.arange(64)[None])[0, -1].double().sum().item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    theirs = subprocess.run(
        [str(PYTHON), "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    ours = demo.load_model()(torch.arange(64)[None])[0, -1].double().sum().item()
    assert float(theirs.stdout) == pytest.approx(ours, rel=1e-4)  # float32 sums over 64 positions and the vocabulary
