"""Files written whole, their digests, and what a process leaves that is killed between two write events."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from kills import killed_at

from sae_nfm.common.files import (
    begin,
    check_digests,
    checked,
    differences,
    digests,
    give_up,
    is_finished,
    locked,
    read_json,
    seal,
    whole,
    write_json,
)

OTHER = "it is not the one that the run wrote"


def flipped(path: Path, place: int = 20) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << (place % 7)
    path.write_bytes(content)


def test_a_single_file_has_a_digest_beside_it_that_sha256sum_reads(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"a": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "one.json.sha256"]
    assert (
        subprocess.run(
            ["sha256sum", "-c", "one.json.sha256"], cwd=tmp_path, capture_output=True, check=False
        ).returncode
        == 0
    )
    assert read_json(tmp_path / "one.json") == {"a": 1}
    flipped(tmp_path / "one.json", 6)
    with pytest.raises(
        ValueError, match=rf"one\.json. is damaged.*sae-nfm manifest {re.escape(str(tmp_path))}/one\.json"
    ):
        read_json(tmp_path / "one.json")
    write_json(tmp_path / "one.json", {"a": 2})  # written anew over the damaged one
    assert read_json(tmp_path / "one.json") == {"a": 2}
    (tmp_path / "one.json.sha256").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"one\.json\.sha256. is damaged"):
        checked(tmp_path / "one.json")


def test_a_file_without_a_digest_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"a": 1}')
    (tmp_path / "digests.json").write_text('{"of": "somebody else"}')
    assert read_json(tmp_path / "old.json") == {"a": 1}
    assert digests(tmp_path) is None
    assert not is_finished(tmp_path)


def test_writing_follows_no_link_keeps_the_mode_and_leaves_nothing_after_an_exception(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("page.html.partial", ".page.html.partial", "page.html"):
        (run / name).symlink_to(elsewhere)
    with whole(run / "page.html") as partial:
        partial.write_text("page")
    assert elsewhere.read_text() == "mine"
    assert (run / "page.html").read_text() == "page"
    (run / "page.html").chmod(0o640)
    with whole(run / "page.html") as partial:
        partial.write_text("again")
    assert (run / "page.html").stat().st_mode & 0o777 == 0o640
    before = sorted(run.iterdir())
    with pytest.raises(KeyboardInterrupt), whole(run / "page.html") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert sorted(run.iterdir()) == before
    assert checked(run / "page.html").read_text() == "again"


def test_the_digests_of_a_folder(tmp_path: Path) -> None:
    sae = tmp_path / "saes" / "one"
    sae.mkdir(parents=True)
    (sae / "cfg.json").write_text("{}")
    (sae / "sae_weights.safetensors").write_bytes(b"weights")
    seal(sae, {"id": "a"})
    (tmp_path / "results.json").write_text("[1, 2]")
    seal(tmp_path, {"id": "b"})
    content = digests(tmp_path)
    assert content is not None
    assert content["finished"]
    assert sorted(content["files"]) == ["results.json", "saes/one/digests.json"]
    assert differences(tmp_path) == []
    check_digests(sae, "cfg.json", "sae_weights.safetensors")
    flipped(sae / "sae_weights.safetensors", 3)
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors. is damaged"):
        check_digests(sae)
    assert differences(tmp_path) == [("saes/one/sae_weights.safetensors", OTHER)]
    seal(sae)  # another SAE in its place, whole in itself
    assert differences(tmp_path) == [("saes/one", OTHER)]
    (tmp_path / "results.json").unlink()
    (tmp_path / "saes" / "two").mkdir()
    (tmp_path / "saes" / "two" / "cfg.json").write_text("{}")
    assert dict(differences(tmp_path)) == {
        "results.json": "it is missing",
        "saes/one": OTHER,
        "saes/two": "it is not of this run, or of one that is not finished",
    }
    seal(tmp_path / "saes" / "two", {"name": "train"})  # a run of its own
    assert [name for name, _ in differences(tmp_path)] == ["results.json", "saes/one"]


@pytest.mark.parametrize("place", [3, 15, 25, 60, 200, 400, -20])
def test_damaged_digests_are_named(tmp_path: Path, place: int) -> None:
    (tmp_path / "a.json").write_text("{}")
    seal(tmp_path, {"id": "a"})
    flipped(tmp_path / "digests.json", place)
    with pytest.raises(ValueError, match=r"digests\.json. is damaged"):
        checked(tmp_path / "a.json")


def test_a_file_of_a_finished_folder_can_be_written_anew(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    seal(tmp_path)
    with whole(tmp_path / "report.html") as partial:
        partial.write_text("new")
    assert checked(tmp_path / "report.html").read_text() == "new"
    assert differences(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests.json", "report.html"]


@pytest.mark.parametrize("setting", ["single", "finished folder", "folder being filled"])
def test_killed_at_any_write_event_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    nth, came_so_far, path = 0, True, tmp_path
    while came_so_far:
        nth += 1
        folder = tmp_path / str(nth)
        folder.mkdir()
        path = folder / "results.json"
        path.write_text('"old"')
        if setting == "finished folder":
            seal(folder)
        elif setting == "folder being filled":
            begin(folder, {}, mark=True)
        came_so_far = killed_at(monkeypatch, nth, lambda path=path: write_json(path, "new"))
        give_up(folder)
        assert read_json(path) in ("old", "new")
        write_json(path, "newer")
        assert read_json(path) == "newer"
        assert [p.name for p in folder.iterdir() if p.name.endswith(".partial")] in (
            [],
            [p.name for p in folder.glob(".d*")],
        )
    assert nth > 4
    assert read_json(path) == "newer"


def test_a_lock_names_its_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "run"
    read, write = os.pipe()
    child = os.fork()  # a new interpreter would take seconds to import the package
    if not child:
        with locked(path, "sae-nfm train --lr 1"):
            os.write(write, b"held")
            signal.pause()
    assert os.read(read, 4) == b"held"
    told = rf"written by process {child} on .* \(sae-nfm train --lr 1\)"
    with pytest.raises(ValueError, match=told), locked(path):
        raise AssertionError
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(path), pytest.raises(ValueError, match=f"process {os.getpid()}"), locked(path):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_json_that_is_damaged_is_named(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json.* is not JSON"):
            read_json(tmp_path / "a.json")
    assert json.loads("{}") == {}
