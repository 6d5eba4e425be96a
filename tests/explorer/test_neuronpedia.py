"""Lines of an export against the invented explorer's tokens and activations, by hand and by loops."""

import gzip
import json

import invented_explorer as invented
import pytest

from sae_nfm.explorer.neuronpedia import ExportConfig, export
from sae_nfm.explorer.results import FILENAME


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILENAME).write_bytes(invented.packed(invented.content()))
    return tmp_path


def lines_of(path) -> list:
    text = gzip.decompress(path.read_bytes()).decode() if path.name.endswith(".gz") else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_each_feature_that_fired(folder):
    result = export(ExportConfig(explorer=str(folder), output=str(folder / "f.jsonl")))
    lines = lines_of(folder / "f.jsonl")
    assert [line["index"] for line in lines] == [str(feature) for feature in sorted(invented.FIRINGS)]
    assert (result.features, result.pairs_file) == (6, None)
    assert result.contexts == sum(len(line["activations"]) for line in lines)
    assert result.words() == f"{folder / 'f.jsonl'}: 6 features with {result.contexts} contexts"
    for line in lines:
        fired = invented.FIRINGS[int(line["index"])]
        assert (line["modelId"], line["layer"]) == ("invented", "blocks.0.hook_resid_post")
        assert line["maxActApprox"] == max(fired.values())
        assert line["frac_nonzero"] == len(fired) / invented.TOKENS
        assert (line["pos_str"], line["pos_values"]) == ([" good", " bad"], [0.5, 0.125])
        assert (line["neg_str"], line["neg_values"]) == ([" never", "\n"], [-0.75, -0.25])
        assert sum(line["freq_hist_data_bar_heights"]) == len(fired)
        assert len(line["freq_hist_data_bar_heights"]) == len(line["freq_hist_data_bar_values"]) == invented.BINS
        # middles of 20 bins of (0, max]
        middles = [max(fired.values()) * (b + 0.5) / 20 for b in range(20)]
        assert line["freq_hist_data_bar_values"] == pytest.approx(middles, rel=1e-3)  # four digits


def test_contexts_have_every_token_of_their_window_with_its_activation(folder):
    export(ExportConfig(explorer=str(folder), output=str(folder / "f.jsonl")))
    for line in lines_of(folder / "f.jsonl"):
        fired = invented.FIRINGS[int(line["index"])]
        largest, places = max(fired.values()), sorted(fired, key=fired.__getitem__, reverse=True)
        spread = places[::4]
        for one, place in zip(line["activations"], [*places, *spread], strict=True):
            window = invented.window(place)
            assert one["tokens"] == [invented.POSITIONS[at] for at in window]
            # in 255ths of the largest, at least one
            expected = [fired.get(at, 0.0) for at in window]
            assert one["values"] == pytest.approx(expected, abs=largest / 255)
            assert window[one["qualifyingTokenIndex"]] == place
            assert one["maxValue"] == max(one["values"]) == one["values"][one["maxValueTokenIndex"]]
            assert one["minValue"] == min(one["values"])
        limits = [(one["binMin"], one["binMax"], one["binContains"]) for one in line["activations"]]
        assert limits == [(-1, largest, -1)] * len(places) + [(None, None, 1 / len(spread))] * len(spread)


def test_pairs_go_to_a_file_of_their_own(folder):
    config = ExportConfig(
        explorer=str(folder / FILENAME), output=str(folder / "f.jsonl.gz"), pairs=True, model_id="m", source_id="2-res"
    )
    result = export(config)
    lines = lines_of(folder / "f.pairs.jsonl.gz")
    assert (result.pairs, result.pairs_file) == (3, str(folder / "f.pairs.jsonl.gz"))
    assert result.words().endswith(f"{folder / 'f.pairs.jsonl.gz'}: 3 pairs")
    assert [tuple(line["pair"]) for line in lines] == list(invented.PAIRS)
    for line in lines:
        pair = line["pair"][0], line["pair"][1]
        norms = invented.PAIRS[pair]
        assert (line["modelId"], line["layer"], line["tokens"]) == ("m", "2-res", len(norms))
        assert (line["share"], line["max_norm"]) == (invented.SHARES[pair], max(norms.values()))
        assert line["norm"] == pytest.approx(sum(norms.values()) / len(norms))
        for one, place in zip(line["activations"], sorted(norms, key=norms.__getitem__, reverse=True), strict=True):
            assert one["norm"] == norms[place]
            assert one["tokens"][one["qualifyingTokenIndex"]] == invented.POSITIONS[place]
            assert one["tokens"] == [invented.POSITIONS[at] for at in invented.window(place)]
    assert [line["pos_str"] for line in lines] == [[" good", " bad"], [], []]


def test_two_exports_give_the_same_bytes(folder):
    for name in ("a", "b"):
        export(ExportConfig(explorer=str(folder), output=str(folder / f"{name}.jsonl.gz")))
    assert (folder / "a.jsonl.gz").read_bytes() == (folder / "b.jsonl.gz").read_bytes()


def test_what_cannot_be_exported_is_said(folder):
    with pytest.raises(ValueError, match=r"\boutput\b.*'f\.json'.*\.jsonl\b.*\.jsonl\.gz"):
        ExportConfig(explorer=str(folder), output="f.json")
    with pytest.raises(FileNotFoundError, match=r"\bnowhere\b.*explorer\.json\.gz"):
        export(ExportConfig(explorer="nowhere", output=str(folder / "f.jsonl")))
    content = invented.content() | {"architecture": "topk", "logit_count": 0}
    content["pairs"] = {name: [0] if name == "context_starts" else [] for name in content["pairs"]}
    content["pair_contexts"] = {"position": [], "norm": []}
    content["pair_logits"] = {"starts": [0], "token": [], "value": []}
    content["logits"] = {"starts": [0] * 9, "token": [], "value": []}
    (folder / FILENAME).write_bytes(invented.packed(content))
    with pytest.raises(ValueError, match=r"runs/invented.*\btopk\b.*--pairs\b"):
        export(ExportConfig(explorer=str(folder), output=str(folder / "f.jsonl"), pairs=True))
    assert not (folder / "f.jsonl").exists()
    words = export(ExportConfig(explorer=str(folder), output=str(folder / "f.jsonl"))).words()
    assert words.endswith("the explorer has no logits, so that pos_str and neg_str are empty")
