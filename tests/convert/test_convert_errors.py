"""What `convert` refuses: configs, statistics and options that do not fit; nothing is written."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_writers import convert_one, refused, rewrite, write_all, write_dictionary_learning
from safetensors.torch import save_file

from sae_nfm.convert.run import ConvertConfig, convert, detected


@pytest.mark.parametrize(
    ("form", "path", "change", "message"),
    [
        ("saelens", "cfg.json", {"k": 12}, r"\bk is 12 in '{path}'.*\b11\b"),
        ("saelens", "cfg.json", {"architecture": "abstopk"}, r"\babstopk\b.*\babsolute\b"),
        (
            "saelens",
            "cfg.json",
            {"architecture": "standard"},
            r"\bstandard\b.*\bno encoder of this kind\b.*\btopk or jumprelu\b",
        ),
        (
            "saelens",
            "cfg.json",
            {"normalize_activations": "expected_average_only_in"},
            r"'expected_average_only_in'.*\bactivation_scaler\.json\b",
        ),
        ("sparsify", "cfg.json", {"k": 12}, r"\bk is 12 in '{path}'.*\b11\b"),
        ("sparsify", "cfg.json", {"k": None}, r"\bk is None in '{path}'"),
        ("sparsify", "cfg.json", {"transcode": True}, r"\btranscode is on\b"),
        ("sparsify", "cfg.json", {"skip_connection": True}, r"\bskip_connection is on\b"),
        ("sparsify", "cfg.json", {"signed": True}, r"\bsigned is on\b"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, r"\bactivation is 'groupmax'.*'topk'"),
        ("sparsify", "cfg.json", {"jump": 1}, r"\bkey 'jump'"),
        ("dictionary_learning", "config.json", {"trainer": None}, r"\btrainer\b.*\bdict_class\b"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    tmp_path: Path, form: str, path: str, change: dict[str, Any], message: str
) -> None:
    write_all(tmp_path)
    rewrite(tmp_path / form / path, lambda config: config.update(change))
    with refused(message.format(path=re.escape(str(tmp_path / form / path)))):
        convert_one(tmp_path, form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"dict_class": "GatedAutoEncoder"},
            r"\bGatedAutoEncoder\b.*\bAutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE\b",
        ),
        ({"k": 12}, r"\bk is 12 in\b"),
        ({"k": 2}, r"\bk is 3 in\b"),
        ({"dict_size": 12}, r"'encoder\.weight' .*\(11, 5\).*\(12, 5\)"),
        ({"activation_dim": "5"}, r"\bactivation_dim is '5' in\b"),
    ],
)
def test_a_trainer_that_does_not_fit_is_an_error(tmp_path: Path, trainer: dict[str, Any], message: str) -> None:
    write_dictionary_learning(tmp_path / "dictionary_learning")
    rewrite(tmp_path / "dictionary_learning" / "config.json", lambda config: config["trainer"].update(trainer))
    with refused(message):
        convert_one(tmp_path, "dictionary_learning")


def test_batch_topk_needs_a_threshold(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "dictionary_learning", "BatchTopKSAE")
    path = tmp_path / "dictionary_learning" / "ae.pt"
    rewrite(path, lambda tensors: tensors.update(threshold=torch.tensor(-1.0)))
    with refused(r"\bthreshold\b.* is -1\.0"):
        convert_one(tmp_path, "dictionary_learning")
    rewrite(path, lambda tensors: tensors.pop("threshold"))
    with pytest.raises(ValueError, match="'threshold' is missing"):
        convert_one(tmp_path, "dictionary_learning")
    rewrite(path.with_name("config.json"), lambda config: config["buffer"].update(io="in_and_out"))
    with pytest.raises(ValueError, match=r"\btranscoder\b"):
        convert_one(tmp_path, "dictionary_learning")


def write_statistics_as(folder: Path, content: Any, name: str = "other.json") -> Path:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(content))
    elif name.endswith(".npz"):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"mean": [0.0] * 4, "std": [1.0] * 4}, "o.json", r"\bmean in '{path}' .*\(4,\).*\bd_in = 5\b"),
        ({"mean": [[0.0]] * 5, "std": [1.0] * 5}, "o.json", r"\bmean in '{path}' .*\(5, 1\).*\bd_in = 5\b"),
        ({"mean": [0.0] * 5, "std": [1.0, 0, -1, 1, 1]}, "o.json", r"\b2 of the 5\b.*\bin '{path}'.*\bpositive\b"),
        ({"mean": [float("nan")] * 5, "std": [1.0] * 5}, "o.json", r"\bmean in '{path}' .*not finite"),
        ({"mean": ["a"] * 5, "std": [1.0] * 5}, "o.json", r"\bmean in '{path}' .*numbers"),
        ({"mean": [0.0] * 5}, "o.json", r"'{path}' has mean\b.*\bmean and std\b"),
        (
            {"mean": np.array([{}] * 5), "std": np.ones(5)},
            "o.npz",
            r"'{path}'.*\bnumbers \(Object arrays\b",
        ),
        (b"nothing", "o.safetensors", "'{path}' is damaged"),
        (b"nothing", "o.pt", r"'{path}'.*\.safetensors, \.npz, \.json"),
    ],
)
def test_statistics_that_do_not_fit_are_an_error(tmp_path: Path, content: Any, name: str, message: str) -> None:
    write_all(tmp_path)
    path = write_statistics_as(tmp_path, content, name)
    with refused(message.format(path=re.escape(str(path)))):
        convert_one(tmp_path, "author", statistics=path)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("author", {"statistics": None}, r"\bstandardised\b.*--statistics\b"),
        ("author", {"k": 12}, r"\bk .*d_sae = 11\b.* 12\b"),
        ("author", {"nfm_top_k": 5}, r"nfm_top_k .*\bk = 4\b.* 5\b"),
        ("author", {"nfm_dim": 7, "seed": 1}, r"--nfm-dim, --seed\b.*\bauthor\b"),
        ("sparsify", {"k": 2, "nfm_top_k": 2}, r"--k, --nfm-top-k\b.*\bsparsify\b"),
        ("saelens", {"statistics": Path("s.json")}, r"--statistics\b.*\bsaelens\b"),
        ("saelens", {"nfm_dim": 0}, r"nfm_dim .* 0\b"),
        ("saelens", {"format": "author", "statistics": Path("s.json")}, r"'.*joint_sae_nfm_model\.pt'"),
        ("author", {"format": "sparsify", "statistics": None, "k": None, "nfm_top_k": None}, r"'.*cfg\.json'"),
        ("nowhere", {}, "'.*nowhere'"),
        ("", {}, r"author has joint_sae_nfm_model\.pt, saelens has sae_weights\.safetensors, "),
    ],
)
def test_options_that_do_not_fit_are_an_error(tmp_path: Path, form: str, options: dict[str, Any], message: str) -> None:
    write_all(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_one(tmp_path, form, **options)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_two_formats_and_an_output_of_other_things_are_errors(tmp_path: Path) -> None:
    write_all(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "author" / "sae.safetensors")
    with refused(r"\(author, sparsify\).*--format\b"):
        detected(tmp_path / "author")
    assert convert_one(tmp_path, "author", format="author").format == "author"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with refused(r"\(notes\.txt\).*folder"):
        convert(ConvertConfig(source=tmp_path / "sparsify", output=tmp_path / "other"))
    for name in ("cfg.json", "sae.safetensors"):
        (tmp_path / "sparsify" / name).rename(tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=r"\bno file\b"):
            convert(ConvertConfig(source=tmp_path / "sparsify", output=tmp_path / "new"))
        (tmp_path / name).rename(tmp_path / "sparsify" / name)
    assert not (tmp_path / "new").exists()
