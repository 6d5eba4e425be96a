"""`sae-nfm evaluate`: SAELens's own figures, of any SAE, with what they were measured on."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from builders import D_MODEL, HOOK, HOOK_Z, inference_sae, token_dataset, training_config
from sae_lens import SAE, ActivationsStore, GatedSAEConfig, StandardSAEConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler
from tiny_models import write_checkpoint

import sae_nfm
from sae_nfm.data.datasets import local_dataset
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.evaluation.results import Evaluation
from sae_nfm.evaluation.saelens_evals import EvaluateConfig, evaluate_saved, notes_on
from sae_nfm.loading.saelens import load_sae, quiet_saelens
from sae_nfm.models.load import load_model
from sae_nfm_cli import main

ROWS = 12
FEW = ["--batch-size-prompts", "2", "--n-eval-reconstruction-batches", "3", "--n-eval-sparsity-variance-batches", "3"]

ONE = ["--batch-size-prompts", "2", "--n-eval-reconstruction-batches", "1", "--n-eval-sparsity-variance-batches", "1"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with a tiny language model `model` and tokens `tokens.parquet`, BOS in the middle of rows too."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "model", "gpt2")
    rows = torch.tensor(token_dataset(ROWS)["tokens"])
    rows[:, 7] = 0
    token_dataset(ROWS).from_dict({"tokens": rows.tolist()}).to_parquet(folder / "tokens.parquet")
    return folder


def saved(shared: Path, folder: Path, sae: SAE, **metadata) -> str:
    """Save an SAE as if it had been trained on the shared model and tokens."""
    settings = {
        "model_name": str(shared / "model"),
        "hook_name": HOOK,
        "dataset_path": str(shared / "tokens.parquet"),
        "context_size": 16,
        "prepend_bos": True,
        "exclude_special_tokens": True,
    }
    for name, value in (settings | metadata).items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return str(folder)


def other_sae(config_class, **fields) -> SAE:
    """An SAE of SAELens, random."""
    sae = SAE.from_dict(config_class(d_in=D_MODEL, d_sae=24, **fields).to_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def figures(printed: str) -> dict[str, float]:
    """Name and value of every line of the table."""
    lines = re.findall(r"^    (\w+) +(-?[\d.,]+)$", printed, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in lines}


@pytest.mark.parametrize("kind", ["joint_nfm", "standard", "gated"])
def test_the_figures_are_those_of_run_evals(kind, shared, tmp_path, capsys):
    sae = {
        "joint_nfm": lambda: inference_sae(training_config("joint_nfm")),
        "standard": lambda: other_sae(StandardSAEConfig),
        "gated": lambda: other_sae(GatedSAEConfig),
    }[kind]()
    folder, output = saved(shared, tmp_path / "sae", sae), tmp_path / "figures.json"
    everything = ["--compute-featurewise-density-statistics", "--compute-featurewise-weight-based-metrics"]
    assert main(["evaluate", folder, *FEW, *everything, "--save", str(output)]) == 0
    with quiet_saelens():
        model, loaded = load_model(shared / "model"), SAE.load_from_disk(folder)
        metrics, features = run_evals(
            sae=loaded,
            activation_store=ActivationsStore.from_sae(model, loaded, local_dataset(str(shared / "tokens.parquet"))),
            model=model,
            activation_scaler=ActivationScaler(),
            eval_config=get_eval_everything_config(2, 3, 3),
            exclude_special_tokens=True,
        )
    written = json.loads(output.read_text())
    assert written["metrics"].keys() == metrics.keys()
    for group, values in metrics.items():  # the same function on the same data, but for the alignment of its sums
        assert written["metrics"][group] == pytest.approx(values, rel=1e-6), group
    for name, values in features.items():
        ours = [float("nan") if value is None else value for value in written["feature_metrics"][name]]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(values), rtol=1e-6, atol=1e-7, equal_nan=True)
    printed = capsys.readouterr().out
    flat = {name: value for group in metrics.values() for name, value in group.items()}
    # four decimals are printed
    assert figures(printed) == pytest.approx(flat, abs=6e-5)
    for group in metrics:
        assert f"\n\n{group.replace('_', ' ')}\n" in printed


def test_a_zero_sae_is_the_ablation_but_for_special_tokens(shared, tmp_path):
    """SAELens zeroes the hook point everywhere in the ablation; the SAE's arm keeps excluded tokens as they are."""
    sae = other_sae(StandardSAEConfig)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    folder = saved(shared, tmp_path / "sae", sae)
    few = {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 1}
    kept = evaluate_saved(EvaluateConfig(sae=folder, **few)).metrics["model_behavior_preservation"]
    assert kept["kl_div_with_sae"] < 0.9 * kept["kl_div_with_ablation"]
    every = evaluate_saved(EvaluateConfig(sae=folder, exclude_special_tokens=False, **few))
    assert every.metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(0, abs=1e-6)  # float32
    saved(shared, tmp_path / "sae", sae, exclude_special_tokens=False)
    silent = evaluate_saved(EvaluateConfig(sae=folder, **few))
    expected = every.metrics["model_behavior_preservation"]
    assert silent.metrics["model_behavior_preservation"] == pytest.approx(expected, abs=1e-6)


def test_what_it_was_measured_on_is_written_down(shared, tmp_path):
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")))
    data = str(shared / "tokens.parquet")
    argv = [
        "evaluate",
        folder,
        *FEW,
        "--held-out",
        data,
        "--no-compute-kl",
        "--save",
        str(tmp_path / "a" / "b.json"),
    ]
    assert main(argv) == 0
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert list(tmp_path.rglob("*.partial")) == []
    assert "model_behavior_preservation" not in written["metrics"]
    assert written["feature_metrics"] == {}  # SAELens gives 0 / 0 for each feature where they are not asked for
    assert written["data"].startswith(f"{data}: training tokens (the SAE's metadata name")
    assert (written["passes"], written["architecture"]) == (1, "joint_nfm")
    rows = torch.tensor(local_dataset(data)["tokens"])  # all 12, in order: 3 + 3 batches of 2
    provenance = written["provenance"]
    assert provenance["tokens_sha256"] == hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert provenance["command"] == " ".join(["sae-nfm", *argv])
    assert provenance["config"]["compute_kl"] is False
    assert provenance["sae_config"]["nfm_top_k"] == 3
    assert set(provenance["versions"]) >= {"sae-nfm", "sae-lens", "transformer-lens", "torch"}


def test_rows_that_count_twice_and_training_data_are_said(shared, tmp_path, capsys):
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")))
    assert main(["evaluate", folder, *FEW, "--n-eval-reconstruction-batches", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"{folder}: joint_nfm at {HOOK} of {shared / 'model'}\n" in printed
    assert (
        f"Data: {shared / 'tokens.parquet'}, on which the SAE was trained: not held out (give --held-out)\n" in printed
    )
    assert "The data were read 2 times: there are fewer rows than asked for.\n" in printed


def test_the_embedded_model_and_its_held_out_tokens(shared, tmp_path, capsys):
    sae = inference_sae(training_config("joint_nfm", d_in=256))
    folder = saved(shared, tmp_path / "sae", sae, model_name="sae-nfm-demo", hook_name="blocks.2.hook_resid_post")
    assert main(["evaluate", folder, *ONE]) == 0
    printed = capsys.readouterr().out
    assert "Data: held-out tokens of the embedded model\n" in printed
    # the embedded model's own tokens, as demo/data/README.md has them: 4.535 nats; 62 of them say it to half a nat
    assert figures(printed)["ce_loss_without_sae"] == pytest.approx(4.535, abs=0.5)


def test_one_sae_in_every_class_of_model(shared, tmp_path, capsys):
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")))
    assert main(["evaluate", folder, *FEW]) == 0
    usual = figures(capsys.readouterr().out)
    places = {"HookedTransformer": HOOK, "TransformerBridge": HOOK, "AutoModelForCausalLM": "transformer.h.0"}
    for model_class_name, hook_name in places.items():
        saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")), hook_name=hook_name)
        assert main(["evaluate", folder, *FEW, "--model-class-name", model_class_name]) == 0
        # three implementations of one model: float32 rounding, four decimals printed
        assert figures(capsys.readouterr().out) == pytest.approx(usual, abs=2e-3, rel=1e-3), model_class_name


def test_heads(shared, tmp_path, capsys):
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm", HOOK_Z)), hook_name=HOOK_Z)
    assert main(["evaluate", folder, *FEW]) == 0
    assert figures(capsys.readouterr().out)["l0"] > 0
    assert main(["evaluate", folder, *FEW, "--model-class-name", "TransformerBridge"]) == 2
    assert "'blocks.0.attn.o.hook_in'" in capsys.readouterr().err


def test_no_number_is_null(tmp_path):
    result = Evaluation(
        sae="s", architecture="a", model_name="m", hook_name="h", data="d", context_size=2, passes=1,
        metrics={"sparsity": {"l0": 2.0, "l1": float("inf")}, "token_stats": {"total": 12345}},
        feature_metrics={"feature_density": [0.5, float("nan")]}, provenance={},
    )  # fmt: skip
    result.save(tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["metrics"]["sparsity"] == {"l0": 2.0, "l1": None}
    assert written["feature_metrics"]["feature_density"] == [0.5, None]
    assert result.words() == (
        "s: a at h of m\nData: d\n\nsparsity\n    l0             2.0000\n    l1                inf\n\n"
        "token stats\n    total          12,345"
    )


def test_a_mistake_is_one_line(shared, tmp_path, capsys):
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")))
    output = tmp_path / "out.json"
    assert main(["evaluate", folder, *FEW, "--context-size", "33", "--save", str(output)]) == 2
    told = capsys.readouterr().err.rpartition("sae-nfm: ")[2]
    assert re.search(r"\bcontext_size is 33\b.*\b32\b", told)
    assert told.count("\n") == 1
    assert not output.exists()


def test_what_cannot_be_measured_is_refused(shared, tmp_path):
    (tmp_path / "short.txt").write_text("t1 t2")
    folder = saved(shared, tmp_path / "sae", inference_sae(training_config("joint_nfm")))
    for given, message in (
        ({"model": "sae-nfm-demo"}, rf"\bd_in {D_MODEL}\b.*'{HOOK}' of sae-nfm-demo\b.*\b256\b"),
        ({"held_out": str(tmp_path / "short.txt")}, r"\bheld-out text\b.*\b16 tokens\b"),
        ({"device": "abacus"}, r"\bdevice 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_saved(EvaluateConfig(sae=folder, save=str(tmp_path / "out.json"), **given))
        assert not (tmp_path / "out.json").exists()


def test_configurations_that_cannot_work():
    for name in ("batch_size_prompts", "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches"):
        with pytest.raises(ValueError, match=rf"\b{name}\b.*\b0\b"):
            EvaluateConfig(sae="any", **{name: 0})
    names = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    with pytest.raises(ValueError, match="compute_"):
        EvaluateConfig(sae="any", **{f"compute_{name}": False for name in names})


def test_no_such_sae(shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    saved(shared, tmp_path / "demo" / "saes" / "topk", inference_sae(training_config("joint_nfm")))
    told = {
        "nowhere": "'nowhere'",
        str(tmp_path / "demo"): str(tmp_path / "demo" / "saes" / "topk"),
        "nobody/nothing:x": "nobody/nothing:x: the hub at",
        "nothing:x": "Release nothing not found",  # SAELens's words
    }
    for sae, message in told.items():
        assert main(["evaluate", sae]) == 2
        assert message in capsys.readouterr().err


def test_a_released_sae(capsys):
    """By release and id; as release:id, in one word, `attribute` takes it in its tests."""
    assert main(["evaluate", "sae-nfm-demo", "blocks.2.hook_resid_post", *ONE]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "sae-nfm-demo:blocks.2.hook_resid_post: joint_nfm at blocks.2.hook_resid_post of sae-nfm-demo\n"
    )
    released = get_pretrained_saes_directory()["sae-nfm-demo"].expected_var_explained["blocks.2.hook_resid_post"]
    # 512 tokens here, all of the held-out ones there
    assert figures(printed)["explained_variance"] == pytest.approx(released, abs=0.05)


def test_metadata_that_says_too_little(shared, tmp_path):
    bare = copy.deepcopy(training_config("joint_nfm"))
    for field, message in (
        ("model_name", r"metadata\b.*\bmodel_name\b"),
        ("context_size", r"metadata\b.*\bcontext_size\b.*--context-size"),
        ("dataset_path", r"metadata\b.*\bdata set\b.*--held-out"),
    ):
        folder = saved(shared, tmp_path / field, inference_sae(bare), **{field: None})
        with pytest.raises(ValueError, match=message):
            evaluate_saved(EvaluateConfig(sae=folder))


def test_several_saved_saes_in_one_table(shared, tmp_path):
    """Each as `evaluate` has it alone, on the same tokens."""
    made = {"joint_nfm": inference_sae(training_config("joint_nfm"), seed=1), "standard": other_sae(StandardSAEConfig)}
    folders = [saved(shared, tmp_path / name, sae) for name, sae in made.items()]
    data = str(shared / "tokens.parquet")
    table = sae_nfm.evaluation_table(folders, held_out=data)
    assert list(table.index) == folders
    assert list(table["architecture"]) == ["joint_nfm", "standard"]
    model, rows = load_model(shared / "model"), torch.tensor(local_dataset(data)["tokens"])
    for folder in folders:
        alone = evaluate(model, rows, [Arm(name="x", sae=load_sae(folder).eval())], show_progress=False)["x"]
        assert {name: table.loc[folder, name] for name in vars(alone)} == pytest.approx(vars(alone), rel=1e-6)
    assert table["text"].str.startswith("training tokens").all()
    with pytest.raises(ValueError, match="each once"):
        sae_nfm.evaluation_table([folders[0], folders[0]])
    saved(shared, tmp_path / "standard", made["standard"], model_name="other")
    with pytest.raises(ValueError, match=r"models .*other"):
        sae_nfm.evaluation_table(folders, held_out=data)


def evaluated(folder: str, capsys, *more: str) -> tuple[dict[str, float], str]:
    assert main(["evaluate", folder, *FEW, *more]) == 0
    printed = capsys.readouterr().out
    return figures(printed), printed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_and_an_sae_in_16_bits_are_measured_in_float32(shared, tmp_path, dtype, capsys):
    """Per-token losses of a 16-bit model would be rounded to steps of 1/64 and more, and their mean once more."""
    sae = inference_sae(training_config("joint_nfm"))
    found, _ = evaluated(saved(shared, tmp_path / "whole", copy.deepcopy(sae)), capsys)
    half = saved(
        shared, tmp_path / "half", sae.to(getattr(torch, dtype)), model_from_pretrained_kwargs={"dtype": dtype}
    )
    ours, _ = evaluated(half, capsys)
    # a 16-bit number is rounded by 4e-3 at most, which tokens average
    for name in ("ce_loss_without_sae", "ce_loss_with_ablation", "l2_norm_in", "l1"):
        assert ours[name] == pytest.approx(found[name], rel=4e-3), name
    rounded = {name: float(torch.tensor(ours[name]).to(getattr(torch, dtype))) for name in ("ce_loss_with_sae", "l1")}
    assert all(abs(value - ours[name]) > 6e-5 for name, value in rounded.items())  # printed with four decimals


def test_scores_outside_of_their_range_have_a_sentence():
    def notes(**values):
        usual = {
            "ce_loss_with_ablation": 8.0,
            "ce_loss_without_sae": 4.0,
            "ce_loss_with_sae": 5.0,
            "ce_loss_score": 0.75,
        }
        return notes_on({"group": usual | values})

    assert notes() == ()
    assert notes(ce_loss_score=0.0) == notes(ce_loss_score=1.0) == ()
    (note,) = notes(ce_loss_score=1.25, ce_loss_with_sae=3.0)
    assert "above 1" in note
    (note,) = notes(ce_loss_score=-0.5, ce_loss_with_sae=10.0)
    assert "below 0" in note
    (note,) = notes(ce_loss_with_ablation=4.001, ce_loss_score=2.0)
    assert "0.001 nats" in note
    (note,) = notes(ce_loss_with_ablation=3.0, ce_loss_score=2.0)
    assert "-1 nats" in note
    (note,) = notes(kl_div_with_ablation=1e-6, kl_div_with_sae=1e-6, kl_div_score=0.0)
    assert note.startswith("kl_div_score divides")
    (note,) = notes(explained_variance_legacy=float("-inf"), cossim=float("nan"))
    assert note.startswith("cossim, explained_variance_legacy: not defined")


def test_a_note_is_printed_and_saved(shared, tmp_path, capsys):
    """An SAE that writes one long vector at every token is worse than the ablation."""
    sae = inference_sae(training_config("joint_nfm"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.b_dec.copy_(torch.linspace(-1e3, 1e3, D_MODEL))
    _, printed = evaluated(saved(shared, tmp_path / "sae", sae), capsys, "--save", str(tmp_path / "found.json"))
    notes = json.loads((tmp_path / "found.json").read_text())["notes"]
    assert notes
    assert all(f"\n* {note}." in printed for note in notes)


def test_logits_that_are_not_finite_name_the_condition(shared, tmp_path, capsys):
    sae = inference_sae(training_config("joint_nfm"))
    with torch.no_grad():
        sae.b_dec.fill_(3e38)
    assert main(["evaluate", saved(shared, tmp_path / "sae", sae), *ONE]) != 0
    assert "with the SAE in place the model's logits are not finite" in capsys.readouterr().err
