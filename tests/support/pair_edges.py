"""Pairs of features by hand."""

from sae_nfm.attribution.results import PairEdge


def edge(first, second, share=0.1, effect=None):
    return PairEdge(
        first=first,
        second=second,
        tokens=10,
        frequency=0.1,
        norm_mean=0.5,
        norm_max=1.0,
        energy_share=share,
        effect_mean=effect,
        weight=0.2,
    )


EDGES = (edge(1, 2, 0.4, 0.3), edge(2, 3, 0.2, -0.1), edge(1, 4, 0.1, 0.2), edge(7, 8, 0.05, -0.2))
