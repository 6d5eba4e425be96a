"""Output folders: one rename, the older run beside it, nothing of others removed, nothing lost by a kill."""

import shutil
from pathlib import Path

import pytest
from kills import killed_at

from sae_nfm.common.files import differences, digests, is_finished, read_json, write_json
from sae_nfm.common.manifest import ManifestConfig, accept
from sae_nfm.common.outputs import check_output, complete_publication, partial_folder, publishing


def run(output: Path, value: int, name: str = "demo", **options: object) -> Path | None:
    with publishing(output, name, command=f"sae-nfm {name}", **options) as made:  # pyright: ignore[reportArgumentType]
        write_json(made.folder / "saes" / "a.json", value)
        write_json(made.folder / "results.json", {"kind": f"{name}/1", "value": value})
    return made.kept


def value_in(output: Path) -> tuple[int, int]:
    return read_json(output / "saes" / "a.json"), read_json(output / "results.json")["value"]


def test_a_run_appears_whole_and_an_older_one_stays_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "demo"
    assert run(output, 1) is None
    assert is_finished(output)
    assert differences(output) == []
    assert run(output, 2) == output.with_name("demo.1")
    assert (value_in(output), value_in(output.with_name("demo.1"))) == ((2, 2), (1, 1))
    assert sorted(path.name for path in output.parent.iterdir()) == ["demo", "demo.1"]


@pytest.mark.parametrize("extend", [None, ("saes",)])
def test_killed_at_any_write_event_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extend: tuple[str, ...] | None
) -> None:
    nth, came_so_far = 0, True
    while came_so_far:
        nth += 1
        output = tmp_path / str(nth) / "demo"
        output.parent.mkdir()
        run(output, 1, extend=extend)
        came_so_far = killed_at(monkeypatch, nth, lambda output=output: run(output, 2, extend=extend))
        everything = [output, output.with_name("demo.1"), output.with_name("demo.partial")]
        results = [value_in(path) for path in everything if path.exists() and is_finished(path)]
        if extend is None:  # the older run is somewhere, and none that is finished has parts of another
            assert (1, 1) in results
            assert set(results) <= {(1, 1), (2, 2)}
            assert all(differences(path) == [] for path in everything if path.exists() and is_finished(path))
        whole_new = is_finished(partial_folder(output))
        run(output, 2, extend=extend)
        assert value_in(output) == (2, 2)
        assert differences(output) == []
        kept = sorted(value_in(path)[0] for path in output.parent.glob("demo.*") if path.suffix != ".partial")
        assert kept == (
            [] if extend else [1, 2] if whole_new or not came_so_far or value_in_published(results) else [1]
        )
        assert [path.name for path in output.parent.iterdir() if path.name.endswith((".partial", ".lock"))] == []
        shutil.rmtree(output.parent)
    assert nth > 10


def value_in_published(results: list[tuple[int, int]]) -> bool:
    return (2, 2) in results


def test_what_the_run_did_not_make_is_refused_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "x" / "saes" / "mine"
    foreign.mkdir(parents=True)
    (foreign / "cfg.json").write_text("{}")
    for refuse in (lambda: check_output(tmp_path / "x"), lambda: run(tmp_path / "x", 1)):
        with pytest.raises(ValueError, match=r"other files \(saes\)"):
            refuse()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match=r"other files \(results\.json\)"):
        run(tmp_path / "results", 1)
    run(tmp_path / "y", 1)
    (tmp_path / "y" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other files \(notes\.txt\)"):
        run(tmp_path / "y", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file"):
        run(tmp_path / "file", 1)
    run(tmp_path / "z", 1)
    monkeypatch.chdir(tmp_path / "z" / "saes")
    for given in ("..", "../../z", tmp_path / "z"):
        with pytest.raises(ValueError, match="the folder you are in"):
            run(Path(given), 1)
    assert (foreign / "cfg.json").read_text() == "{}"


def test_links_are_not_followed_by_temporary_names_but_the_output_may_be_one(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (tmp_path / "x.partial").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"x\.partial' is a link"):
        run(tmp_path / "x", 1)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "y").symlink_to(tmp_path / "disk" / "y")
    (tmp_path / "disk" / "y").mkdir()
    run(tmp_path / "y", 1)
    assert (tmp_path / "y").is_symlink()
    assert value_in(tmp_path / "disk" / "y") == (1, 1)


def test_an_exception_leaves_nothing_unless_it_can_be_resumed(tmp_path: Path) -> None:
    for options, left in (({}, []), ({"settings": 1}, ["x.partial"]), ({"keep": True}, ["x.partial"])):
        with pytest.raises(ZeroDivisionError), publishing(tmp_path / "x", "demo", **options) as made:  # pyright: ignore[reportArgumentType]
            write_json(made.folder / "a.json", 1)
            raise ZeroDivisionError
        assert [path.name for path in tmp_path.iterdir()] == left
    with publishing(tmp_path / "x", "demo", settings=1) as made:
        assert not (made.folder / "a.json").exists()  # it was of a run without settings
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "z", "demo", settings=1):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_a_folder_that_is_extended_says_that_it_is_unfinished(tmp_path: Path) -> None:
    run(tmp_path / "x", 1, "compare", extend=("saes",))
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "x", "compare", extend=("saes",)) as made:
        assert is_finished(made.folder)  # nothing has changed yet
        write_json(made.folder / "b.json", 1)
        raise ZeroDivisionError
    assert not is_finished(tmp_path / "x")
    for name, parts in (("secondary", ("saes",)), ("demo", ())):
        with pytest.raises(ValueError, match="holds a run of `sae-nfm compare`"):
            run(tmp_path / "x", 2, name, extend=parts)
    run(tmp_path / "x", 3, "compare", extend=("saes",))
    assert differences(tmp_path / "x") == []


def test_a_folder_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    old = tmp_path / "x"
    old.mkdir()
    (old / "results.json").write_text('{"rows": [], "provenance": {}}')
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "weights").write_text("of a run that was interrupted")
    assert run(old, 1) == tmp_path / "x.1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.1", "x.1.partial"]
    assert digests(tmp_path / "x.1") is None
    assert not complete_publication(old)


def test_an_edit_is_accepted_by_name_and_nothing_else_is_touched(tmp_path: Path) -> None:
    run(tmp_path / "x", 1)
    write_json(tmp_path / "alone.json", 1)
    edited = [tmp_path / "x" / "results.json", tmp_path / "alone.json"]
    for path in edited:
        path.write_text(path.read_text().replace("1", "3"))
        with pytest.raises(ValueError, match=f"{path.name}.*sae-nfm manifest"):
            read_json(path)
    (tmp_path / "x" / "new.txt").write_text("mine")
    (tmp_path / "x" / "saes" / "a.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = accept(ManifestConfig(path=str(tmp_path / "x")))
    assert sorted(found.changed) == ["new.txt (new)", "results.json", "saes/a.json (gone)"]
    assert accept(ManifestConfig(path=str(tmp_path / "alone.json"))).changed == ("alone.json",)
    assert "Nothing had changed" in accept(ManifestConfig(path=str(tmp_path / "x"))).words()
    assert [read_json(path) for path in edited] == [{"kind": "demo/3", "value": 3}, 3]
    assert differences(tmp_path / "x") == []
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"digests.json", "alone.json.sha256"}


def test_damaged_digests_are_accepted_anew_and_foreign_folders_are_not(tmp_path: Path) -> None:
    run(tmp_path / "x", 1)
    (tmp_path / "x" / "digests.json").write_text("{")
    with pytest.raises(ValueError, match=r"digests\.json"):
        read_json(tmp_path / "x" / "results.json")
    accept(ManifestConfig(path=str(tmp_path / "x")))
    assert value_in(tmp_path / "x") == (1, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no saved SAE and no result"):
        accept(ManifestConfig(path=str(tmp_path / "mine")))
    accept(ManifestConfig(path=str(tmp_path)))  # runs below it, and not the folder itself
    assert not (tmp_path / "digests.json").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        accept(ManifestConfig(path=str(tmp_path / "nowhere")))
