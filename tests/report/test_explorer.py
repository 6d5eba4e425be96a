"""The explorer's chapter: which file it shows, what it says of it, and what it leaves out."""

import gzip
import random

import pytest
from invented_explorer import content, packed

from sae_nfm.explorer.results import Explorer
from sae_nfm.report.blocks import Embedded, Prose
from sae_nfm.report.chapters.explorer import COMMANDS, section
from sae_nfm.report.run_folder import EXPLORER_FILENAME, read_run


def run_with(folder, *labels: str, data: bytes | None = None):
    for label in labels:
        (folder / label).mkdir(parents=True)
        (folder / label / EXPLORER_FILENAME).write_bytes(data or packed(content()))
    (folder / "training.jsonl").write_text("")
    return read_run(folder)


def test_the_invented_explorer_is_of_the_format(tmp_path):
    run = run_with(tmp_path, "a")
    explorer = Explorer.load(run.explorers[0])
    explorer.save(tmp_path / "again.json.gz")
    assert gzip.decompress((tmp_path / "again.json.gz").read_bytes()).startswith(b'{"kind":"explore/1"')
    assert list(content()["features"]) == [
        "tokens",
        "max",
        "mean",
        "histogram",
        "shares",
        "context_starts",
        "quantile_starts",
    ]


def test_without_an_explorer_there_is_no_chapter(tmp_path):
    assert section(run_with(tmp_path)) is None


def test_the_first_by_path_is_shown_and_the_others_named(tmp_path):
    found = section(run_with(tmp_path, "b", "a", "c"))
    assert found is not None
    about, embedded = found.blocks
    assert isinstance(about, Prose)
    assert isinstance(embedded, Embedded)
    assert embedded.data == (tmp_path / "a" / EXPLORER_FILENAME).read_bytes()
    assert about.lines[1] == (
        "The run has other explorers, which are not on this page: b/explorer.json.gz, c/explorer.json.gz. "
        "A report of their folder alone shows them."
    )
    assert (
        "8 features of a joint_nfm (k = 4) at blocks.0.hook_resid_post of invented, on 1,000 held-out tokens"
        in about.lines[0]
    )
    assert found.verdicts == [
        "2 of 8 features of runs/invented fire on none of 1,000 tokens.",
        "Of the energy of 40 pairs that fired, the strongest (0 x 5) has 60.00%, the ten strongest 95.00%.",
    ]


def test_what_would_make_the_page_too_large_is_left_out_and_said(tmp_path):
    noise = random.Random(0).randbytes(3_600_000).hex()  # as hexadecimal digits it packs to its own size
    found = section(run_with(tmp_path, "a", data=packed(content() | {"provenance": {"noise": noise}})))
    assert found is not None
    said = found.blocks[1]
    assert isinstance(said, Prose)
    assert said.lines[0].startswith("a/explorer.json.gz is left out: with its ")
    assert said.lines[0].endswith(
        f"Make it smaller with fewer --contexts, --quantile-contexts or --pairs: {COMMANDS[0]}"
    )


def test_a_damaged_explorer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"explorer\.json\.gz.*damaged"):
        section(run_with(tmp_path, "a", data=b"no gzip"))
