"""Exchange of SAEs through the hub: `push` writes a repository that SAELens loads from, `pull` fetches and verifies one.

A repository has SAELens's four files under the id of each SAE, so that `SAE.from_pretrained("user/repository", id)` works
(after `import sae_nfm` where the architecture is joint_nfm), and beside them README.md (the model card), pretrained.yaml (the
release, with sha256), and results.json and report.html where the run has them. All of it is one commit: SAELens's
`upload_saes_to_huggingface` makes one for each SAE and leaves an existing README as it is, so the client is called here.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token, snapshot_download
from huggingface_hub.hf_api import RepoFile
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_nfm.common import (
    LOG_IN,
    check_writable,
    checked,
    differences,
    explained,
    publishing,
    python_string,
    quoted,
    reading,
    seal,
    writing,
)
from sae_nfm.common.results import REPORT_FILENAME, RESULTS_FILENAME
from sae_nfm.comparison.results import CompareResult, RowKind
from sae_nfm.hub.card import CardSAE, model_card, without_folders
from sae_nfm.hub.release import (
    HubSource,
    Release,
    ReleasedSAE,
    check_repo_id,
    check_sha256,
    read_releases,
    release_entry,
    releases_yaml,
    sha256,
)

PARTIAL = ".partial"
"""In the names of what is not finished."""


@dataclass(frozen=True, kw_only=True)
class SavedSAE:
    """A saved SAE on disk."""

    folder: Path
    runner: Path
    """Its runner_cfg.json, which may not exist."""
    entry: ReleasedSAE

    def card(self) -> CardSAE:
        """What its model card is made from."""
        runner = _json_object(self.runner) if self.runner.is_file() else None
        return CardSAE(entry=self.entry, config=_json_object(self.folder / SAE_CFG_FILENAME), runner=runner)

    def files(self) -> dict[str, Path]:
        """SAELens's files, as far as they exist, by their path in the release."""
        paths = {name: self.folder / name for name in self.entry.sha256}
        if self.runner.is_file():
            paths[RUNNER_CFG_FILENAME] = self.runner
        return {f"{self.entry.path}/{name}": path for name, path in paths.items()}


@dataclass(frozen=True, kw_only=True)
class SavedSAEs:
    """The SAEs of a folder, with a demo's result and page where it is one's output."""

    saes: tuple[SavedSAE, ...]
    results: Path | None
    report: Path | None

    def result(self) -> CompareResult | None:
        """The demo's result."""
        return None if self.results is None else CompareResult.load(self.results)


def saved_saes(source: str | Path, *, sae_id: str | None = None, names: Sequence[str] = ()) -> SavedSAEs:
    """The SAEs in a folder, each loaded once to see that it is sound.

    Args:
        source: folder of a saved SAE, or the output folder of `sae-nfm demo`.
        sae_id: id of a single SAE; its hook name unless given.
        names: which SAEs of a demo's output; all of them unless given.

    Raises:
        FileNotFoundError, ValueError: the folder is neither of the two, has no such SAE, or a damaged one.
    """
    source = Path(source)
    if PARTIAL in str(source.resolve()):
        raise ValueError(f"{str(source)!r} is unfinished (it is in a {PARTIAL} folder); run its command again")
    if (source / SAE_CFG_FILENAME).is_file():
        if names:
            raise ValueError(f"{str(source)!r} is one saved SAE: choosing {', '.join(names)} is for a demo's output")
        entry = release_entry(source, sae_id=sae_id)
        sae = SavedSAE(folder=source, runner=source / RUNNER_CFG_FILENAME, entry=replace(entry, path=entry.id))
        return SavedSAEs(saes=(sae,), results=None, report=None)
    found = (path.parent.name for path in (source / "saes").glob(f"*/{SAE_CFG_FILENAME}"))
    present = sorted(name for name in found if PARTIAL not in name)
    if not present:
        raise ValueError(
            f"{str(source)!r} is neither a saved SAE (it has no {SAE_CFG_FILENAME}) nor the output of `sae-nfm demo` (it has "
            "no saes/*); give the folder of one of the two"
        )
    if missing := sorted(set(names) - set(present)):
        raise ValueError(f"{str(source)!r} has no SAE {', '.join(missing)}; it has {', '.join(present)}")
    if sae_id is not None:
        raise ValueError(f"{str(source)!r} has SAEs {', '.join(present)}, whose names are their ids; leave sae_id out")
    return _of_a_demo(source, names or present)


def _of_a_demo(source: Path, names: Sequence[str]) -> SavedSAEs:
    results, report = source / RESULTS_FILENAME, source / REPORT_FILENAME
    result = CompareResult.load(results)
    refuse_mixed(source, result, names)
    rows = [row for row in result.rows if row.kind is RowKind.TRAINED]
    explained = {row.arm: 1 - row.fvu for row in rows if row.fvu is not None}
    shared = source / "saes" / RUNNER_CFG_FILENAME  # of 0.1.0: one file for all
    saes = tuple(
        SavedSAE(
            folder=source / "saes" / name,
            runner=shared if shared.is_file() else source / "saes" / name / RUNNER_CFG_FILENAME,
            entry=release_entry(source / "saes" / name, sae_id=name, variance_explained=explained.get(name)),
        )
        for name in names
    )
    return SavedSAEs(saes=saes, results=results, report=report if report.is_file() else None)


def refuse_mixed(source: Path, result: CompareResult, names: Sequence[str]) -> None:
    """Raise a ValueError where files in a run's folder, or the SAEs beside its results, are of another run."""
    parts = {RESULTS_FILENAME, REPORT_FILENAME, *(f"saes/{name}" for name in names)}
    told = [f"{what}: {said}" for what, said in differences(source) if "/".join(what.split("/")[:2]) in parts]
    weights: dict[str, str] = result.provenance.get("saes", {})
    for name in names if weights else ():
        if weights.get(f"saes/{name}") != sha256(source / "saes" / name / SAE_WEIGHTS_FILENAME):
            told.append(f"{RESULTS_FILENAME} is not of the SAE in saes/{name}")
    if told:
        raise ValueError(
            f"what is in {str(source)!r} does not belong together: {'; '.join(told[:4])}. Restore it or run the command again; "
            f"an edit that is meant is accepted by `sae-nfm manifest {source}`, as long as the weights are those of the results"
        )


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object; a ValueError that names the file where it is something else."""
    with reading(checked(path), "a JSON object"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _check_to_publish(source: Path, saved: "SavedSAEs") -> None:
    """Raise a ValueError for a file that is damaged, or lies elsewhere, behind a symbolic link."""
    files = [path for sae in saved.saes for path in sae.files().values()]
    files += [path for path in (saved.results, saved.report) if path is not None]
    for path in files:
        if not path.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"{quoted(path)} is a link to {quoted(path.resolve())}, outside {quoted(source)}: nothing was published; put a "
                "copy in its place (cp -rL)"
            )
    for sae in saved.saes:
        sae.card()
    if saved.report is not None:
        page = saved.report.read_bytes()
        if page.startswith(b"<!doctype html>") and not page.rstrip().endswith(b"</html>"):
            raise ValueError(f"{quoted(saved.report)} ends early: run `sae-nfm report` again")


RELEASE_FILENAME, CARD_FILENAME = "pretrained.yaml", "README.md"
BESIDE = (CARD_FILENAME, RELEASE_FILENAME, RESULTS_FILENAME, REPORT_FILENAME)
Contents = Mapping[str, Path | bytes]


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """What to publish, and where."""

    source: Path
    """Folder of a saved SAE, or the output folder of `sae-nfm demo`, whose SAEs, table and report go together."""
    repo_id: str
    """Hub repository, as in user/repository; it is created where it does not exist."""
    sae_id: str | None = None
    """Id of a single SAE, the folder it gets in the repository; its hook name unless given."""
    saes: tuple[str, ...] = ()
    """Which SAEs of a demo's output; all of them unless given."""
    private: bool = False
    """Whether a new repository is private."""
    license: str | None = None
    """Licence of the weights as the hub names it, such as mit or apache-2.0; none is stated unless given."""
    overwrite: bool = False
    """Whether files that the repository has already are replaced; the hub keeps the earlier commit."""

    def __post_init__(self) -> None:
        if self.repo_id.count("/") != 1:
            raise ValueError(f"repo_id is {self.repo_id!r}; give owner and name, as in 'user/repository'")
        check_repo_id(self.repo_id)


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """What to fetch, and where it goes."""

    repo_id: str
    """Hub repository, as in user/repository, written by `push`."""
    output: Path
    """Folder to write: one folder for each SAE, and what stands beside them. It must not exist yet."""
    revision: str = "main"
    """Branch, tag or commit."""
    saes: tuple[str, ...] = ()
    """Ids of the SAEs to fetch; all of them unless given."""
    force_download: bool = False
    """Whether files are fetched even though the cache has them."""

    def __post_init__(self) -> None:
        if self.repo_id.count("/") != 1:
            raise ValueError(f"repo_id is {self.repo_id!r}; give owner and name, as in 'user/repository'")
        check_repo_id(self.repo_id)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What `push` did."""

    url: str
    release: Release
    """What the repository has now, earlier SAEs included."""

    def words(self) -> str:
        """Where it is and how it is loaded."""
        repo_id = self.release.source.name
        names = ((python_string(repo_id), python_string(sae.id)) for sae in self.release.saes)
        calls = [f"sae = SAE.from_pretrained({release}, {name})" for release, name in names]
        return "\n".join([f"Pushed to {self.url}. To load:", "", *_code(calls)])


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What `pull` fetched."""

    folder: Path
    commit: str
    release: Release

    def words(self) -> str:
        """Where it is and how it is loaded."""
        calls = [f"sae = SAE.load_from_disk({python_string(self.folder / sae.path)})" for sae in self.release.saes]
        origin = f"{self.release.source.name} at commit {self.commit}"
        return "\n".join([f"Pulled {origin}, every SAE verified by sha256. To load:", "", *_code(calls)])


def push(config: PushConfig) -> Pushed:
    """Publish saved SAEs in one commit, and check that the hub has stored what was sent.

    cfg.json, runner_cfg.json, results.json and report.html go as they are: names of folders on the machine they were made on
    included; README.md and pretrained.yaml have none.

    Raises:
        ValueError: the folder holds no SAE, or a damaged one; nobody is logged in, or may not write there; the repository has
            other files of these names already; what the hub stored is not what was sent.
        FileNotFoundError: a file is missing, or the hub cannot be reached.
    """
    saved = saved_saes(config.source, sae_id=config.sae_id, names=config.saes)
    _check_to_publish(Path(config.source), saved)
    if get_token() is None:
        raise ValueError(f"nobody is logged in to the hub, and pushing needs it; {LOG_IN}")
    api, what = HfApi(), f"pushing to {config.repo_id!r}"
    with explained(what, cached=False):
        api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
        info = api.model_info(config.repo_id)
    release, contents = _to_commit(config, saved, info)
    with explained(what, cached=False):
        commit = api.create_commit(
            config.repo_id,
            [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in contents.items()],
            commit_message=f"Add {', '.join(sae.entry.id for sae in saved.saes)}",
            parent_commit=info.sha,
        )
        stored = api.get_paths_info(config.repo_id, list(contents), revision=commit.oid)
    _check_stored(contents, [file for file in stored if isinstance(file, RepoFile)], commit.commit_url)
    return Pushed(url=commit.commit_url, release=release)


def pull(config: PullConfig) -> Pulled:
    """Fetch a repository that `push` wrote; the folder appears only when every SAE in it is verified.

    Raises:
        FileNotFoundError: there is no such repository, revision or file, or neither the hub nor the cache can give it.
        ValueError: a file's sha256 is not the released one, the output exists, or there is no such SAE.
    """
    output = Path(config.output)
    if os.path.lexists(output):
        raise ValueError(f"{str(output)!r} exists already; give a folder that does not")
    check_writable(output, folder=True)
    source = HubSource(repo_id=config.repo_id, revision=config.revision)
    listed = source.file(RELEASE_FILENAME, force_download=config.force_download)
    commit = listed.parent.name  # the cache keeps a folder for each commit
    release = _chosen(_only_release(listed), config, commit)
    with explained(f"{config.repo_id!r} at commit {commit}"):
        snapshot = snapshot_download(
            config.repo_id,
            revision=commit,
            allow_patterns=[*BESIDE, *(f"{glob.escape(sae.path)}/*" for sae in release.saes)],
            force_download=config.force_download,
        )
    with writing(output), publishing(output, "pull") as made:
        partial = made.folder
        _copy(Path(snapshot), partial, BESIDE)
        for sae in release.saes:
            _copy(Path(snapshot), partial, [f"{sae.path}/{name}" for name in (*sae.sha256, RUNNER_CFG_FILENAME)])
            for name, digest in sae.sha256.items():
                file, what = partial / sae.path / name, f"{sae.path}/{name} of {config.repo_id!r} at commit {commit}"
                if not file.is_file():
                    raise FileNotFoundError(
                        f"{what} is missing, though {RELEASE_FILENAME} lists it; ask who published it"
                    )
                check_sha256(file, digest, what)
            seal(partial / sae.path)
    return Pulled(folder=output, commit=commit, release=release)


def _to_commit(config: PushConfig, saved: SavedSAEs, info: ModelInfo) -> tuple[Release, Contents]:
    """The release that the repository will have, and every file to write; SAEs of an earlier push stay listed."""
    present = {sibling.rfilename for sibling in info.siblings or ()}
    pushed_before = RELEASE_FILENAME in present
    source = HubSource(repo_id=config.repo_id, revision=info.sha or "main")
    earlier = _earlier_saes(source, {sae.entry.id for sae in saved.saes}) if pushed_before else []
    cards = [*(sae.card() for sae in saved.saes), *earlier]
    result = saved.result()
    if result is None and pushed_before and RESULTS_FILENAME in present:
        result = CompareResult.load(source.file(RESULTS_FILENAME))  # else the table of the earlier SAEs would go
    release = Release(
        name=config.repo_id,  # once registered, SAE.from_pretrained(repo_id, id) is verified, too
        model=without_folders(cards[0].metadata.get("model_name")) or "unknown",
        source=HubSource(repo_id=config.repo_id),
        saes=tuple(card.entry for card in cards),
    )
    contents: dict[str, Path | bytes] = {path: file for sae in saved.saes for path, file in sae.files().items()}
    beside = {RESULTS_FILENAME: saved.results, REPORT_FILENAME: saved.report}
    contents |= {name: path for name, path in beside.items() if path is not None}
    contents[CARD_FILENAME] = model_card(config.repo_id, cards, result=result, license=config.license).encode()
    contents[RELEASE_FILENAME] = releases_yaml([release]).encode()
    taken = sorted((present & set(contents)) - (set(BESIDE) if pushed_before else set()))
    if taken and not config.overwrite:
        raise ValueError(
            f"{config.repo_id!r} has {', '.join(taken)} already; choose another repository or sae_id, or give overwrite to "
            "replace them (the hub keeps the earlier commit)"
        )
    return release, contents


def _earlier_saes(source: HubSource, replaced: set[str]) -> list[CardSAE]:
    saes = [sae for sae in _only_release(source.file(RELEASE_FILENAME)).saes if sae.id not in replaced]
    configs = [_json_object(source.file(f"{sae.path}/{SAE_CFG_FILENAME}")) for sae in saes]
    return [CardSAE(entry=sae, config=config) for sae, config in zip(saes, configs, strict=True)]


def _check_stored(contents: Contents, stored: Sequence[RepoFile], url: str) -> None:
    found = {file.path: file for file in stored}
    damaged = [path for path, content in contents.items() if path not in found or not _same(found[path], content)]
    if damaged:
        raise ValueError(f"the hub stored something else than was sent ({', '.join(damaged)}) in {url}; push again")


def _same(stored: RepoFile, content: Path | bytes) -> bool:
    if stored.lfs is not None and isinstance(content, Path):
        return stored.lfs.sha256 == sha256(content)
    data = content if isinstance(content, bytes) else content.read_bytes()
    if stored.lfs is not None:
        return stored.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return stored.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's name of the content


def _only_release(path: Path) -> Release:
    releases = read_releases(path)
    if len(releases) != 1:
        raise ValueError(f"{path} has {len(releases)} releases; a repository's {RELEASE_FILENAME} has one")
    return releases[0]


def _chosen(release: Release, config: PullConfig, commit: str) -> Release:
    ids = [sae.id for sae in release.saes]
    if missing := sorted(set(config.saes) - set(ids)):
        raise ValueError(f"{config.repo_id!r} has no SAE {', '.join(missing)}; it has {', '.join(ids)}")
    saes = tuple(sae for sae in release.saes if not config.saes or sae.id in config.saes)
    return replace(release, saes=saes, source=HubSource(repo_id=config.repo_id, revision=commit))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _code(calls: Sequence[str]) -> list[str]:
    imports = ["import sae_nfm  # registers its architectures", "from sae_lens import SAE"]
    return [f"    {line}" for line in (*imports, *calls)]
