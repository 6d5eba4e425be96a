"""Squared norms: histograms by hand, their gauge, and the section that shows them; shares as published and controlled."""

import numpy as np
import pytest
import torch
from builders import inference_sae, training_config
from report_inputs import RUN, estimate, figures_by_name, traces
from report_runs import run_of
from sae_lens import TopKSAE, TopKSAEConfig

from sae_nfm.analysis.results import AS_TRAINED, CANONICAL, INITIAL, TOPK, NormsResult, Statistic
from sae_nfm.analysis.weight_norms import squared_norms
from sae_nfm.cli.jobs import write_report
from sae_nfm.experiments.reproduce.results import ReproduceResult, Section, reproduced_row
from sae_nfm.report.blocks import Heading
from sae_nfm.report.chapters import norms as norms_chapter
from sae_nfm.report.chapters import shares as shares_chapter
from sae_nfm.report.chapters.shares import CHANCE, CONTROL, HERE, PUBLISHED, dots
from sae_nfm.report.command import ReportConfig
from sae_nfm.report.page import section_html
from sae_nfm.report.plots import dot_data
from sae_nfm.report.run_folder import read_run


def joint(**overrides):
    return inference_sae(
        training_config("joint_nfm", **({"nfm_top_k": None, "rescale_acts_by_decoder_norm": False} | overrides))
    )


def named(norms):
    return {histogram.name: histogram for histogram in norms.histograms}


def topk_sae():
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4, rescale_acts_by_decoder_norm=True))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def test_histograms_by_hand():
    sae, topk = joint(), topk_sae()
    decoder, product = squared_norms(sae, topk=topk, seed=0, bins=7)
    assert list(named(decoder)) == [AS_TRAINED, CANONICAL, TOPK, INITIAL]
    wide = {
        AS_TRAINED: sae.W_dec.detach().square().sum(-1),
        CANONICAL: (sae.W_dec + sae.W_lin).detach().square().sum(-1),
        TOPK: topk.W_dec.detach().square().sum(-1),
    }
    edges = np.linspace(0, float(max(values.max() for values in wide.values())), 8)
    assert decoder.edges == pytest.approx(edges, rel=1e-6)  # float32 sums
    for name, values in wide.items():
        assert list(named(decoder)[name].counts) == np.histogram(values.double().numpy(), decoder.edges)[0].tolist()
        assert sum(named(decoder)[name].counts) == 32
        encoder = (topk if name == TOPK else sae).W_enc.detach().square().sum(0)
        assert named(product)[name].mean == pytest.approx(float((encoder * values).mean()), rel=1e-5)


def test_the_gauge_changes_what_is_trained_and_not_the_canonical_histogram():
    sae, moved = joint(), joint()
    shift = 0.3 * torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sae.W_lin += 3 * sae.W_dec  # so that the canonical norms are the largest, and the bins theirs
        moved.W_lin += 3 * moved.W_dec
        moved.W_dec += shift
        moved.W_lin -= shift
    for one, other in zip(*(squared_norms(each, topk=None, seed=0) for each in (sae, moved)), strict=True):
        assert named(other)[CANONICAL].counts == named(one)[CANONICAL].counts
        assert named(other)[CANONICAL].mean == pytest.approx(named(one)[CANONICAL].mean, rel=1e-5)  # float32 sums
        assert named(other)[AS_TRAINED].counts != named(one)[AS_TRAINED].counts


def test_the_product_does_not_see_how_encoder_and_decoder_share_the_scale():
    sae, scaled = joint(), joint()
    with torch.no_grad():
        scaled.W_dec *= 3
        scaled.W_enc /= 3
    (decoder, product), (other_decoder, other_product) = (
        squared_norms(one, topk=None, seed=0) for one in (sae, scaled)
    )
    assert named(other_decoder)[AS_TRAINED].mean == pytest.approx(9 * named(decoder)[AS_TRAINED].mean, rel=1e-5)
    assert named(other_product)[AS_TRAINED].mean == pytest.approx(named(product)[AS_TRAINED].mean, rel=1e-5)


def test_without_an_exact_gauge_that_is_said():
    decoder, _ = squared_norms(joint(nfm_top_k=3), topk=None, seed=0)
    assert CANONICAL not in named(decoder)
    assert decoder.not_canonical is not None
    assert decoder.not_canonical.startswith("nfm_top_k is 3")


def test_norms_that_are_all_one_are_not_tested():
    topk = topk_sae()
    topk.fold_W_dec_norm()
    decoder, product = squared_norms(joint(), topk=topk, seed=0)
    assert named(decoder)[TOPK].dip is None
    assert named(product)[TOPK].dip is not None
    assert "Squared norm, decoder, TopK SAE: all features have one, 1." in decoder.findings()


def saved(folder, *saes):
    for number, sae in enumerate(saes):
        sae.save_model(folder / "saes" / str(number))
    return write_report(ReportConfig(run=str(folder)))


def test_the_section_draws_the_histograms_of_the_saved_saes(tmp_path):
    written = saved(tmp_path, joint(), topk_sae())
    assert norms_chapter.TITLE in written.sections
    section = norms_chapter.section(read_run(tmp_path))
    assert section is not None
    drawn = figures_by_name(section)["decoder-0"]
    expected, _ = squared_norms(joint(), topk=topk_sae(), seed=0)
    for histogram in expected.histograms:
        assert tuple(traces(drawn)[histogram.name].y) == histogram.counts
    assert drawn.data["features"].sum() == 32 * len(expected.histograms)
    write_report(ReportConfig(run=str(tmp_path)))
    again = norms_chapter.section(read_run(tmp_path))
    assert again is not None
    assert section_html(again) == section_html(section)


def test_each_sae_is_drawn_once(tmp_path):
    saved(tmp_path / "demo", joint())
    write_report(ReportConfig(run=str(tmp_path)))
    run = read_run(tmp_path)
    assert len(run.of(NormsResult)) == 2
    section = norms_chapter.section(run)
    assert section is not None
    assert [block.text for block in section.blocks if isinstance(block, Heading)] == ["demo/saes/0"]


def test_without_a_joint_sae_there_are_no_norms(tmp_path):
    assert norms_chapter.TITLE not in saved(tmp_path, topk_sae()).sections
    assert not (tmp_path / "norms.json").exists()


def row(statistic, here, controlled, control, section=Section.PATHS, **more):
    name = statistic.of("linear")
    return reproduced_row(section, name, here, controlled, control, statistic=statistic, path="linear", **more)


SHARES = ReproduceResult(
    rows=(
        row(Statistic.WRITTEN, estimate(0.86), estimate(0.99), "energy about the mean"),
        row(Statistic.WRITTEN, estimate(0.86), None, "canonical gauge: none"),
        row(Statistic.CORRELATION, 0.36, -0.52, "rows permuted", section=Section.NORMS, p_value=0.001),
    ),
    provenance={},
)


def test_published_and_controlled_stand_in_one_figure():
    drawn = figures_by_name(shares_chapter.section(run_of(RUN, SHARES)))
    assert {name: list(trace.x) for name, trace in traces(drawn["written-0"]).items()} == {
        PUBLISHED: [0.94],
        HERE: [0.86],
        CONTROL: [0.99],
    }
    here = traces(drawn["written-0"])[HERE]
    assert list(here.error_x.array) == pytest.approx([0.1], rel=1e-12)
    assert {name: list(trace.x) for name, trace in traces(drawn["correlations-0"]).items()} == {
        PUBLISHED: [-0.867],
        HERE: [0.36],
        CHANCE: [-0.52],
    }


def test_a_control_that_is_not_there_is_left_out():
    assert [dot.label for dot in dots(SHARES.rows[:2])] == [PUBLISHED, HERE, "energy about the mean"]
    assert dot_data(dots(SHARES.rows[:2]))["value"].tolist() == [0.94, 0.86, 0.99]


def test_correlations_are_said_beside_chance():
    section = shares_chapter.section(run_of(RUN, SHARES))
    assert section is not None
    assert section.verdicts == [
        "Squared norm and linear share correlate at +0.360 (published -0.867); unrelated rows at -0.520 (p = 0.001)."
    ]
    assert shares_chapter.section(run_of(RUN)) is None
