"""Files that 0.1.0 wrote: each is still read, and one page shows them all."""

from pathlib import Path

import pytest
from sae_lens import SAE

from sae_nfm.attribution.results import InteractionGraph
from sae_nfm.comparison.run import read_sweep
from sae_nfm.evaluation.token_table import read_manifest, read_rows
from sae_nfm.explorer.results import Explorer
from sae_nfm.interventions.results import SteeringComparison
from sae_nfm.report.chapters import ORDER, sections
from sae_nfm.report.page import render_run
from sae_nfm.report.run_folder import KINDS, Run, read_run
from sae_nfm.training.results import Trained, read_training_record

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"
NEW = {"norms", "recovery"}
"""The chapters whose files 0.1.0 did not write; that of behaviour says which command writes its own."""


@pytest.fixture(scope="module")
def run() -> Run:
    return read_run(GOLDEN)


def test_every_kind_is_recognised(run):
    kinds = {found.label: found.result.kind for found in run.results}
    assert kinds == {
        "attribute/corpus.json": "attribute/1",
        "attribute/prompt.json": "attribute/1",
        "compare": "compare/1",
        "demo": "compare/1",
        "dynamics": "dynamics/1",
        "evaluate/train.json": "evaluate/1",
        "factorial": "factorial/1",
        "reproduce": "reproduce/1",
        "secondary": "secondary/1",
        "speed/scan.json": "speed/1",
        "speed/speed.json": "speed/1",
    }
    assert set(kinds.values()) | {"measure/1", "norms/1", "fidelity/1", "recovery/1"} == set(KINDS)


def test_files_written_again_read_the_same(run, tmp_path):
    for number, found in enumerate(run.results):
        found.result.save(tmp_path / str(number) / "results.json")
    assert [found.result for found in read_run(tmp_path).results] == [
        found.result for found in sorted(run.results, key=lambda one: str(run.results.index(one)))
    ]


def test_one_page_shows_them_all(run):
    present, missing, shown = sections(run)
    assert shown.left_out == ()
    assert {chapter.__name__.rpartition(".")[2] for chapter in missing} <= NEW
    assert len(present) + len(missing) == len(ORDER)
    html = render_run(run)
    for text in ("measure is left out", "sae-nfm reproduce --output RUN/reproduce"):
        assert text in html


def test_the_files_that_no_chapter_draws():
    assert len(InteractionGraph.load(GOLDEN / "attribute" / "pairs.json").edges) == 20
    assert SteeringComparison.load(GOLDEN / "steering" / "steering.json").pair == (9, 11)
    assert len(read_sweep(GOLDEN / "compare" / "k8" / "sweep.json")) == 8
    assert Trained.load(GOLDEN / "compare" / "k8" / "seed-0" / "joint_nfm").arm == "joint_nfm"
    assert {line["sae"] for line in read_training_record(GOLDEN / "train" / "training.jsonl")} == {"sae"}
    assert len(Explorer.load(GOLDEN / "explore").vocab) > 0
    assert len(read_rows(GOLDEN / "measure", ["arm", "kl_nats"], ["sae"]))
    assert "sae" in read_manifest(GOLDEN / "measure").arms
    assert SAE.load_from_disk(GOLDEN / "train").cfg.architecture() == "joint_nfm"
