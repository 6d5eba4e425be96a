"""Are there two kinds of features? Squared decoder norms before and after fixing the gauge, beside TopK and no training."""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_nfm.analysis.results import (
    AS_TRAINED,
    CANONICAL,
    INITIAL,
    PUBLISHED_MEANS,
    TOPK,
    NormsResult,
    SAENorms,
    SquaredNorms,
    p_words,
)
from sae_nfm.report.blocks import Block, Figure, Heading, Prose, Section
from sae_nfm.report.plots import AXIS, PALETTE, styled
from sae_nfm.report.run_folder import Run

TITLE = "Norms of the features"
COMMANDS = ("sae-nfm train --output RUN/mine", "sae-nfm demo --output RUN/demo")
LEAD = (
    "Does training both paths split the features into two kinds? arXiv 2507.00269 reports squared decoder norms of "
    "the joint model in two groups, without a test. Norms are set by the gauge and by how encoder and decoder share "
    "the scale, so both are shown with that fixed, each with Hartigan's dip test."
)
CAPTIONS = {
    "decoder": (
        "Features by squared norm of their decoder row, one row of bars an SAE, all on the same bins. Dashed: the "
        "published means of two groups, 0.05 and 0.37. A TopK SAE is one bar at 1 where SAELens has folded its norms "
        "into its encoder, and an untrained SAE starts with all norms equal (in the unit of normalised activations). "
        "The dip test's p-value is small when one mode does not do; the paper has no test. What it cannot show: what "
        "a small norm means, since it can be traded for a larger activation."
    ),
    "encoder x decoder": (
        "The same features by the squared norm of encoder times decoder, which no trade between the two changes and "
        "which a saved TopK SAE still has. Where the TopK SAE, which has no other path, shows several modes too, "
        "these are no sign of features of an integrating kind."
    ),
}
TITLES = {
    "decoder": "Squared decoder norms, the published figure",
    "encoder x decoder": "The same with the scale of the encoder in it",
}
AXES = {"decoder": "squared decoder norm", "encoder x decoder": "squared norm, encoder times decoder"}
COLOURS = {AS_TRAINED: PALETTE[0], CANONICAL: PALETTE[2], TOPK: PALETTE[1], INITIAL: PALETTE[7]}
ROW = 96


def section(run: Run) -> Section | None:
    """Norms of the joint SAEs that a run has saved (`sae-nfm report` measures them); None without any."""
    blocks: list[Block] = []
    verdicts: list[str] = []
    for number, (folder, sae) in enumerate(_by_folder(run).items()):
        label = run.label(folder)
        blocks += [Heading(text=label), *(_figure(norms, number) for norms in sae.norms)]
        if sae.norms[0].not_canonical is not None:
            blocks.append(Prose(lines=[f"There is no canonical gauge here: {sae.norms[0].not_canonical}."]))
        verdicts += [f"{label}: {sentence}" for norms in sae.norms for sentence in norms.findings()]
    if not blocks:
        return None
    return Section(id="norms", title=TITLE, lead=LEAD, blocks=blocks, verdicts=verdicts)


def _by_folder(run: Run) -> dict[Path, SAENorms]:
    """Each SAE once: where a run and a folder inside have norms of the same one, the run's, which are newer."""
    found = sorted(run.of(NormsResult), key=lambda one: -len(one.path.parts))
    return {one.path.parent / sae.sae: sae for one in found for sae in one.result.saes}


def _figure(norms: SquaredNorms, number: int) -> Figure:
    rows = [
        (histogram.name, low, high, count)
        for histogram in norms.histograms
        for low, high, count in zip(norms.edges, norms.edges[1:], histogram.counts, strict=False)
    ]
    return Figure(
        name=f"{norms.measure.replace(' ', '-')}-{number}",
        title=TITLES[norms.measure],
        plot=norms_figure(norms),
        caption=CAPTIONS[norms.measure],
        data=pd.DataFrame(rows, columns=["sae", "from", "to", "features"]),
    )


def norms_figure(norms: SquaredNorms) -> go.Figure:
    """A histogram for each SAE, in rows that share the axis; dashed: the published means, where the measure is theirs."""
    rows = len(norms.histograms)
    figure = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=0.32 / rows)
    width = norms.edges[1] - norms.edges[0]
    centres = [edge + width / 2 for edge in norms.edges[:-1]]
    for row, histogram in enumerate(norms.histograms, start=1):
        name, dip, axis = histogram.name, histogram.dip, "" if row == 1 else row
        bar = go.Bar(
            x=centres,
            y=histogram.counts,
            width=width,
            marker={"color": COLOURS[name], "line": {"width": 0}},
            name=name,
            hovertemplate=f"{name}: %{{y:,}} features around %{{x:.3g}}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(bar, row=row, col=1)
        mean = f"{histogram.mean:.3g}"
        told = f"all {mean}" if dip is None else f"mean {mean}, dip test {p_words(dip.p_value)}"
        place = {"xref": f"x{axis} domain", "yref": f"y{axis} domain", "yanchor": "bottom", "xanchor": "left"}
        figure.add_annotation(text=f"<b>{name}</b> &nbsp;{told}", x=0, y=1, showarrow=False, **place)
    if norms.measure == "decoder":
        for mean in PUBLISHED_MEANS:
            figure.add_vline(x=mean, line={"dash": "dash", "width": 1.2, "color": AXIS})
    styled(figure, height=110 + ROW * rows)
    figure.update_layout(bargap=0, margin={"t": 36})
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, rangemode="tozero")
    figure.update_xaxes(range=[0, norms.edges[-1]])
    figure.update_xaxes(title=AXES[norms.measure], row=rows, col=1)
    return figure
