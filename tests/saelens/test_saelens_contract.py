"""What SAELens expects of an architecture: registration, configs, its trainer and its runners.

Single training steps are in test_training_contract.py, loading in test_strict_loading.py, splicing and evaluation in
test_splice_contract.py.
"""

import importlib
import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from builders import (
    ARCHITECTURES,
    D_SAE,
    HOOK,
    NFM_HOOKS,
    WITH_ENCODER,
    random_activations,
    random_sae,
    runner_config,
    tiny_model,
    token_dataset,
    trainer,
    training_config,
)
from fresh_process import FRESH, make, seen, the_import_alone, trained_by_saelens_command_line
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAEConfig,
    SAETrainingRunner,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    registry,
)
from sae_lens.util import temporary_seed

import sae_nfm
from sae_nfm._registration import register
from sae_nfm.models.load import load_model
from sae_nfm.training.recorder import record_training
from sae_nfm.training.results import read_training_record

for_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def fresh_process(once):
    """What a process sees that imports sae_lens, makes warnings errors, and imports sae_nfm three times."""
    return seen(once, the_import_alone)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(request, model, tmp_path_factory):
    """Sixty steps of SAELens's runner with a normalisation that is folded when training ends."""
    folder = tmp_path_factory.mktemp("run")
    cfg = training_config(request.param, normalize_activations="expected_average_only_in")
    with temporary_seed(0):
        runner = LanguageModelSAETrainingRunner(
            runner_config(cfg, folder, steps=60),
            override_model=model,
            override_dataset=token_dataset(64),
        )
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with record_training(runner, folder / "training.jsonl", every=7) as record:
            sae = runner.run()
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    lines = read_training_record(folder / "training.jsonl")
    return SimpleNamespace(
        runner=runner, sae=sae, folder=folder, lines=lines, record=record, handlers=(handlers, after)
    )


def raw_activations(model, hook_name=HOOK, rows=16):
    _, cache = model.run_with_cache(torch.tensor(token_dataset(rows, seed=5)["tokens"]))
    return cache[hook_name].flatten(0, 1)


def fvu(x, x_hat):
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


@for_every_architecture
def test_registered_for_training_and_inference(architecture):
    training_class, training_cfg = registry.get_sae_training_class(architecture)
    inference_class, inference_cfg = registry.get_sae_class(architecture)
    assert issubclass(training_class, TrainingSAE)
    assert issubclass(inference_class, SAE)
    assert training_cfg.architecture() == inference_cfg.architecture() == architecture


def test_importing_again_leaves_one_working_registration(fresh_process):
    assert fresh_process["current"]
    assert fresh_process["type"]


def test_import_loads_nothing_that_sae_lens_has_not_loaded(fresh_process):
    """So it costs milliseconds: our own modules and what loads them when asked for, nothing heavy such as plotly's
    figures or the embedded model."""
    assert fresh_process["added"] == ["lazy_loader", "pydantic", "sae_nfm"]


def test_one_process_trains_another_loads_and_splices(once):
    """Trained by SAELens's own command line, spliced in here: only `import sae_nfm` is asked for."""
    assert "sae_weights.safetensors" in seen(once, trained_by_saelens_command_line)
    folder = once(FRESH, make)
    sae = SAE.load_from_disk(folder / "trained")
    assert (type(sae), sae.cfg.metadata.hook_name) == (sae_nfm.JointNFMSAE, "transformer.h.0")
    model = load_model(folder / "model")
    sae.cfg.metadata.hook_name = HOOK
    tokens = torch.tensor(token_dataset(2)["tokens"])
    with torch.no_grad(), model.saes(sae):
        _, cache = model.run_with_cache(tokens)
    assert cache[f"{HOOK}.hook_sae_output"].shape == (2, 16, 16)
    assert cache[f"{HOOK}.hook_nfm_interaction"].abs().sum() > 0


@for_every_architecture
def test_reload_in_this_process(architecture):
    before = registry.get_sae_class(architecture), registry.get_sae_training_class(architecture)
    importlib.reload(sae_nfm)
    assert (registry.get_sae_class(architecture), registry.get_sae_training_class(architecture)) == before


def test_name_taken_by_another_package(monkeypatch):
    other = registry.get_sae_class("topk")
    monkeypatch.setitem(registry.SAE_CLASS_REGISTRY, "joint_nfm", other)
    with pytest.raises(ValueError, match=r"'joint_nfm'.*sae_lens\.saes\.topk_sae\b"):
        register()


@pytest.mark.parametrize("version", ["6.54.11", "6.55.0", "7.0.0"])
def test_another_version_of_saelens_is_named_in_a_warning(version, monkeypatch):
    monkeypatch.setattr("sae_lens.__version__", version)
    with pytest.warns(UserWarning, match=rf"sae-lens.*\b6\.54\.12\b.*\b6\.55\b.*{re.escape(version)}\b"):
        register()


@for_every_architecture
def test_configs_survive_a_round_trip(architecture, tmp_path):
    cfg = training_config(architecture, nfm_dropout=0.25, head="mlp", use_linear_path=False)
    assert TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    inference = SAEConfig.from_dict(cfg.get_inference_sae_cfg_dict())
    assert type(inference) is registry.get_sae_class(architecture)[1]
    assert inference.to_dict() == cfg.get_inference_sae_cfg_dict()
    runner_cfg = runner_config(cfg, tmp_path, steps=1)
    assert LanguageModelSAERunnerConfig.from_dict(runner_cfg.to_dict()) == runner_cfg


def test_runner_trains(run):
    first, last = run.lines[0], run.lines[-1]
    assert last["losses/overall_loss"] < 0.5 * first["losses/overall_loss"]
    assert {path.name for path in run.folder.iterdir()} >= {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
    }
    saved = LanguageModelSAERunnerConfig.from_dict(json.loads((run.folder / "runner_cfg.json").read_text()))
    assert type(saved.sae) is type(run.sae.cfg)
    assert saved.training_tokens == 60 * 64


def test_saved_sae_is_the_returned_one_on_raw_activations(run, model):
    assert run.sae.cfg.normalize_activations == "none"  # folded
    loaded = SAE.load_from_disk(run.folder)
    assert type(loaded) is registry.get_sae_class(run.sae.cfg.architecture())[0]
    x = raw_activations(model)
    assert x.norm(dim=-1).mean() < 3  # the fold mattered: training scaled this to sqrt(16) = 4
    # Saving folds decoder norms into the encoder: the same function in another order of float32 operations.
    torch.testing.assert_close(loaded(x), run.sae(x), atol=1e-5, rtol=1e-5)
    sequential = run.sae.cfg.architecture() not in WITH_ENCODER
    assert fvu(x, loaded(x)) < (fvu(x, loaded.base(x)) if sequential else 0.5)


@for_every_architecture
def test_deprecated_runner_trains(architecture, model, tmp_path):
    with pytest.warns(DeprecationWarning, match="Use LanguageModelSAETrainingRunner instead"):
        runner = SAETrainingRunner(
            runner_config(training_config(architecture), tmp_path, steps=2),
            override_model=model,
            override_dataset=token_dataset(64),
        )
    with temporary_seed(0):
        sae = runner.run()
    x = raw_activations(model)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x), atol=1e-5, rtol=1e-5)


@for_every_architecture
def test_multi_runner_trains_beside_topk_on_one_stream(architecture, model, tmp_path):
    baseline = TopKTrainingSAEConfig(d_in=16, d_sae=D_SAE, k=4, normalize_activations="layer_norm")
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "ours": training_config(architecture, normalize_activations="expected_average_only_in"),
            "topk": baseline,
        },
        hook_names=HOOK,
        context_size=16,
        training_tokens=64 * 20,
        train_batch_size_tokens=64,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=4,
        lr=1e-2,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path),
    )
    with temporary_seed(0):
        runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=token_dataset(64))
        with record_training(runner, tmp_path / "training.jsonl", every=8) as record:
            saes = runner.run()
    assert "_run_with_interruption_handling" not in vars(runner)
    x = raw_activations(model)
    for name, sae in saes.items():
        torch.testing.assert_close(SAE.load_from_disk(tmp_path / name)(x), sae(x), atol=1e-5, rtol=1e-5)
    lines = read_training_record(tmp_path / "training.jsonl")
    assert [(line["sae"], line["step"]) for line in lines] == [
        (name, step) for step in (0, 8, 16, 19) for name in ("ours", "topk")
    ]
    for name in saes:
        losses = [line["losses/overall_loss"] for line in lines if line["sae"] == name]
        assert losses[-1] < losses[0]
    assert record.tokens == {"ours": 64 * 20, "topk": 64 * 20}


def test_record_has_what_saelens_would_log(run):
    sae = random_sae(training_config(run.sae.cfg.architecture()))
    sae.keep_paths = True
    saelens = trainer(sae)
    logged = saelens.build_train_step_log_dict(saelens.step(random_activations()), n_training_samples=24)
    ours = {"metrics/mse", "details/dead_feature_window"}
    assert set(run.lines[0]) - {"sae", "step", "tokens", "seconds"} == set(logged) | ours
    assert {"losses/mse_loss", "metrics/explained_variance", "metrics/l0", "metrics/fvu_direct"} < set(logged)
    assert [line["step"] for line in run.lines] == [*range(0, 60, 7), 59]  # the last step always
    assert run.lines[-1]["tokens"] == run.record.tokens["sae"] == 60 * 64
    for line in run.lines:  # SAELens's explained variance is 1 - our fvu_all
        assert line["metrics/explained_variance"] == pytest.approx(1 - line["metrics/fvu_all"], abs=1e-5)


def test_record_leaves_runner_and_signal_handlers_as_they_were(run, tmp_path):
    assert "run_trainer_with_interruption_handling" not in vars(run.runner)
    before, after = run.handlers
    assert after == before
    assert not (run.folder / "training.jsonl.partial").exists()
    path = tmp_path / "broken.jsonl"
    with pytest.raises(RuntimeError, match="stop"), record_training(run.runner, path):
        raise RuntimeError("stop")
    assert "run_trainer_with_interruption_handling" not in vars(run.runner)
    assert (path.exists(), path.with_name("broken.jsonl.partial").exists()) == (False, True)


@for_every_architecture
def test_hook_points_are_direct_attributes(architecture):
    sae = random_sae(training_config(architecture))
    assert set(NFM_HOOKS) < set(sae.hook_dict)
    assert all("." not in name for name in sae.hook_dict)
    bare = random_sae(training_config(architecture, head="none", use_linear_path=False, use_square_path=False))
    assert not set(NFM_HOOKS) & set(bare.hook_dict)
