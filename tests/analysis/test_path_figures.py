"""Figures of paths on tokens are those of the functions they come from."""

import pytest
import torch
from path_inputs import activations, joint
from scipy.stats import ttest_1samp

from sae_nfm.analysis.path_contributions import (
    centred,
    pair_projections,
    path_sizes,
    projection,
    squared_error_gains,
    token_paths,
)
from sae_nfm.analysis.sae_report import functional_figures


@pytest.fixture(scope="module")
def figures():
    sae = joint(nfm_top_k=None, inference=True, rescale_acts_by_decoder_norm=False)
    x, documents = activations(rows=480), torch.arange(20).repeat_interleave(24)
    tokens = token_paths(sae, x, documents)
    return sae, tokens, functional_figures(sae, tokens, seed=0, n_permutations=99)


def test_figures_are_those_of_their_functions(figures):
    sae, tokens, found = figures
    paths, sizes = tokens.paths, path_sizes(tokens.paths)
    assert sum(share.estimate for share in found.magnitude_shares.values()) == pytest.approx(1)
    for name, share in found.magnitude_shares.items():
        assert share.estimate == pytest.approx(sizes.share(sizes.magnitude, name))
        assert share.n_clusters == 20
    added = paths.linear + paths.interaction
    one, two = found.inhibition, projection(added, paths.direct)
    assert one.fraction_negative.estimate == pytest.approx(two.fraction_negative)
    assert one.mean.estimate == pytest.approx(two.mean)
    free = projection(centred(paths.interaction), centred(paths.direct + paths.linear))
    assert found.gauge_free_inhibition.mean.estimate == pytest.approx(free.mean, rel=1e-5)
    gains = squared_error_gains(tokens.x, paths)
    assert found.gains["overlap"].estimate == pytest.approx(gains.overlap.mean() / gains.base.mean())
    per_document = gains.overlap.reshape(20, 24).mean(1)  # equal documents: a t-test over their means
    assert found.gains["overlap"].p_value == pytest.approx(ttest_1samp(per_document, 0).pvalue)
    pairs = pair_projections(tokens.read, tokens.gates, sae.W_dec, sae.V, sae.W_1, sae.W_2)
    assert found.pairs.fraction_negative.estimate == pytest.approx(pairs.fraction_negative)
    assert found.pairs.negative_strength.estimate == pytest.approx(pairs.fraction_negative_strength)


@torch.no_grad()
def test_the_residual_is_what_the_linear_map_leaves(figures):
    sae, tokens, found = figures
    residual, chosen = found.residual, found.residual.part.test_tokens
    assert residual.r2.estimate == pytest.approx(residual.part.r2)
    x_hat = residual.part.reconstruct(sae, "linear")(tokens.x)
    linear = (tokens.x - x_hat)[chosen].square().sum()
    whole = (tokens.x - sae(tokens.x))[chosen].square().sum()
    assert residual.gain_of_residual.estimate == pytest.approx(float(1 - whole / linear))
    assert residual.r2.low < residual.r2.estimate < residual.r2.high
    assert residual.gain_of_residual.estimate != pytest.approx(residual.gain_of_path.estimate, rel=1e-2)
