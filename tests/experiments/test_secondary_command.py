"""The job of `sae-nfm secondary`, on a tiny model: training and its controls, figures against slow ones, words, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CONTEXT, D_VOCAB, inference_sae, random_sae, training_config
from sae_lens import SAE, TopKTrainingSAEConfig
from tiny_models import write_checkpoint

from sae_nfm.architectures.secondary import HIDDEN, PRIMARY_DIGEST, attach_secondary, primary_digest
from sae_nfm.data import ActivationCache, CacheConfig, run_cache
from sae_nfm.data.datasets import load_splits
from sae_nfm.data.documents import held_out_rows
from sae_nfm.evaluation.fidelity import Arm, evaluate
from sae_nfm.experiments.secondary.measure import explained, fvu, read_passing
from sae_nfm.experiments.secondary.results import MEAN, PRIMARY, ZERO, SecondaryResult
from sae_nfm.experiments.secondary.run import SecondaryConfig, run_secondary
from sae_nfm.experiments.secondary.training import activations_of, default_k, permuted
from sae_nfm.models.load import load_model
from sae_nfm.stats.estimates import Estimate
from sae_nfm_cli.commands import COMMANDS

HOOK = "blocks.0.hook_resid_post"
FOLDERS = ["hidden-code/k1", "hidden-code/k7", "linear-path/k1", "permuted-hidden-code/k1", "permuted-hidden-code/k7"]
ROUNDING = {"rel": 1e-4, "abs": 1e-6}  # averages in float32 against sums in float64


def write_text(path: Path, documents: int, seed: int) -> str:
    """Documents of 40 random words."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(documents):
            words = torch.randint(1, D_VOCAB, (40,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"t{word}" for word in words)}) + "\n")
    return str(path)


def save_primary(folder: Path, model: Path, seed: int = 0, **overrides):
    cfg = training_config("joint_nfm", HOOK, **overrides)
    cfg.metadata.model_name = str(model)
    inference_sae(cfg, seed).save_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SecondaryConfig:
    folder = tmp_path_factory.mktemp("secondary")
    model = write_checkpoint(folder / "llama-7b-gpt2", "gpt2")
    return SecondaryConfig(
        primary=save_primary(folder / "primary", model),
        dataset=write_text(folder / "train.jsonl", 60, seed=1),
        held_out=write_text(folder / "validation.jsonl", 40, seed=2),
        expansion=3,
        training_tokens=1_024,
        held_out_tokens=480,
        fit_tokens=320,
        batch_size=64,
        context_size=CONTEXT,
        lr=1e-2,
        output=str(folder / "out"),
    )


@pytest.fixture(scope="module")
def result(config) -> SecondaryResult:
    return run_secondary(config, command="sae-nfm secondary primary")


@pytest.fixture(scope="module")
def parts(config, result):
    """Model, primary and held-out rows of the job, loaded anew."""
    primary = SAE.load_from_disk(config.primary)
    model = load_model(primary.cfg.metadata.model_name)
    _, validation = load_splits(config.dataset, config.held_out, "tiny")
    return model, primary, held_out_rows(model, validation, CONTEXT, config.held_out_tokens)


def saved(config, source: str, k: int) -> SAE:
    return SAE.load_from_disk(Path(config.output) / "saes" / source / f"k{k}").requires_grad_(False)


def test_everything_is_trained_saved_and_in_the_table(config, result, parts):
    folder, known = Path(config.output) / "saes", primary_digest(parts[1])
    written = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/*/cfg.json"))
    assert written == [*FOLDERS, "residual/k1"]
    assert default_k(8) == (1, 7)
    assert [row.name for row in result.rows[:3]] == [PRIMARY, MEAN, ZERO]
    for row in result.rows[3:]:
        sae = saved(config, row.sae.trained_on.replace(" ", "-"), row.sae.k)
        assert (row.sae.d_in, row.sae.d_sae) == (sae.cfg.d_in, 3 * sae.cfg.d_in) == (sae.cfg.d_in, sae.cfg.d_sae)
        assert row.sae.l0 <= row.sae.k == sae.cfg.k
        assert sae.cfg.metadata[PRIMARY_DIGEST] == known
        assert row.sae.dead == sae.cfg.metadata.num_dead_features
        assert (row.sae.explained_true is None) == (row.sae.trained_on != "permuted hidden code")
    assert saved(config, "hidden-code", 1).cfg.metadata.hook_name == f"{HOOK}.{HIDDEN}"
    assert saved(config, "residual", 1).cfg.metadata.hook_name == HOOK


def test_behaviour_is_that_of_the_attached_secondary(config, result, parts):
    model, primary, rows = parts

    def fidelity(**kwargs):
        return evaluate(model, rows.tokens, [Arm(name="one", sae=primary, **kwargs)], show_progress=False)["one"]

    found = {PRIMARY: fidelity(), ZERO: fidelity(off=(HIDDEN,))}
    for source in ("hidden code", "permuted hidden code"):
        with attach_secondary(primary, saved(config, source.replace(" ", "-"), 7)):
            found[f"{source}, k 7"] = fidelity()
    for name, expected in found.items():
        row = result.row(name)
        assert row.kl_nats.estimate == pytest.approx(expected.kl_nats, **ROUNDING)
        assert row.kl_rise.estimate == pytest.approx(expected.kl_nats - found[PRIMARY].kl_nats, **ROUNDING)
        assert row.ce_delta_nats.estimate == pytest.approx(expected.ce_delta_nats, **ROUNDING)
        assert row.fvu_x.estimate == pytest.approx(expected.fvu, **ROUNDING)
    assert result.row(PRIMARY).fvu_x_hat.estimate == 0
    assert result.row(MEAN).kl_rise.n_clusters == len(rows.documents.unique()) - 1  # one is "no document"


@torch.no_grad()
@pytest.mark.parametrize(("source", "at"), [("linear path", "hook_nfm_linear"), ("residual", "hook_sae_input")])
def test_controls_replace_what_they_were_trained_on(config, result, parts, source, at):
    model, primary, rows = parts
    sae, row = saved(config, source.replace(" ", "-"), 1), result.row(f"{source}, k 1")
    passing = read_passing(model, primary, rows, [at])
    if source == "residual":
        x_hat = primary(sae(passing.x))
    else:
        x_hat = passing.x_hat - passing.at[at] + sae(passing.at[at])
    error, of = (x_hat - passing.x_hat).square().sum(), passing.x_hat - passing.x_hat.mean(0)
    assert row.fvu_x_hat.estimate == pytest.approx(float(error / of.square().sum()), **ROUNDING)
    target = passing.at[at]
    left = (sae(target) - target).square().sum() / (target - target.mean(0)).square().sum()
    assert row.sae.explained.estimate == pytest.approx(float(1 - left), **ROUNDING)


def test_variance_by_hand():
    target, made = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([[1.0], [2.0], [4.0], [5.0]])
    documents = torch.tensor([0, 0, 1, 1])
    assert fvu(target, made, documents).estimate == pytest.approx(2 / 20)  # errors 1, 0, 0, 1 and deviations 9, 1, 1, 9
    found, left = explained(target, made, documents), fvu(target, made, documents)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.9, 1 - left.high, 1 - left.low))


def test_permutation_keeps_each_dimension_and_unties_them():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(40, 25, 1, generator=generator)
    hidden = shared + 0.1 * torch.randn(40, 25, 3, generator=generator)
    counted = torch.ones(40, 25, dtype=torch.bool)
    counted[:, 0] = False
    dealt = permuted(hidden, counted, generator)
    assert torch.equal(dealt[counted].sort(dim=0).values, hidden[counted].sort(dim=0).values)
    assert torch.equal(dealt[~counted], hidden[~counted])
    before, after = (torch.corrcoef(one[counted].T)[~torch.eye(3, dtype=torch.bool)] for one in (hidden, dealt))
    assert before.min() > 0.98
    assert after.abs().max() < 0.1  # 960 tokens: three standard errors
    assert not torch.equal(dealt, permuted(hidden, counted, generator))


@torch.no_grad()
def test_what_the_permuted_arm_is_trained_on(parts):
    """Each batch of the model's hidden codes, dealt out anew; the same tokens alike, so that a run can be resumed."""
    model, primary, rows = parts
    tokens = rows.tokens[:8]

    def hidden(trained_on, seed=0):
        with activations_of(model, primary, trained_on, seed) as name:
            return model.run_with_cache(tokens, names_filter=[name])[1][name]

    true, dealt = hidden("hidden code"), hidden("permuted hidden code")
    counted = tokens != 0
    counted[:, 0] = False
    assert torch.equal(dealt[counted].sort(dim=0).values, true[counted].sort(dim=0).values)
    assert torch.equal(dealt[~counted], true[~counted])
    assert not torch.equal(dealt, true)
    assert torch.equal(dealt, hidden("permuted hidden code"))
    assert not torch.equal(dealt, hidden("permuted hidden code", seed=1))


def test_done_again_it_is_the_same_and_nothing_is_trained(config, result):
    def times():
        return {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*.safetensors")}

    before = times()
    assert run_secondary(config).rows == result.rows
    assert times() == before


def test_saved_and_loaded(config, result):
    path = Path(config.output) / "results.json"
    result.save(path)
    assert SecondaryResult.load(path).rows == result.rows
    path.with_name("other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json.*`sae-nfm secondary`.*\blist\b"):
        SecondaryResult.load(path.with_name("other.json"))


def estimate(value: float, half: float = 0.01) -> Estimate:
    return Estimate(estimate=value, low=value - half, high=value + half, n=10, n_clusters=2, test="")


def changed(result, own: float, null: float, mean_rise: float) -> str:
    """The words where the secondary SAE, that of the permuted code, and the mean do this."""
    shares = {"hidden code": own, "permuted hidden code": null}
    rows = [
        replace(row, sae=replace(row.sae, explained=estimate(shares[row.sae.trained_on])))
        if row.sae is not None and row.sae.trained_on in shares
        else row
        for row in result.rows
    ]
    rows = [replace(row, kl_rise=estimate(mean_rise)) if row.name == MEAN else row for row in rows]
    return replace(result, rows=tuple(rows)).words()


def test_a_null_result_is_said_as_plainly_as_a_win(result):
    won, level, lost = (changed(result, own, 0.5, 0.1) for own in (0.7, 0.51, 0.3))
    assert "(less: the dimensions do things together that features pick up)" in won
    assert "(no difference shown: no structure across dimensions is shown)" in level
    assert "(more: no structure across dimensions is shown)" in lost
    assert "so it says something of each token that the predictions need" in won
    nothing = changed(result, 0.7, 0.5, 0.001)
    assert "a null result: nothing in it is shown to matter to the predictions" in nothing
    assert "there is no effect of which a share could be kept" in nothing


def test_words(result):
    text = result.words()
    assert all(row.name in text for row in result.rows)
    assert "k = 7 of 8 dimensions is hardly sparse" in text
    assert "One seed (0), 1,024 training tokens" in text
    dead = replace(result, rows=tuple(replace(r, sae=r.sae and replace(r.sae, dead=r.sae.d_sae)) for r in result.rows))
    told = "Most features of a secondary SAE are dead, 100% (hidden code, k 1), 100% (hidden code, k 7)"
    assert told in dead.words()
    assert told not in text
    assert "sampled from the embedded model" not in text  # real text was given


def test_without_a_linear_path_and_other_k(config, tmp_path):
    model = SAE.load_from_disk(config.primary).cfg.metadata.model_name
    primary = save_primary(tmp_path / "primary", model, use_linear_path=False)
    cfg = replace(config, primary=primary, k=(2,), training_tokens=128, output=str(tmp_path / "out"))
    names = [row.name for row in run_secondary(cfg).rows[3:]]
    assert names == ["hidden code, k 2", "permuted hidden code, k 2", "residual, k 2"]


def test_another_primary_is_refused(config, result, tmp_path):
    model = SAE.load_from_disk(config.primary).cfg.metadata.model_name
    other = save_primary(tmp_path / "primary", model, seed=1)
    with pytest.raises(ValueError, match=r"hidden-code/k1'.*another primary .*\boutput\b"):
        run_secondary(replace(config, primary=other))


def test_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"\bexpansion\b.*\b0\b"):
        replace(config, expansion=0)
    with pytest.raises(ValueError, match=r"\btraining_tokens is 32\b.*\b64\b"):
        replace(config, training_tokens=32)
    cfg = replace(config, output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"\bk is 25\b.*\b24\b"):
        run_secondary(replace(cfg, k=(25,)))
    with pytest.raises(ValueError, match=r"1 document, .*--held-out-tokens"):
        run_secondary(replace(cfg, held_out_tokens=1))
    topk = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4)
    random_sae(topk).save_inference_model(tmp_path / "topk")
    with pytest.raises(ValueError, match=r"'topk'.*interaction path"):
        run_secondary(replace(cfg, primary=str(tmp_path / "topk")))
    nameless = inference_sae(training_config("joint_nfm"))
    nameless.cfg.metadata.model_name = None
    nameless.save_model(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"nameless'.*\bmodel_name\b.*\bhook_name\b"):
        run_secondary(replace(cfg, primary=str(tmp_path / "nameless")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "primary", "k"),
    [([], "sae-nfm-demo:blocks.2.hook_resid_post", ()), (["runs/mine", "--k", "8", "16"], "runs/mine", (8, 16))],
)
def test_command_line(argv, primary, k):
    config = COMMANDS["secondary"].make_parser("secondary").parse(argv)
    assert (config.primary, config.k) == (primary, k)


def test_on_a_cache_it_is_the_same(config, result, tmp_path):
    """Hidden code, permuted, linear path and residual, all from what the primary reads; the held-out text is the cache's."""
    where = {
        "model": SAE.load_from_disk(config.primary).cfg.metadata.model_name,
        "hook": (HOOK,),
        "context_size": CONTEXT,
    }
    where |= {"dataset": config.dataset, "held_out": config.held_out}
    run_cache(CacheConfig(**where, output=str(tmp_path / "cache")))
    on_cache = {
        "dataset": None,
        "held_out": None,
        "activations": str(tmp_path / "cache"),
        "output": str(tmp_path / "out"),
        "k": (1,),
    }
    cached = run_secondary(replace(config, **on_cache))
    for source in ("hidden-code/k1", "permuted-hidden-code/k1", "linear-path/k1", "residual/k1"):
        one, other = (
            SAE.load_from_disk(Path(at) / "saes" / source).state_dict() for at in (config.output, tmp_path / "out")
        )
        for name, tensor in one.items():  # up to the rounding of products over another number of rows
            torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=0)
    for row in cached.rows:
        assert row.kl_nats.estimate == pytest.approx(result.row(row.name).kl_nats.estimate, **ROUNDING)
    assert cached.provenance["activations"] == ActivationCache(tmp_path / "cache").name
    assert cached.provenance["text"] == result.provenance["text"]
    with pytest.raises(ValueError, match=r"activations of 'k1' is None, and was '\d+ rows"):
        run_secondary(replace(config, k=(1,), output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="context_size of this training is 12, and 16"):
        run_secondary(replace(config, **(on_cache | {"context_size": 12})))
