"""Projections and gains by hand, planted inhibition, the overlap of two paths."""

import numpy as np
import pandas as pd
import pytest
import torch
from builders import D_SAE
from path_inputs import activations, joint

from sae_nfm.analysis import gauge
from sae_nfm.analysis.path_contributions import (
    centred,
    gains_of_arms,
    pair_projections,
    projection,
    squared_error_gains,
    token_paths,
)
from sae_nfm.architectures.joint_sae import Paths


def test_projection_by_hand():
    found = projection(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0]] * 3))
    assert found.coefficient.tolist() == [0.5, -0.5, 0.0]
    assert found.cosine.tolist() == pytest.approx([0.5**0.5, -1.0, 0.0])
    assert (found.fraction_negative, found.mean, found.mean_negative) == (pytest.approx(1 / 3), 0.0, -0.5)
    assert projection(torch.ones(2, 2), torch.ones(2, 2)).mean_negative is None


@torch.no_grad()
def test_pair_projections_are_those_of_a_loop_over_pairs():
    sae = joint(nfm_top_k=None)
    tokens, rows = token_paths(sae, activations()), gauge.as_read(sae).direct * torch.linspace(0.5, 2, D_SAE)[:, None]
    tokens.acts.values[0, 1] = 0  # a token with fewer active features
    found = pair_projections(tokens.acts, tokens.gates, rows, sae.V, sae.W_1, sae.W_2)
    for t in (0, 1, 7):
        active = [(int(i), f) for i, f in zip(tokens.acts.indices[t], tokens.acts.values[t], strict=True) if f > 0]
        each, mutual = [], 0
        for a in range(len(active)):
            for b in range(a):
                (i, f), (j, g) = active[a], active[b]
                written = (((f * g * sae.V[i] * sae.V[j]) @ sae.W_1) * tokens.gates[t]) @ sae.W_2
                both = [float(written @ rows[n] / rows[n].norm()) for n in (i, j)]
                each, mutual = each + both, mutual + (max(both) < 0)
        assert (found.projections[t], found.mutual[t]) == (len(each), mutual)
        assert found.negative[t] == sum(value < 0 for value in each)
        assert found.strength[t].item() == pytest.approx(sum(map(abs, each)))
        assert found.negative_strength[t].item() == pytest.approx(-sum(value for value in each if value < 0))
        assert found.direct_strength[t].item() == pytest.approx(sum(float(f * rows[i].norm()) for i, f in active))
    assert found.projections[0] == 6  # three features, two directions for each pair


def test_a_planted_inhibition_is_found():
    """A path that writes minus a tenth of the direct path is negative on every token, whatever constant either has."""
    direct = activations(rows=200)
    added = -0.1 * direct + 5
    assert projection(added, direct).fraction_negative < 1
    found = projection(centred(added), centred(direct))
    assert found.fraction_negative == 1
    torch.testing.assert_close(found.coefficient, torch.full((200,), -0.1, dtype=torch.float64))


# Gains.


def path_outputs(rows: int = 50) -> tuple[torch.Tensor, Paths]:
    x, direct, linear, inter = (activations(seed, rows) for seed in range(4))
    return x, Paths(direct, linear, None, inter)


def test_the_overlap_on_squared_error_is_twice_the_inner_product():
    x, paths = path_outputs()
    gains = squared_error_gains(x, paths)
    expected = ((x - paths.direct) ** 2).sum(-1) - ((x - paths.direct - paths.linear) ** 2).sum(-1)
    np.testing.assert_allclose(gains.linear, expected.numpy())
    np.testing.assert_allclose(gains.overlap, 2 * (paths.linear * paths.interaction).sum(-1).numpy())
    kept = squared_error_gains(x, paths, keep_means=True)
    np.testing.assert_allclose(
        kept.overlap, 2 * (centred(paths.linear) * centred(paths.interaction)).sum(-1).numpy(), atol=1e-12
    )


def test_a_constant_moved_between_paths_changes_zero_ablation_only():
    x, paths = path_outputs()
    moved = paths._replace(linear=paths.linear + 3, interaction=paths.interaction - 3)
    np.testing.assert_allclose(squared_error_gains(x, paths).both, squared_error_gains(x, moved).both)
    assert abs(squared_error_gains(x, paths).overlap - squared_error_gains(x, moved).overlap).min() > 1
    kept, other = (squared_error_gains(x, one, keep_means=True) for one in (paths, moved))
    np.testing.assert_allclose(kept.overlap, other.overlap)
    np.testing.assert_allclose(kept.nonlinear, other.nonlinear)
    with pytest.raises(ValueError, match=r"\bno linear\b.*\binteraction path\b"):
        squared_error_gains(x, paths._replace(linear=None))


ARMS = {"direct": "direct only", "linear": "+ linear", "nonlinear": "+ nonlinear", "both": "all"}


def tidy_rows() -> pd.DataFrame:
    kl = {"direct only": [1.0, 2.0], "+ linear": [0.5, 1.0], "+ nonlinear": [0.75, 1.5], "all": [0.5, 0.75]}
    rows = [(7, 0, 1 + p, arm, value) for arm, values in kl.items() for p, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["document", "row", "position", "arm", "kl_nats"])
    return frame.astype({"arm": "category"}).sample(frac=1, random_state=0)


def test_gains_of_arms_by_hand():
    gains = gains_of_arms(tidy_rows(), ARMS)
    assert gains.base.tolist() == [1.0, 2.0]
    assert (gains.linear.tolist(), gains.nonlinear.tolist(), gains.both.tolist()) == (
        [0.5, 1.0],
        [0.25, 0.5],
        [0.5, 1.25],
    )
    assert gains.overlap.tolist() == [0.25, 0.25]
    assert gains.documents.tolist() == [7, 7]


def test_rows_that_are_not_those_of_four_arms_are_refused():
    rows = tidy_rows()
    with pytest.raises(ValueError, match=r"\barms\b.*\bfor both\b.*\bdirect, linear, nonlinear, both\b"):
        gains_of_arms(rows, {"both": "all"})
    with pytest.raises(ValueError, match=r"\barm every path\b.*\bdirect only\b"):
        gains_of_arms(rows, ARMS | {"both": "every path"})
    with pytest.raises(ValueError, match=r"\bno column ce_nats\b.*\bdocument, row, position, arm, kl_nats\b"):
        gains_of_arms(rows, ARMS, "ce_nats")
    with pytest.raises(ValueError, match=r"\bmore than once\b"):
        gains_of_arms(pd.concat([rows, rows]), ARMS)
    with pytest.raises(ValueError, match=r"\bkl_nats is missing\b"):
        gains_of_arms(rows.iloc[1:], ARMS)
