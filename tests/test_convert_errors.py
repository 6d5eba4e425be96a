"""What `convert` refuses: configs, statistics and options that do not fit; nothing is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_nfm.convert import ConvertConfig, convert, detected
from tests.checkpoint_writers import convert_one, refused, rewrite, write_all, write_dictionary_learning


@pytest.mark.parametrize(
    ("form", "path", "change", "message"),
    [
        ("saelens", "cfg.json", {"k": 12}, "k is 12 in '{path}', more than the 11 features there are"),
        (
            "saelens",
            "cfg.json",
            {"architecture": "abstopk"},
            "is a abstopk SAE: its features are chosen by their absolute value",
        ),
        (
            "saelens",
            "cfg.json",
            {"architecture": "standard"},
            "is a standard SAE: it has no fixed number of active features",
        ),
        (
            "saelens",
            "cfg.json",
            {"normalize_activations": "expected_average_only_in"},
            "is for inputs normalised by 'expected_average_only_in', and activation_scaler.json with the statistics is not",
        ),
        ("sparsify", "cfg.json", {"k": 12}, "k is 12 in '{path}', more than the 11 features"),
        ("sparsify", "cfg.json", {"k": None}, "k is None in '{path}'; a positive whole number was expected"),
        ("sparsify", "cfg.json", {"transcode": True}, "transcode is on: it is a transcoder"),
        (
            "sparsify",
            "cfg.json",
            {"skip_connection": True},
            "skip_connection is on: a linear map of the input is added",
        ),
        ("sparsify", "cfg.json", {"signed": True}, "signed is on: its features can be negative"),
        (
            "sparsify",
            "cfg.json",
            {"activation": "groupmax"},
            "activation is 'groupmax', and only 'topk' has a counterpart",
        ),
        ("sparsify", "cfg.json", {"jump": 1}, "the key 'jump' is not known here"),
        ("dictionary_learning", "config.json", {"trainer": None}, "has no trainer with a dict_class"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    tmp_path: Path, form: str, path: str, change: dict[str, Any], message: str
) -> None:
    write_all(tmp_path)
    rewrite(tmp_path / form / path, lambda config: config.update(change))
    with refused(message.format(path=tmp_path / form / path)):
        convert_one(tmp_path, form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"dict_class": "GatedAutoEncoder"},
            "is of a GatedAutoEncoder; only AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE",
        ),
        ({"k": 12}, "k is 12 in"),
        ({"k": 2}, "k is 3 in"),
        ({"dict_size": 12}, "tensor 'encoder.weight' has shape (11, 5), the config makes it (12, 5)"),
        ({"activation_dim": "5"}, "activation_dim is '5' in"),
    ],
)
def test_a_trainer_that_does_not_fit_is_an_error(tmp_path: Path, trainer: dict[str, Any], message: str) -> None:
    write_dictionary_learning(tmp_path / "dictionary_learning")
    rewrite(tmp_path / "dictionary_learning" / "config.json", lambda config: config["trainer"].update(trainer))
    with refused(message):
        convert_one(tmp_path, "dictionary_learning")


def test_batch_topk_needs_a_threshold_and_stays_a_jumprelu(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "dictionary_learning", "BatchTopKSAE")
    with pytest.raises(
        ValueError, match="is a jumprelu SAE: it has no fixed number of active features; give a topk SAE"
    ):
        convert_one(tmp_path, "dictionary_learning", to="joint_nfm")
    path = tmp_path / "dictionary_learning" / "ae.pt"
    rewrite(path, lambda tensors: tensors.update(threshold=torch.tensor(-1.0)))
    with refused("is -1.0: training ended before it was estimated"):
        convert_one(tmp_path, "dictionary_learning")
    rewrite(path, lambda tensors: tensors.pop("threshold"))
    with pytest.raises(ValueError, match="tensor 'threshold' is missing"):
        convert_one(tmp_path, "dictionary_learning")
    rewrite(path.with_name("config.json"), lambda config: config["buffer"].update(io="in_and_out"))
    with pytest.raises(ValueError, match="is of a transcoder"):
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
        (
            {"mean": [0.0] * 4, "std": [1.0] * 4},
            "o.json",
            "mean in '{path}' has shape (4,), the checkpoint has d_in = 5; give",
        ),
        (
            {"mean": [[0.0]] * 5, "std": [1.0] * 5},
            "o.json",
            "mean in '{path}' has shape (5, 1), the checkpoint has d_in = 5",
        ),
        (
            {"mean": [0.0] * 5, "std": [1.0, 0, -1, 1, 1]},
            "o.json",
            "2 of the 5 standard deviations in '{path}' are not positive",
        ),
        ({"mean": [float("nan")] * 5, "std": [1.0] * 5}, "o.json", "mean in '{path}' holds values that are not finite"),
        ({"mean": ["a"] * 5, "std": [1.0] * 5}, "o.json", "mean in '{path}' holds something other than numbers"),
        ({"mean": [0.0] * 5}, "o.json", "'{path}' has mean; give mean and std, nothing else"),
        (
            {"mean": np.array([{}] * 5), "std": np.ones(5)},
            "o.npz",
            "'{path}' is no .npz file of plain numbers (Object arrays",
        ),
        (b"nothing", "o.safetensors", "'{path}' is damaged"),
        (
            b"nothing",
            "o.pt",
            "the statistics are in '{path}'; give a file that ends in one of .safetensors, .npz, .json",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_an_error(tmp_path: Path, content: Any, name: str, message: str) -> None:
    write_all(tmp_path)
    path = write_statistics_as(tmp_path, content, name)
    with refused(message.format(path=path)):
        convert_one(tmp_path, "author", statistics=path)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (
            "author",
            {"statistics": None},
            "was trained on activations standardised per dimension.* give --statistics. To compute",
        ),
        ("author", {"k": 12}, "k is 12, more than the d_sae = 11 features"),
        ("author", {"nfm_top_k": 5}, "nfm_top_k is 5; give a number from 1 to k = 4"),
        ("author", {"nfm_dim": 7, "seed": 1}, "--nfm_dim, --seed would change nothing for the format author"),
        (
            "sparsify",
            {"k": 2, "nfm_top_k": 2},
            "--k, --nfm_top_k would change nothing for the format sparsify without an added",
        ),
        ("saelens", {"statistics": Path("s.json")}, "--statistics would change nothing for the format saelens"),
        ("saelens", {"nfm_dim": 0}, "nfm_dim is 0; give a positive whole number"),
        ("saelens", {"format": "author", "statistics": Path("s.json")}, "no file '.*joint_sae_nfm_model.pt'"),
        ("author", {"format": "sparsify", "statistics": None, "k": None, "nfm_top_k": None}, "no file '.*cfg.json'"),
        ("nowhere", {}, "no folder or file '.*nowhere'; give where the SAE is"),
        (
            "",
            {},
            "has no file of a known format .author has joint_sae_nfm_model.pt, saelens has sae_weights.safetensors, ",
        ),
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
    with refused("has files of several formats (author, sparsify); say which by --format"):
        detected(tmp_path / "author")
    assert convert_one(tmp_path, "author", format="author").format == "author"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with refused("which holds other things (notes.txt); give a new folder"):
        convert(ConvertConfig(source=tmp_path / "sparsify", output=tmp_path / "other"))
    for name in ("cfg.json", "sae.safetensors"):
        (tmp_path / "sparsify" / name).rename(tmp_path / name)
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"has no file of a known format|no file '.*cfg.json'"
        ):
            convert(ConvertConfig(source=tmp_path / "sparsify", output=tmp_path / "new"))
        (tmp_path / name).rename(tmp_path / "sparsify" / name)
    assert not (tmp_path / "new").exists()
