"""Rows token by token: against a naive float64 loop, SAELens, `evaluate`; resumed, and the same again."""

import dataclasses

import numpy as np
import pytest
import torch
from builders import CONTEXT, D_MODEL, HOOK, inference_sae, tiny_model, token_dataset, training_config
from naive_behaviour import random_tokens, rows_by_hand
from planted import linear_model, planted_sae
from sae_lens import ActivationsStore
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from sae_nfm.data.documents import TokenRows
from sae_nfm.evaluation.fidelity import Arm, evaluate, measure
from sae_nfm.evaluation.token_table import document_sums, read_rows
from sae_nfm.interventions.intervene import Splice, Substitution
from sae_nfm.loading.saelens import quiet_saelens


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def sae():
    return inference_sae(training_config("joint_nfm"))


def token_rows(tokens, documents=None) -> TokenRows:
    """Rows of which two make a document, unless they are said to make others."""
    numbers = torch.arange(len(tokens)) // 2 if documents is None else documents
    return TokenRows(tokens=tokens, documents=numbers[:, None].expand(tokens.shape).where(tokens != 0, -1))


def push(x, context):
    return x + 0.3


def noise(x, context):
    return x + torch.randn(x.shape, generator=context.generator)


NOISE = Substitution(at=HOOK, function=noise, description="noise")


def test_rows_equal_a_naive_loop(model, sae, tmp_path):
    tokens = random_tokens()
    arms = {"sae": Splice(sae=sae), "push": Substitution(at=HOOK, function=push, description="push")}
    sizes = {"batch_rows": 2, "batches_per_part": 1, "show_progress": False}
    found = read_rows(measure(model, token_rows(tokens), arms, tmp_path / "rows", **sizes))
    for arm, replaced in {"sae": lambda x: sae(x[None])[0], "push": lambda x: x + 0.3}.items():
        own, expected = found[found["arm"] == arm], rows_by_hand(model, tokens, replaced)
        assert own["document"].tolist() == [row // 2 for row in expected["row"]]
        for name, values in expected.items():
            assert own[name].tolist() == pytest.approx(values, rel=1e-5, abs=2e-6, nan_ok=True), (arm, name)
        assert own["ce_nats"].isna().sum() == 5


def test_rows_average_to_what_evaluate_gives(model, sae, tmp_path):
    """FVU too: errors about the mean of all measured tokens, also where a document runs over several parts."""
    tokens = random_tokens(rows=9)
    rows = token_rows(tokens, torch.tensor([0, 0, 0, 3, 3, 5, 6, 6, 6]))
    off = ("hook_nfm_linear",)
    arms = {"whole": Splice(sae=sae), "part": Splice(sae=sae, ablated=dict.fromkeys(off))}
    folder = measure(model, rows, arms, tmp_path / "rows", batch_rows=2, batches_per_part=2, show_progress=False)
    table = document_sums(folder)
    expected = evaluate(
        model, tokens, [Arm(name="whole", sae=sae), Arm(name="part", sae=sae, off=off)], show_progress=False
    )
    for name, own in table.groupby("arm", observed=True):
        sums = own.drop(columns="arm").sum()
        fidelity = expected[name]
        assert sums["tokens"] == fidelity.tokens
        assert sums["error_energy"] / sums["variance_energy"] == pytest.approx(fidelity.fvu, rel=1e-6)
        assert sums["kl_nats"] / sums["tokens"] == pytest.approx(fidelity.kl_nats, rel=1e-6)
        assert sums["ce_nats"] / sums["predictions"] == pytest.approx(fidelity.ce_nats, rel=1e-6)
        assert sums["ce_delta_nats"] / sums["predictions"] == pytest.approx(fidelity.ce_delta_nats, rel=1e-5)


@torch.no_grad()
def test_a_planted_error_has_the_effect_worked_out_by_hand(tmp_path):
    """Logits shift by delta = shift W_U: with A = log sum p exp(delta), KL = A - sum p delta and CE rises by A - delta_next."""
    model, tokens = linear_model(), random_tokens()
    shift = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(6))
    arms = {"planted": Splice(sae=planted_sae(shift)), "identity": Splice(sae=planted_sae(torch.zeros(D_MODEL)))}
    found = read_rows(measure(model, token_rows(tokens), arms, tmp_path / "rows", show_progress=False))
    planted, identity = (found[found["arm"] == name].reset_index() for name in arms)
    delta = (shift.double() @ model.W_U.double()).numpy()
    p = model(tokens).double().softmax(-1).numpy()
    for _, row in planted.iterrows():
        at, total = (row["row"], row["position"]), np.log(p[row["row"], row["position"]] @ np.exp(delta))
        # float32 log-probabilities of size 4, summed over 50 words
        assert row["kl_nats"] == pytest.approx(total - p[at] @ delta, rel=1e-5, abs=2e-6)
        if at[1] + 1 < CONTEXT:
            expected = total - delta[tokens[at[0], at[1] + 1]]
            assert row["ce_delta_nats"] == pytest.approx(expected, rel=1e-5, abs=2e-6)
    assert planted["kl_nats"].min() > 0.01
    assert planted["error_norm"].to_numpy() == pytest.approx(float(shift.norm()), rel=1e-5)
    assert planted["error_energy"].to_numpy() == pytest.approx(float(shift.square().sum()), rel=1e-5)
    # relu(x) - relu(-x) is x to the bit, so that the logits are the same bits
    for name in ("kl_nats", "ce_delta_nats", "error_norm", "error_energy"):
        assert not identity[name].fillna(0).any(), name
    assert identity["cosine"].to_numpy() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("special_tokens", ["kept", "changed"])
def test_rows_equal_saelens_token_by_token(model, sae, special_tokens, tmp_path):
    """Special tokens treated alike: bypassed or not in the splice; zeroed, as SAELens always does, in the ablation."""
    tokens = random_tokens()
    arms = {
        "sae": Splice(sae=sae, special_tokens=special_tokens),
        "ablation": Substitution(
            at=HOOK, function=lambda x, context: torch.zeros_like(x), description="zero", special_tokens="changed"
        ),
    }
    found = read_rows(measure(model, token_rows(tokens), arms, tmp_path / "rows", show_progress=False))
    ignored = [0] if special_tokens == "kept" else None
    theirs = get_recons_loss(sae, model, ActivationScaler(), tokens, True, True, ignore_tokens=ignored)
    for arm in arms:
        own = found[found["arm"] == arm]
        at = own["row"].to_numpy(), own["position"].to_numpy()
        expected = theirs[f"kl_div_with_{arm}"][at].tolist()
        assert own["kl_nats"].tolist() == pytest.approx(expected, rel=1e-5, abs=2e-6)  # float32 logits
        own = own[own["position"] < CONTEXT - 1]
        at = own["row"].to_numpy(), own["position"].to_numpy()
        ce, original = (theirs[f"ce_loss_{name}"][at] for name in (f"with_{arm}", "without_sae"))
        assert own["ce_nats"].tolist() == pytest.approx(ce.tolist(), rel=1e-5, abs=2e-6)
        assert own["ce_delta_nats"].tolist() == pytest.approx((ce - original).tolist(), rel=1e-5, abs=2e-6)


def test_averages_equal_run_evals(model, sae, tmp_path):
    """Also with special tokens in the middle of rows. The data set is one batch long, so that every batch is all of it."""
    tokens = random_tokens()
    sae.cfg.metadata.context_size = CONTEXT
    with quiet_saelens():
        dataset = token_dataset(1).from_dict({"tokens": tokens.tolist()})
        store = ActivationsStore.from_sae(model, sae, dataset, store_batch_size_prompts=len(tokens), total_tokens=5)
        every = EvalConfig(
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        theirs, _ = run_evals(sae, store, model, ActivationScaler(), every, exclude_special_tokens=True)
    numbers = {name: number for group in theirs.values() for name, number in group.items()}
    zero = Substitution(
        at=HOOK, function=lambda x, context: torch.zeros_like(x), description="zero", special_tokens="changed"
    )
    folder = measure(
        model, token_rows(tokens), {"sae": Splice(sae=sae), "zero": zero}, tmp_path / "rows", show_progress=False
    )
    table = document_sums(folder).groupby("arm", observed=True).sum()
    mine, ablated = table.loc["sae"], table.loc["zero"]
    ours = {
        "kl_div_with_sae": mine["kl_nats"] / mine["tokens"],
        "kl_div_with_ablation": ablated["kl_nats"] / ablated["tokens"],
        "ce_loss_with_sae": mine["ce_nats"] / mine["predictions"],
        "ce_loss_without_sae": (mine["ce_nats"] - mine["ce_delta_nats"]) / mine["predictions"],
        "ce_loss_with_ablation": ablated["ce_nats"] / ablated["predictions"],
        "explained_variance": 1 - mine["error_energy"] / mine["variance_energy"],
        "mse": mine["error_energy"] / mine["tokens"],
        "cossim": mine["cosine"] / mine["tokens"],
        "l2_norm_in": mine["x_norm"] / mine["tokens"],
        "l0": evaluate(model, tokens, [Arm(name="sae", sae=sae)], show_progress=False)["sae"].l0,
    }
    assert ours == pytest.approx({name: numbers[name] for name in ours}, rel=1e-5, abs=2e-6)  # float32 logits


class Interrupted(Exception):
    """What a user does in the middle of a measurement."""


def test_an_interrupted_measurement_goes_on(model, sae, tmp_path):
    """Finished parts are not computed again, and the rows are the same bits, random arms included."""
    tokens, calls = random_tokens(rows=7), []
    sizes = {"seed": 3, "batch_rows": 1, "batches_per_part": 2, "show_progress": False}

    def stumble(x, context):
        calls.append(len(x))
        if len(calls) == 6:
            raise Interrupted
        return noise(x, context)

    def arms(function):
        return {"sae": Splice(sae=sae), "noise": dataclasses.replace(NOISE, function=function)}

    whole = measure(model, token_rows(tokens), arms(noise), tmp_path / "whole", **sizes)
    with pytest.raises(Interrupted):
        measure(model, token_rows(tokens), arms(stumble), tmp_path / "rows", **sizes)
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("part-*.parquet")}
    assert sorted(there) == ["part-00000.parquet", "part-00001.parquet"]
    assert measure(model, token_rows(tokens), arms(stumble), tmp_path / "rows", **sizes) == tmp_path / "rows"
    assert len(calls) == 6 + 3  # of 7 rows, those of the third and the fourth part
    for name, time in there.items():
        assert (tmp_path / "rows" / name).stat().st_mtime_ns == time
    assert read_rows(whole).equals(read_rows(tmp_path / "rows"))
    assert not list((tmp_path / "rows").glob("*.partial"))


def test_draws_depend_on_seed_name_and_part_only(model, sae, tmp_path):
    tokens = random_tokens()[:1].expand(4, CONTEXT)  # the same row again and again
    sizes = {"batch_rows": 1, "batches_per_part": 2, "show_progress": False}

    def measured(name, arms, **settings):
        return read_rows(measure(model, token_rows(tokens), arms, tmp_path / name, **(sizes | settings)))

    alone, beside = measured("alone", {"noise": NOISE}), measured("beside", {"sae": Splice(sae=sae), "noise": NOISE})
    of_noise = beside[beside["arm"] == "noise"]["kl_nats"].to_numpy()
    assert np.array_equal(alone["kl_nats"], of_noise)
    assert len(set(alone["error_norm"])) == 4 * (CONTEXT - 1)  # no draw comes twice
    for other in (measured("seed", {"noise": NOISE}, seed=1), measured("name", {"again": NOISE})):
        assert not np.isin(other["error_norm"], alone["error_norm"]).any()


def test_a_changed_measurement_says_what_changed(model, sae, tmp_path):
    tokens = random_tokens()
    rows, arms, folder = token_rows(tokens), {"sae": Splice(sae=sae), "noise": NOISE}, tmp_path / "rows"
    measure(model, rows, arms, folder, show_progress=False)
    fewer = token_rows(tokens[:4])
    ablated = arms | {"sae": Splice(sae=sae, ablated={"hook_nfm_linear": None})}
    other_document = token_rows(tokens, torch.arange(5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other_model = tiny_model()
        other_model.W_U.data += 0.1
    for changed, message in {
        (model, fewer, 0, "whole"): r"settings: tokens\b",
        (model, other_document, 0, "whole"): r"settings: documents\b",
        (model, rows, 0, "ablated"): r"settings: .*\barms \(sae\)",
        (model, rows, 1, "whole"): r"settings: seed\b.*\b0\b.*\b1\b",
        (other_model, rows, 0, "whole"): r"settings: model\b.*HookedSAETransformer",
    }.items():
        which, given, seed, kind = changed
        with pytest.raises(ValueError, match=message):
            measure(which, given, arms if kind == "whole" else ablated, folder, seed=seed, show_progress=False)
    measure(model, rows, arms, folder, show_progress=False)


def test_what_measure_refuses(model, sae, tmp_path):
    rows, folder = token_rows(random_tokens()), tmp_path / "rows"
    with pytest.raises(ValueError, match=r"\bno arms\b"):
        measure(model, rows, {}, folder)
    with pytest.raises(ValueError, match=r"\bno token\b.*\b32 tokens\b"):
        measure(model, token_rows(torch.zeros(2, 16, dtype=torch.long)), {"sae": Splice(sae=sae)}, folder)
    with pytest.raises(ValueError, match=r"\b32769 tokens\b.*\b32768\b"):
        measure(model, token_rows(torch.zeros(1, 32769, dtype=torch.long)), {"sae": Splice(sae=sae)}, folder)
    assert not folder.exists()
    broken = Substitution(at=HOOK, function=lambda x, context: x * torch.nan, description="broken")
    with pytest.raises(ValueError, match=r"'broken'.*\bfinite\b"):
        measure(model, rows, {"broken": broken}, folder, show_progress=False)
