"""The demo end to end, small, on the embedded model: a comparison of one seed; and what it refuses."""

import base64
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from sae_lens import SAE

from sae_nfm import demo
from sae_nfm.comparison.config import DemoConfig
from sae_nfm.comparison.results import CompareResult, RowKind, changes
from sae_nfm.comparison.run import Prepared, compare_once
from sae_nfm.comparison.table import ablations, in_canonical_gauge
from sae_nfm.data import datasets
from sae_nfm.explorer import Explorer
from sae_nfm.training.results import read_training_record
from sae_nfm_cli import main

TINY = {
    "training_tokens": 1024, "held_out_tokens": 256, "context_size": 32, "d_sae": 96, "k": 8, "nfm_dim": 4,
    "batch_size": 128,
}  # fmt: skip
SAES = ("joint_nfm", "staged_topk", "topk", "topk matched")
TINY_FLAGS = [text for name, value in TINY.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    cfg = DemoConfig(**TINY, output=str(output))
    state = torch.get_rng_state()
    result = compare_once(cfg, command="a command")
    assert torch.equal(torch.get_rng_state(), state), "the run must scope its random state"
    return cfg, output, result


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """The output folders of one command given twice, on a text file, and what was printed the first time."""
    folder = tmp_path_factory.mktemp("commanded")
    text, printed = folder / "text.jsonl", io.StringIO()
    words = demo.load_model().to_string(torch.tensor(demo.load_tokens("train")[:60]["tokens"])[:, 1:])
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    arguments = ["demo", *TINY_FLAGS, "--nfm-top-fraction", "1", "--dataset", str(text), "--held-out", str(text)]
    with redirect_stdout(printed):
        assert main([*arguments, "--output", str(folder / "first")]) == 0
    torch.rand(3)  # whatever the caller did before must not matter
    with redirect_stdout(io.StringIO()):
        assert main([*arguments, "--output", str(folder / "again")]) == 0
    return folder / "first", folder / "again", printed.getvalue()


def test_rows_are_the_saes_and_every_combination_of_paths(finished):
    _, _, result = finished
    assert [row.arm for row in result.rows] == [
        "joint_nfm",
        "joint_nfm: direct only",
        "joint_nfm: direct + linear",
        "joint_nfm: direct + nonlinear",
        "joint_nfm refined",
        *(name for arm in ("staged_topk", "topk", "topk matched") for name in (arm, f"{arm} refined")),
    ]
    for row in result.rows:
        assert 0 < row.l0 <= 8
        assert 0 < row.fvu < 1.5
        assert row.kl_nats > 0
        assert (row.training_tokens_per_second is not None) == (row.kind is RowKind.TRAINED)


def test_parameters_are_counted_and_matched(finished):
    _, output, result = finished
    for name in SAES:
        sae = SAE.load_from_disk(output / "saes" / name)
        assert result.row(name).parameters == sum(p.numel() for p in sae.parameters())
    largest = result.row("joint_nfm").parameters
    assert result.row("staged_topk").parameters == result.row("topk").parameters
    # one feature of a TopK SAE has 2 d_in + 1 numbers: matching can miss by half of that
    assert abs(result.row("topk matched").parameters - largest) <= (2 * 256 + 1) / 2
    assert result.row("topk").parameters < largest


def test_what_is_compared_with_what(finished):
    """The one in stages, refined, with every TopK SAE as it is and refined; joint_nfm with those of the same inference."""
    _, _, result = finished
    expected = [("joint_nfm", "ablation", "joint_nfm: direct only")]
    expected += [("joint_nfm", "fair", other) for other in ("topk", "topk matched")]
    expected += [("joint_nfm refined", "paths", other) for other in ("topk refined", "topk matched refined")]
    topk = ["topk", "topk refined", "topk matched", "topk matched refined"]
    expected += [("staged_topk refined", "inference", other) for other in topk]
    assert [(change.arm, change.kind, change.against) for change in result.changes] == expected
    row, other = result.row("staged_topk refined"), result.row("topk refined")
    change = next(c for c in result.changes if (c.arm, c.against) == (row.arm, other.arm))
    assert change.kl_change == pytest.approx(row.kl_nats / other.kl_nats - 1)
    assert change.parameter_ratio == 1


def test_a_joint_sae_in_stages_is_compared_with_topk_and_with_the_same_inference(finished):
    rows = finished[2].rows
    staged = {name: replace(row, arm=row.arm.replace("joint_nfm", "joint_nfm staged"), family="joint_nfm staged")
              for name, row in {row.arm: row for row in rows if row.family == "joint_nfm"}.items()}  # fmt: skip
    found = changes([*rows, *staged.values()])
    assert [(c.kind, c.against) for c in found if c.arm == "joint_nfm staged"] == [
        ("ablation", "joint_nfm staged: direct only")
    ]
    assert [(c.kind, c.against) for c in found if c.arm == "joint_nfm staged refined"] == [
        ("paths", "staged_topk refined"),
        *(("inference", name) for name in ("topk", "topk refined", "topk matched", "topk matched refined")),
    ]


def test_in_one_stage_and_as_they_are_where_nothing_is_refined(finished, tmp_path):
    cfg = replace(finished[0], refinement_steps=0, selection_stages=9, output=str(tmp_path / "other"))
    assert cfg.comparison().selection_stages == cfg.k  # one feature a stage at least
    prepared = Prepared.of(replace(cfg, held_out_tokens=cfg.context_size).comparison())
    found = compare_once(replace(cfg, held_out_tokens=cfg.context_size), prepared=prepared)
    assert not [row.arm for row in found.rows if row.refinement_steps]
    assert {(c.arm, c.against) for c in found.changes if c.kind == "inference"} == {
        ("staged_topk", other) for other in ("topk", "topk matched")
    }


def test_rescaling_is_as_sweeps_chose_it(finished):
    _, output, result = finished
    for name in SAES:
        cfg = SAE.load_from_disk(output / "saes" / name).cfg
        assert result.row(name).rescaling == ("staged" not in name), name
        assert getattr(cfg, "selection_stages", 1) == (8 if "staged" in name else 1), name
    assert "off for SAEs in stages, on for the others" in result.words()


def test_all_saes_see_the_same_stream(finished):
    cfg, output, _ = finished
    record = read_training_record(output / "training.jsonl")
    by_sae = {line["sae"] for line in record}
    assert by_sae == set(SAES)
    last = [line for line in record if line["tokens"] == cfg.training_tokens]
    assert {line["sae"] for line in last} == by_sae
    assert "metrics/fvu_direct" in next(line for line in record if line["sae"] == "joint_nfm")


def test_the_seed_orders_the_training_file_and_leaves_the_held_out_one(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    source = str(tmp_path / "text.jsonl")
    (train_0, held_0), (train_1, held_1) = (datasets.load_splits(source, source, "any", seed) for seed in (0, 1))
    assert train_0["text"] != train_1["text"]
    assert sorted(train_0["text"]) == sorted(train_1["text"])
    assert list(held_0["text"]) == list(held_1["text"])


def test_one_seed_gives_one_table(commanded):
    one, other = (CompareResult.load(folder / "results.json").table() for folder in commanded[:2])
    assert one == other


def test_another_seed_gives_other_saes(finished, tmp_path):
    cfg, output, _ = finished
    other = replace(cfg, output=str(tmp_path / "other"), seed=1, held_out_tokens=cfg.context_size)
    compare_once(other)
    for name in SAES:
        one, other = (SAE.load_from_disk(folder / "saes" / name) for folder in (output, tmp_path / "other"))
        assert not torch.equal(one.W_enc, other.W_enc), name


def test_results_file_says_how_to_repeat_it(finished):
    cfg, output, result = finished
    loaded = CompareResult.load(output / "results.json")
    assert loaded == result
    provenance = json.loads((output / "results.json").read_text())["provenance"]
    assert provenance["seeds"] == [cfg.seed]
    assert provenance["command"] == "a command"
    assert provenance["config"]["d_sae"] == 96
    assert provenance["versions"]["sae-lens"]
    assert not list(output.rglob("*.partial"))


def test_a_second_run_takes_the_place_of_the_first_which_is_kept(finished, tmp_path):
    cfg, output, _ = finished
    copytree(output, tmp_path / "run")
    left = tmp_path / "run.partial" / "saes" / "topk"  # of a run with other settings that was interrupted
    left.mkdir(parents=True)
    smaller = replace(cfg, output=str(tmp_path / "run"), d_sae=64, held_out_tokens=cfg.context_size)
    compare_once(smaller)
    assert SAE.load_from_disk(tmp_path / "run" / "saes" / "topk").cfg.d_sae == 64
    assert SAE.load_from_disk(tmp_path / "run.1" / "saes" / "topk").cfg.d_sae == cfg.d_sae
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.1.partial"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "digests.json",
        "results.json",
        "saes",
        "training.jsonl",
    ]


def test_the_canonical_gauge_row_exists_where_all_features_are_read():
    prepared = Prepared.of(DemoConfig(**TINY, nfm_top_fraction=1).comparison())
    arms = {name: arm.sae for name, arm in prepared.arms(8, 1024).items()}
    assert arms["joint_nfm"].nfm_top_k is None
    joint, staged, topk = (
        SAE.from_dict(arms[name].get_inference_sae_cfg_dict()) for name in ("joint_nfm", "staged_topk", "topk")
    )
    canonical = in_canonical_gauge(joint)
    assert canonical is not None
    assert canonical is not joint
    assert in_canonical_gauge(staged) is None
    assert in_canonical_gauge(topk) is None
    assert ablations(topk) == {}


def test_the_data_are_in_their_own_order_and_the_settings_those_of_compare():
    cfg = DemoConfig(**TINY, seed=3, nfm_top_fraction=0.25)
    prepared = Prepared.of(cfg.comparison())
    assert prepared.training(3, 1024)["dataset"][0]["tokens"] == demo.load_tokens("train")[0]["tokens"]
    joint = prepared.arms(8, 1024)["joint_nfm"].sae
    assert (joint.nfm_top_k, joint.d_sae, prepared.cfg.seeds, prepared.cfg.sweeps) == (2, 96, (3,), False)


def test_command_line_on_a_text_file_prints_the_table_and_both_figures(commanded):
    output, _, printed = commanded
    assert "joint_nfm: direct only, canonical gauge" in printed
    assert printed.count("The paper's comparison") == 1
    assert printed.count("The fair comparison") == 1
    assert printed.count("What inference gains") == 1
    assert printed.count("What the NFM's paths gain") == 1
    assert "One seed (0)" in printed
    assert "no evidence about real text" not in printed
    files = ["digests.json", "explorer.json.gz", "norms.json", "report.html", "results.json", "saes", "training.jsonl"]
    assert sorted(path.name for path in output.iterdir()) == files


def test_one_seed_gives_one_page(commanded):
    output, other, _ = commanded
    first, again = (data_of(folder / "report.html") for folder in (output, other))
    assert first == again
    assert any(name.startswith("fidelity-") for name in first)
    assert any(name.startswith("training-") for name in first)
    page = (output / "report.html").read_text()
    assert "joint_nfm, the fair comparison: against topk" in page
    assert "staged_topk refined, the gain from inference: against topk" in page
    assert "joint_nfm refined, the gain from NFM paths: against topk refined" in page
    assert base64.b64decode(first["explorer-data"]) == (output / "explorer.json.gz").read_bytes()
    explorer = Explorer.load(output)
    assert explorer.sampled == ""  # a text file was given
    assert explorer.provenance["config"]["held_out"]
    own = replace(explorer, model_name="smollm2", provenance={"config": {"held_out": None}})
    assert "no evidence about real text" in own.sampled


def data_of(page: Path) -> dict[str, str]:
    """The data sections of a report."""
    return dict(
        re.findall(r'<script type="application/[^"]+" id="([^"]+)">(.*?)</script>', page.read_text(), re.DOTALL)
    )


def test_help_describes_every_option(capsys):
    assert main(["demo", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(DemoConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Features of each SAE but the matched ones." in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--hook", "blocks.2.hook_resid_pst"], ["'blocks.2.hook_resid_pst'", "hook_resid_"]),
        (["--hook", "blocks.0.attn.hook_pattern"], ["(1, 4, 2, 2)", "[batch, pos, d_in]"]),
        (["--k", "0"], ["k", "> 0", "got 0"]),
        (["--k", "99"], ["k must", "99", "d_sae = 96"]),
        (["--nfm-top-fraction", "0"], ["nfm_top_fraction", "(0, 1]", "got 0.0"]),
        (["--training-tokens", "100"], ["training_tokens", "128", "got 100"]),
        (["--dataset", "none.parquet"], ["--dataset", "'none.parquet'", "held-out"]),
        (["--held-out", "x.txt"], ["no --dataset"]),
        (["--dataset", "no.txt", "--held-out", "no.txt"], ["no.txt"]),
        (["--dataset", "EMPTY.txt", "--held-out", "EMPTY.txt"], ["EMPTY.txt", "no text"]),
        (["--model", "gpt2"], ["embedded", "--dataset", "--held-out"]),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(flags, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_nfm.comparison.run.load_model", lambda name, device: demo.load_model(device))
    (tmp_path / "EMPTY.txt").write_text("\n\n")
    status = main(["demo", *TINY_FLAGS, *flags, "--output", "run"])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("sae-nfm: ")
    assert [words for words in named if words not in error] == []
    assert not (tmp_path / "run").exists()


def test_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'no/such'.*hub"):
        datasets.load_splits("no/such", None, demo.MODEL_NAME)


def test_held_out_text_too_short(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    _, validation = datasets.load_splits(str(tmp_path / "short.txt"), str(tmp_path / "short.txt"), demo.MODEL_NAME)
    with pytest.raises(ValueError, match=r"\bone row of 64 tokens\b"):
        datasets.held_out_tokens(demo.load_model(), validation, 64, 1000)
