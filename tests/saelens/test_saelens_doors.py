"""Doors of SAELens's runner that a contract test per architecture goes through: compiling, fine-tuning, metadata, logging."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from builders import (
    ARCHITECTURES,
    CONTEXT,
    D_MODEL,
    D_SAE,
    HOOK,
    WITH_ENCODER,
    random_activations,
    random_sae,
    runner_config,
    tiny_model,
    token_dataset,
    training_config,
)
from fresh_process import FRESH, as_the_note_says, make, seen, without_the_import
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.util import temporary_seed
from safetensors.torch import load_file

for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def train(cfg, **overrides):
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(
            copy.deepcopy(cfg), override_dataset=token_dataset(80), override_model=tiny_model(), **overrides
        )
        return runner.run()


COMPILED_SCRIPT = """
import sys
from pathlib import Path
from test_saelens_doors import runner_config, train, training_config
for compiled in (False, True):
    cfg = training_config(sys.argv[1], normalize_activations="expected_average_only_in")
    train(runner_config(cfg, Path(sys.argv[2]) / str(compiled), steps=10, compile_sae=compiled))
"""


@pytest.mark.slow  # a minute of C++ compiler
@for_every_architecture
def test_compiled_training_follows_the_eager_one(architecture, tmp_path):
    # in a process of its own: the shape checks of the test run are no code that can be compiled
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_SCRIPT, architecture, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    eager, compiled = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("False", "True"))
    assert eager.keys() == compiled.keys()
    for name, weight in eager.items():
        # ten Adam steps of 1e-2 on gradients that differ by float32 rounding; a weight moves by up to 0.1
        torch.testing.assert_close(compiled[name], weight, atol=2e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@for_every_architecture
@pytest.mark.parametrize("inference", [True, False])
def test_fine_tuning_begins_where_the_saved_sae_is(architecture, inference, tmp_path):
    saved = random_sae(training_config(architecture))
    (saved.save_inference_model if inference else saved.save_model)(tmp_path / "saved")
    cfg = runner_config(
        training_config(architecture), tmp_path / "out", steps=3, from_pretrained_path=str(tmp_path / "saved")
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset(80), override_model=tiny_model())
    assert isinstance(runner.sae, TrainingSAE)
    x = random_activations()
    # saving for inference folds decoder norms: another order of float32 operations on outputs up to 14
    torch.testing.assert_close(runner.sae(x), saved(x), atol=3e-5, rtol=0)
    with temporary_seed(0):
        trained = runner.run()
    assert (trained(x) - saved(x)).norm() > 1e-2 * saved(x).norm()


@for_every_architecture
def test_metadata_says_all_that_a_topk_says_and_what_loads_it(architecture, tmp_path):
    configs = {"ours": training_config(architecture), "topk": TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4)}
    saved = {}
    for name, sae_cfg in configs.items():
        cfg = runner_config(sae_cfg, tmp_path / name, steps=3, hook_name=HOOK, dataset_path="some/data")
        train(cfg)
        saved[name] = json.loads((tmp_path / name / "cfg.json").read_text())
    metadata = {name: cfg["metadata"] for name, cfg in saved.items()}
    assert set(metadata["ours"]) - set(metadata["topk"]) == {"requires"}
    assert set(metadata["topk"]) <= set(metadata["ours"])
    assert "pip install sae-nfm" in metadata["ours"]["requires"]
    assert "import sae_nfm" in metadata["ours"]["requires"]
    expected = {"model_name": "tiny", "hook_name": HOOK, "context_size": CONTEXT, "dataset_path": "some/data"}
    assert expected.items() <= metadata["ours"].items()
    assert metadata["ours"]["l0"] == pytest.approx(4, rel=1e-6)  # k for each token, as a float32 sum of rates
    assert metadata["ours"]["training_architecture_details"]["nfm_dropout"] == 0.0
    assert "neuronpedia_id" not in metadata["ours"]  # SAELens's to set
    assert saved["ours"]["architecture"] == architecture
    assert SAE.load_from_disk(tmp_path / "ours").get_name() == f"sae_tiny_{HOOK}_{D_SAE}"


@for_every_architecture
def test_sparsity_file_has_the_firing_rates(architecture, tmp_path):
    cfg = runner_config(training_config(architecture), tmp_path, steps=5)
    train(cfg)
    rates = 10 ** load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert rates.shape == (D_SAE,)
    assert rates.sum().item() == pytest.approx(4, rel=1e-4)  # k, up to the 1e-10 under SAELens's logarithm


@for_every_architecture
def test_histograms_are_the_row_norms(architecture):
    sae = random_sae(training_config(architecture))
    logged = sae.log_histograms()
    assert set(logged) == {f"weights/{name}_norms" for name in ("W_dec", "W_lin", "V", "U")}
    for key, values in logged.items():
        weight = getattr(sae, key.removeprefix("weights/").removesuffix("_norms")).detach().numpy()
        np.testing.assert_allclose(values, np.sqrt((weight**2).sum(axis=1)), rtol=1e-5)
    bare = random_sae(training_config(architecture, head="none", use_linear_path=False, use_square_path=False))
    assert set(bare.log_histograms()) == {"weights/W_dec_norms"}


@for_every_architecture
@pytest.mark.parametrize("norm", [1.0, 0.1, 300.0])
def test_wandb_draws_norms_that_differ_by_rounding_alone(architecture, norm):
    """Those of unit-norm decoders: numpy finds no room for 64 bins between 0.99999994 and 1.0000001."""
    sae = random_sae(training_config(architecture))
    with torch.no_grad():
        sae.W_dec.mul_(norm / sae.W_dec.norm(dim=-1, keepdim=True))
    assert sae.W_dec.norm(dim=-1).unique().numel() > 1
    drawn = {key: wandb.Histogram(values) for key, values in sae.log_histograms().items()}
    edges = drawn["weights/W_dec_norms"].bins
    assert edges[0] < norm < edges[-1]
    assert len(drawn) == 4


@for_every_architecture
def test_wandb_gets_what_it_gets_of_a_topk_and_the_paths(architecture, tmp_path, monkeypatch):
    """wandb itself is replaced by a list: it is not ours, and it would go to the network."""
    configs = {"ours": training_config(architecture), "topk": TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4)}
    keys = {}
    for name, sae_cfg in configs.items():
        logged = []
        for function in ("init", "finish", "log_artifact"):
            monkeypatch.setattr(wandb, function, lambda *args, **kwargs: None)
        monkeypatch.setattr(wandb, "log", lambda values, step, to=logged: to.append(values))
        logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=2)
        train(
            runner_config(
                sae_cfg,
                tmp_path,
                steps=4,
                hook_name=HOOK,
                logger=logger,
                n_eval_batches=1,
                feature_sampling_window=2,
                output_path=None,
            )
        )
        keys[name] = {key for values in logged for key in values}
    if architecture not in WITH_ENCODER:
        keys["topk"].remove("losses/auxiliary_reconstruction_loss")  # of an encoder in training
    assert keys["topk"] <= keys["ours"]
    assert {key.split("/")[0] for key in keys["ours"] - keys["topk"]} == {"metrics", "weights"}
    assert {"metrics/fvu_direct", "weights/V_norms"} <= keys["ours"] - keys["topk"]


@for_every_architecture
def test_a_folder_met_without_the_import_says_what_to_do(architecture, once):
    without = seen(once, without_the_import)
    assert without["imported"] == []
    # SAELens's own words, before any of ours can be heard
    assert without[architecture].splitlines()[-1] == f"KeyError: '{architecture}'"
    folder = once(FRESH, make) / architecture
    assert f"KeyError: '{architecture}'" in (folder / "README.md").read_text()
    followed, sae = seen(once, as_the_note_says)[architecture], SAE.load_from_disk(folder)
    assert followed["type"] == type(sae).__name__
    x = random_activations()
    # perhaps with another number of threads: sums of up to 32 products of float32
    torch.testing.assert_close(torch.tensor(followed["acts"]), sae.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(followed["out"]), sae(x), atol=1e-4, rtol=1e-5)


@for_every_architecture
def test_a_readme_that_is_there_stays(architecture, tmp_path):
    (tmp_path / "README.md").write_text("a model card")
    random_sae(training_config(architecture)).save_model(tmp_path)
    assert (tmp_path / "README.md").read_text() == "a model card"
