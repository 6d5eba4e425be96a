"""The command `convert`: what it is told and says, damaged files, and that a folder is whole or not there."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import inference_sae, training_config
from checkpoint_writers import (
    convert_one,
    refused,
    rewrite,
    write_all,
    write_author,
    write_sparsify,
    write_statistics,
)
from sae_lens import SAE

from sae_nfm.convert.run import detected
from sae_nfm.convert.sparsify import sparsify_loader
from sae_nfm_cli.commands import COMMANDS

COMMAND = COMMANDS["convert"]


FORMATS = {
    "author": ("joint_sae_nfm_model.pt", "nfm.linear.weight"),
    "saelens": ("sae_weights.safetensors", "W_dec"),
    "dictionary_learning": ("ae.pt", "decoder.weight"),
    "sparsify": ("sae.safetensors", "W_dec"),
}
"""Weight file, and one of its matrices."""


def test_the_command_line_says_what_is_and_what_is_not_known(tmp_path: Path) -> None:
    write_author(tmp_path, d_sae=1100)
    write_statistics(tmp_path)
    out = tmp_path / "out"
    line = [
        str(tmp_path),
        str(out),
        "--statistics",
        str(tmp_path / "statistics.json"),
        "--hook",
        "blocks.16.hook_resid_pre",
    ]
    assert COMMAND.result(COMMAND.make_parser("convert").parse(line)).words().splitlines() == [
        f"Converted from author to joint_nfm (d_in 5, d_sae 1,100, k 1,024, nfm_dim 3, nfm_top_k 512): {out}",
        "Not in the files, assumed: k = 1024, the paper's; nfm_top_k = 512, the paper's",
        "Not in the files, and needed to use it in a language model: --model, --context-size; convert again with them",
        "In Python:",
        "    import sae_nfm",
        "    from sae_lens import SAE",
        f'    sae = SAE.load_from_disk("{out}")',
    ]
    assert {path.name for path in out.iterdir()} == {"cfg.json", "digests.json", "sae_weights.safetensors", "README.md"}
    line += ["--model", "gpt2", "--context-size", "128", "--no-prepend-bos", "--k", "9", "--nfm-top-k", "9"]
    words = COMMAND.result(COMMAND.make_parser("convert").parse(line)).words().splitlines()
    assert words[:2] == [
        f"Converted from author to joint_nfm (d_in 5, d_sae 1,100, k 9, nfm_dim 3, nfm_top_k all): {out}",
        f"The SAE that was there is kept in {out}.1",
    ]
    assert words[2] == "In Python:"
    metadata = SAE.load_from_disk(out).cfg.metadata
    told = [metadata[name] for name in ("model_name", "hook_name", "context_size", "prepend_bos", "converted_from")]
    assert told == ["gpt2", "blocks.16.hook_resid_pre", 128, False, f"author: {tmp_path.name}"]
    assert SAE.load_from_disk(f"{out}.1").cfg.k == 1024


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_detected_and_can_be_named(tmp_path: Path, form: str) -> None:
    write_all(tmp_path)
    assert detected(tmp_path / form) == form
    assert convert_one(tmp_path, form).format == form
    assert convert_one(tmp_path, form, format=form).kept == tmp_path / "out.1"


def test_files_are_detected_too(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert detected(tmp_path / "author" / "joint_sae_nfm_model.pt") == "author"
    assert detected(tmp_path / "dictionary_learning" / "ae.pt") == "dictionary_learning"


def test_heads_are_flattened_where_the_hook_point_has_them(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "sparsify", d_in=6)
    convert_one(tmp_path, "sparsify", hook="blocks.1.attn.hook_z")
    sae, x = SAE.load_from_disk(tmp_path / "out"), torch.randn(4, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    flat = SAE.load_from_disk(tmp_path / "sparsify", converter=sparsify_loader)
    assert torch.equal(sae(x), flat(x.flatten(-2)).reshape(x.shape))
    (tmp_path / "out").rename(tmp_path / "saelens")
    convert_one(tmp_path, "saelens", hook="blocks.1.hook_resid_post")
    assert torch.equal(SAE.load_from_disk(tmp_path / "out")(x.flatten(-2)), flat(x.flatten(-2)))


def evil(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path.with_name("run")),)

    torch.save({"primary_sae.encoder.0.weight": Evil()}, path)


@pytest.mark.parametrize("form", ["author", "dictionary_learning"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, form: str) -> None:
    write_all(tmp_path)
    path = tmp_path / form / FORMATS[form][0]
    evil(path)
    with refused(rf"'{re.escape(str(path))}'.*\b\w+\.mkdir\b.*\bstate_dict\b"):
        convert_one(tmp_path, form)
    assert not path.with_name("run").exists()
    torch.load(path, weights_only=False)  # the file does run code where it is allowed to
    assert path.with_name("run").exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"'{name}' is missing"),
        (lambda tensors, name: tensors.update(more=torch.ones(1)), r"'more' is unknown"),
        (
            lambda tensors, name: tensors.update({name: torch.ones(4, 4)}),
            r"'{name}' .*\(4, 4\)",
        ),
        (
            lambda tensors, name: tensors[name].view(-1)[3:4].fill_(torch.nan),
            r"'{name}' .*not finite",
        ),
    ],
)
def test_another_tensor_is_an_error(tmp_path: Path, form: str, change: Any, message: str) -> None:
    write_all(tmp_path)
    filename, name = FORMATS[form]
    rewrite(tmp_path / form / filename, lambda tensors: change(tensors, name))
    with refused(message.format(name=re.escape(name))) as error:
        convert_one(tmp_path, form)
    assert filename in str(error.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.95])
def test_a_truncated_file_is_an_error(tmp_path: Path, form: str, kept: float) -> None:
    write_all(tmp_path)
    path = tmp_path / form / FORMATS[form][0]
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}' is damaged"):
        convert_one(tmp_path, form)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_failure_leaves_the_earlier_sae(tmp_path: Path, form: str) -> None:
    write_all(tmp_path)
    inference_sae(training_config("joint_nfm")).save_model(tmp_path / "out")
    (tmp_path / form / FORMATS[form][0]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"{re.escape(FORMATS[form][0])}' is damaged"):
        convert_one(tmp_path, form)
    assert SAE.load_from_disk(tmp_path / "out").cfg.d_in == 16
    assert not list(tmp_path.glob("out.*"))
