"""The chapter on behaviour: means of a measurement by arm, in their roles, with ratios of errors."""

import json
import math

import numpy as np
import pytest
from report_runs import figures, labels, marks, plots, run_of

from sae_nfm.evaluation.error_controls import error_ratios, kl_by_arm, summarise
from sae_nfm.evaluation.token_table import VALUES, Activations, Manifest, begin, table, write_part
from sae_nfm.interventions.results import ArmRole, Role
from sae_nfm.report.blocks import Heading, Prose
from sae_nfm.report.chapters.behaviour import section
from sae_nfm.report.run_folder import read_run

MEANS = {
    "sae": 0.2, "isotropic": 0.1, "covariance": 0.4, "flipped error": 0.3, "error x 0": 0.0, "error x 0.5": 0.05,
    "error x 2": 0.9, "none": 0.0, "zero": 5.0, "direct only": 0.8, "direct only, means kept": 0.7, "topk": 0.25,
    "sequential": 0.15, "sequential: direct only": 0.25, "sequential: isotropic": 0.1,
}  # fmt: skip
ROLES = {
    "sae": ArmRole(role=Role.SAE, of="sae", name="sae", scale=1.0),
    "isotropic": ArmRole(role=Role.CONTROL, of="sae", name="isotropic"),
    "covariance": ArmRole(role=Role.CONTROL, of="sae", name="covariance"),
    "flipped error": ArmRole(role=Role.CONTROL, of="sae", name="flipped error", scale=-1.0),
    "error x 0": ArmRole(role=Role.SCALED, of="sae", name="error x 0", scale=0.0),
    "error x 0.5": ArmRole(role=Role.SCALED, of="sae", name="error x 0.5", scale=0.5),
    "error x 2": ArmRole(role=Role.SCALED, of="sae", name="error x 2", scale=2.0),
    "none": ArmRole(role=Role.ANCHOR, of="sae", name="none"),
    "zero": ArmRole(role=Role.ANCHOR, of="sae", name="zero"),
    "direct only": ArmRole(role=Role.PART, of="sae", name="direct only"),
    "direct only, means kept": ArmRole(role=Role.PART, of="sae", name="direct only, means kept"),
    "sequential": ArmRole(role=Role.SAE, of="sequential", name="sequential", scale=1.0),
    "sequential: direct only": ArmRole(role=Role.PART, of="sequential", name="direct only"),
    "sequential: isotropic": ArmRole(role=Role.CONTROL, of="sequential", name="isotropic"),
}


def measured(folder, means=MEANS, parts=1):
    """Two documents of two tokens: KL a tenth below the mean in one and a tenth above it in the other."""
    names = list(means)
    same = {name: "x" for name in names}
    begin(folder, Manifest(model="m", tokens="t", documents="d", arms=same, hook_names=same, seed=0, batch_rows=1,
                           batches_per_part=1, parts=parts))  # fmt: skip
    places = {"document": np.array([0, 0, 1, 1]), "row": np.arange(4), "position": np.arange(4)}
    spread = np.array([0.9, 0.9, 1.1, 1.1])
    tables = [
        table(name, names, places | dict.fromkeys(VALUES, np.ones(4)) | {"kl_nats": spread * mean})
        for name, mean in means.items()
    ]
    write_part(folder, 0, tables, {"x": Activations.of(places["document"], np.ones((4, 2)))})
    if parts == 1:
        summarise(folder, {name: ROLES.get(name, ArmRole()) for name in means})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("run") / "rows")


@pytest.fixture(scope="module")
def by_arm(folder):
    return kl_by_arm(folder, {name: ROLES.get(name, ArmRole()) for name in MEANS})


@pytest.fixture(scope="module")
def there(folder):
    return section(read_run(folder.parent))


def test_nothing_without_a_measurement_beside_controls(tmp_path):
    assert section(run_of(tmp_path)) is None
    folder = measured(tmp_path / "rows", {"primary as it is": 0.1, "hidden code: zero": 0.2})
    assert not (folder / "summary.json").exists()
    assert section(read_run(tmp_path)) is None


def test_arms_have_their_roles(by_arm):
    for arm in by_arm.arms:
        if arm.arm == "topk":
            assert (arm.of, arm.name, arm.role, arm.scale) == ("topk", "topk", Role.OTHER, None)
        else:
            assert ArmRole(role=arm.role, of=arm.of, name=arm.name, scale=arm.scale) == ROLES[arm.arm]


def test_means_and_intervals_by_hand(by_arm):
    sae = by_arm.arms[0].kl
    assert (sae.n, sae.n_clusters) == (4, 2)
    assert sae.estimate == pytest.approx(0.2, abs=1e-7)  # the rows are float32
    # document means 0.18 and 0.22: jackknife error 0.02, one degree of freedom
    assert sae.high - sae.estimate == pytest.approx(0.02 * 12.7062047, abs=1e-6)


def test_ratios_are_those_of_error_ratios(folder, by_arm):
    ratios = by_arm.ratios
    assert {sae: list(own) for sae, own in ratios.items()} == {
        "sae": ["isotropic", "covariance", "flipped error"], "sequential": ["isotropic"],
    }  # fmt: skip
    assert ratios["sae"] == error_ratios(folder, controls=("isotropic", "covariance", "flipped error"))
    assert ratios["sequential"]["isotropic"].estimate == pytest.approx(1.5, abs=1e-6)


def test_every_arm_is_a_mark_under_its_role(there):
    arms, scales, ratios, sequential, _ = figures(there)
    assert labels(arms.plot) == [
        "Whole", "all paths", "Its parts", "direct only", "direct only, means kept", "Controls at its distance", "isotropic",
        "covariance", "flipped error", "Other SAEs", "topk", "Ablations of the hook point", "zero",
    ]  # fmt: skip  # "none" moves nothing: not on a logarithmic axis
    shown = {(row, group): x for row, group, x, *_ in marks(arms)}
    assert shown == pytest.approx(
        {
            ("all paths", "the SAE"): 0.2,
            ("direct only", "with paths ablated"): 0.8,
            ("direct only, means kept", "with paths ablated"): 0.7,
            ("isotropic", "control"): 0.1,
            ("covariance", "control"): 0.4,
            ("flipped error", "control"): 0.3,
            ("topk", "another SAE"): 0.25,
            ("zero", "everything removed"): 5.0,
        },
        abs=1e-6,
    )
    assert [shape.x0 for shape in arms.plot.layout.shapes] == pytest.approx([0.2], abs=1e-6)
    assert sorted(arms.data["value"]) == pytest.approx(sorted(shown.values()), abs=1e-6)
    line = scales.plot.data[0]
    assert list(line.x) == [-1.0, 0.0, 0.5, 2.0]
    assert list(line.y) == pytest.approx([0.3, 0.0, 0.05, 0.9], abs=1e-6)
    assert {t.name: (t.x[0], round(t.y[0], 6)) for t in scales.plot.data[1:]} == {
        "isotropic": (1.0, 0.1), "covariance": (1.0, 0.4),
    }  # fmt: skip
    assert len(scales.data) == 6
    assert labels(sequential.plot)[:4] == ["Whole", "all paths", "Its parts", "direct only"]
    assert "topk" not in labels(sequential.plot)
    assert len(ratios.data) == 3 + 2


def test_published_ratios_stand_beside_isotropic_only(there):
    ratios = figures(there)[2]
    shown = {(row, group): x for row, group, x, *_ in marks(ratios)}
    first = "isotropic: a random direction"
    assert shown[first, "this SAE"] == pytest.approx(2.0, abs=1e-6)
    assert shown[first, "published: arXiv 2507.00269, not measured here"] == 2.99
    assert (first, "published: Gurnee 2024, range", 3.25, 2.0, 4.5) in marks(ratios)
    assert {row for row, group in shown if group.startswith("published")} == {first}


def test_verdicts_have_every_control(there):
    said = there.verdicts
    assert [line.partition(":")[0] for line in said] == [
        "KL of the SAE over that of a change of equal distance", "KL of sequential over that of a change of equal distance",
    ]  # fmt: skip
    assert [part.split(" ")[0] for part in said[0].partition(": ")[2].split("; ")] == ["2.00", "0.50", "0.67"]


def test_an_unfinished_measurement_is_named_and_left_out(tmp_path):
    measured(tmp_path / "a"), measured(tmp_path / "b", parts=2)
    there = section(read_run(tmp_path))
    assert next(block.text for block in there.blocks if isinstance(block, Heading)) == "a"
    (prose,) = [block for block in there.blocks if isinstance(block, Prose)]
    assert prose.lines[0].startswith("b is left out: ")
    assert "`sae-nfm reproduce" in prose.lines[0]


def test_the_same_twice_and_numbers_that_json_has(folder, there):
    assert plots(section(read_run(folder.parent))) == plots(there)
    for figure in figures(there):
        json.loads(figure.data.to_json(), parse_constant=lambda name: pytest.fail(name))
        assert not any(isinstance(v, float) and math.isinf(v) for v in figure.data.to_numpy().ravel())
