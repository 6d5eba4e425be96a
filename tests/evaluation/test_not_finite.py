"""Logits and activations that are not finite: an error that names what was done and where, never an average."""

import pytest
import torch
from builders import HOOK, inference_sae, rows_of_tokens, tiny_model, training_config

from sae_nfm.analysis import read_activations
from sae_nfm.attribution import Corpus, pair_sums, run_prompt
from sae_nfm.data.documents import TokenRows
from sae_nfm.evaluation import Arm, evaluate, measure
from sae_nfm.evaluation.fidelity import held_out_sums
from sae_nfm.experiments.factorial.measure import WordScorer
from sae_nfm.explorer.activations import firings_of
from sae_nfm.interventions import Edit, Splice, fit_activations, path_means
from sae_nfm.interventions.steering import compare_steering

ROW, POSITION = 2, 5
"""Where token 49 stands, and nowhere else. Attention takes it, times 0, to the other positions of the row."""


@pytest.fixture
def tokens():
    found = rows_of_tokens().clamp(max=48)
    found[ROW, POSITION] = 49
    return found


@pytest.fixture
def broken():
    """A model whose activations are beyond their type at token 49, as it happens in float16."""
    model = tiny_model()
    with torch.no_grad():
        model.W_E[49] = torch.inf
    return model


@pytest.fixture
def sae():
    return inference_sae(training_config("joint_nfm", nfm_top_k=None))


def together(sae):
    """Two features that are active on one token."""
    x, _ = read_activations(tiny_model(), sae, rows_of_tokens()[:2].clamp(max=48))
    first = sae.encode(x)[0].nonzero()[:2, 0].tolist()
    return first[0], first[1]


PLACE = rf"row {ROW}, position 1;"
BROKEN = {
    "evaluate": lambda model, sae, tokens, _: evaluate(model, tokens, [Arm(name="mine", sae=sae)], batch_rows=1),
    "measure": lambda model, sae, tokens, folder: measure(
        model, TokenRows(tokens=tokens, documents=torch.zeros_like(tokens)), {"mine": Splice(sae=sae)}, folder
    ),
    "held-out sums": lambda model, sae, tokens, _: held_out_sums(
        model, TokenRows(tokens=tokens, documents=torch.zeros_like(tokens)), {"mine": Splice(sae=sae)}, batch_rows=1
    ),
    "read activations": lambda model, sae, tokens, _: read_activations(model, sae, tokens),
    "pairs": lambda model, sae, tokens, _: pair_sums(Corpus(model, sae, tokens, show_progress=False, batch_rows=1)),
    "features": lambda model, sae, tokens, _: firings_of(model, sae, tokens, show_progress=False, batch_rows=1),
    "fitted activations": lambda model, sae, tokens, _: fit_activations(model, tokens, HOOK),
    "path means": lambda model, sae, tokens, _: path_means(model, sae, tokens, ["hook_nfm_linear"]),
    "steering": lambda model, sae, tokens, _: compare_steering(
        model, sae, together(sae), tokens, alphas=[1.0], gate_tokens=tokens[:2], show_progress=False
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_overflows(what, broken, sae, tokens, tmp_path):
    with pytest.raises(ValueError, match=PLACE):
        BROKEN[what](broken, sae, tokens, tmp_path / "folder")


def test_a_prompt(broken, sae, tokens):
    with pytest.raises(ValueError, match=r"with the SAE in place .* position 0;"):
        run_prompt(broken, sae, tokens[ROW])


def test_an_edit_that_is_too_large(sae, tokens):
    """The condition is named that did it, not the first one."""
    model, edits = tiny_model(), [Edit(at="hook_sae_acts_post", index=(3,), mode="clamp", value=3e38)]
    rows = TokenRows(tokens=tokens, documents=torch.zeros_like(tokens))
    arms = {"plain": Splice(sae=sae), "clamped": Splice(sae=sae, edits=edits)}
    with pytest.raises(ValueError, match=r"under 'clamped' .* not finite"):
        held_out_sums(model, rows, arms)
    scorer = WordScorer(model, [(0, 5, 6)], [(7,), (8, 9)])
    scorer.scores(arms["plain"], "plain")
    with pytest.raises(ValueError, match=r"not finite under 'feature 3 at 3e38', for stimulus 0"):
        scorer.scores(arms["clamped"], "feature 3 at 3e38")
