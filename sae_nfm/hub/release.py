"""What a release of pretrained SAEs is: where its files lie and which they are, by sha256; read from and written to YAML.

The YAML is SAELens's own (`pretrained_saes.yaml`: release, `model`, `saes` with `id`, `path`, `variance_explained`, `l0`,
`neuronpedia`) with the digests added, and one of three sources:

    my-release:
      model: gpt2                     # name of the language model
      repo_id: user/repository        # a hub repository (with `revision`, a branch, tag or commit; "main" unless given),
      # folder: saes                  # or a local folder, relative to the YAML file,
      # package: sae_nfm              # or a folder inside an installed package
      saes:
      - id: blocks.8.hook_resid_pre   # what `SAE.from_pretrained(release, id)` is called with
        path: blocks.8.hook_resid_pre # its folder within the source
        variance_explained: 0.93      # 1 - FVU on held-out tokens; may be left out
        l0: 32.0                      # active features per token
        neuronpedia: null             # its id on Neuronpedia, if it has one
        sha256:
          cfg.json: 6f5902ac237024bdd0c176cb93063dc4...
          sae_weights.safetensors: 9c56cc51b374c3ba189210d5b6d4bf57...
          sparsity.safetensors: 486ea46224d1bb4fb680f34f7c9ad96a...
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from sae_nfm.common import explained, whole
from sae_nfm.loading import check_folder

VERIFIED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)
"""The files of a saved SAE whose digests a release has; the sparsity may be missing."""
SOURCE_KEYS = ("repo_id", "revision", "package", "folder")


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on the hub."""

    repo_id: str
    revision: str = "main"

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return self.repo_id

    def file(self, path: str, *, force_download: bool = False) -> Path:
        """The file in huggingface_hub's cache, downloaded where it is missing or `force_download` says so.

        Raises:
            FileNotFoundError: no such repository, revision or file, or neither the hub nor the cache has it.
        """
        with explained(f"{path} of {self.repo_id!r} at revision {self.revision!r}"):
            cached = hf_hub_download(self.repo_id, path, revision=self.revision, force_download=force_download)
        return Path(cached)


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A local folder that holds one folder for each SAE."""

    folder: str | Path
    """The folder; a relative one is relative to the working folder of now."""

    def __post_init__(self) -> None:
        """Outlast a change of the working folder."""
        object.__setattr__(self, "folder", Path(self.folder).absolute())

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return f"folder:{self.folder}"

    def file(self, path: str, *, force_download: bool = False) -> Path:  # noqa: ARG002
        """The file; nothing is downloaded.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return _existing(Path(self.folder) / path, "restore it, or register the release again")


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """Data files of an installed package."""

    package: str
    folder: str
    """Folder inside the package, with forward slashes."""

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return f"package:{self.package}/{self.folder}"

    def file(self, path: str, *, force_download: bool = False) -> Path:  # noqa: ARG002
        """The file; nothing is downloaded.

        Raises:
            FileNotFoundError: the package was installed without it.
        """
        return _existing(
            Path(str(files(self.package))) / self.folder / path, f"install {self.package} again, with its data"
        )


Source = HubSource | FolderSource | PackageSource


@dataclass(frozen=True, kw_only=True)
class ReleasedSAE:
    """One SAE of a release."""

    id: str
    """What `SAE.from_pretrained(release, id)` is called with."""
    path: str
    """Its folder within the source, with forward slashes."""
    sha256: Mapping[str, str]
    """Digest of cfg.json and of sae_weights.safetensors, and of sparsity.safetensors where there is one."""
    variance_explained: float | None = None
    """1 - FVU on held-out tokens, where it was measured."""
    l0: float | None = None
    neuronpedia: str | None = None

    def __post_init__(self) -> None:
        """Refuse an entry that cannot be verified, or whose files would lie outside the source."""
        needed = {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME}
        if not needed <= set(self.sha256) <= set(VERIFIED):
            raise ValueError(
                f"SAE {self.id!r} has sha256 of {sorted(self.sha256)}; give one for each of {sorted(needed)}, and for "
                f"{SPARSITY_FILENAME} where there is one (`release_entry(folder)` computes them)"
            )
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in self.path:
            raise ValueError(f"SAE {self.id!r} has path {self.path!r}; give a folder within the source, as in 'a/b'")


@dataclass(frozen=True, kw_only=True)
class Release:
    """SAEs that were published together."""

    name: str
    """What `SAE.from_pretrained(name, id)` is called with."""
    model: str
    source: Source
    saes: tuple[ReleasedSAE, ...]

    def __post_init__(self) -> None:
        """Refuse ambiguity."""
        for what in ("id", "path"):
            values = [getattr(sae, what) for sae in self.saes]
            if len(set(values)) != len(values) or not values:
                raise ValueError(
                    f"release {self.name!r} has SAEs of {what} {values}; give at least one, and each its own"
                )

    def verified_file(self, sae: ReleasedSAE, name: str, *, force_download: bool = False) -> Path:
        """A file of one SAE, once its digest is what the release says.

        Raises:
            ValueError: the file is another than the one that was released.
            FileNotFoundError: see the source's `file`.
        """
        path = self.source.file(f"{sae.path}/{name}", force_download=force_download)
        check_sha256(path, sae.sha256[name], f"{name} of SAE {sae.id!r} in release {self.name!r} ({self.source.name})")
        return path


def release_entry(
    folder: str | Path,
    *,
    sae_id: str | None = None,
    path: str | None = None,
    variance_explained: float | None = None,
    neuronpedia: str | None = None,
) -> ReleasedSAE:
    """The entry of a saved SAE, with the digests of its files; the SAE is loaded once, so that only a sound one is listed.

    Args:
        folder: a saved SAE of any architecture.
        sae_id: its id; the hook name it was trained at unless given.
        path: its folder within the release's source; the folder's own name unless given, its parent being the source.
        variance_explained: 1 - FVU on held-out tokens, where it was measured.
        neuronpedia: its id on Neuronpedia.

    Raises:
        FileNotFoundError, ValueError: the folder is no saved SAE, or a damaged one, or says no hook name.
    """
    folder = Path(folder)
    check_folder(folder)
    metadata = SAE.load_from_disk(folder, device="cpu").cfg.metadata
    sae_id = sae_id or metadata.hook_name
    if not sae_id:
        raise ValueError(f"the SAE in {str(folder)!r} does not say its hook name; give sae_id")
    return ReleasedSAE(
        id=sae_id,
        path=path or folder.absolute().name,
        sha256={name: sha256(folder / name) for name in VERIFIED if (folder / name).is_file()},
        variance_explained=variance_explained,
        l0=metadata.l0,
        neuronpedia=neuronpedia,
    )


def read_releases(path: str | Path) -> tuple[Release, ...]:
    """The releases of a YAML file; a `folder` in it is relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing or unknown, or the file is no YAML.
    """
    path = Path(path)
    text = _existing(path, "give the YAML file of a release").read_text()
    try:
        content = yaml.safe_load(text)
        return tuple(_release(name, value, path.parent) for name, value in content.items())
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{path} is no list of releases ({problem}); the format is in the docstring of {__name__}"
        ) from error


def write_releases(releases: Sequence[Release], path: str | Path) -> Path:
    """Write releases as `read_releases` reads them, under a temporary name first."""
    with whole(path) as partial:
        partial.write_text(releases_yaml(releases))
    return Path(path)


def releases_yaml(releases: Sequence[Release]) -> str:
    """Releases as YAML text."""
    content = {release.name: _plain(release) for release in releases}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise a ValueError that names the file and both digests when the file is another one."""
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{what} has sha256 {found}, the release says {expected}: the file is damaged or was replaced. Download it again "
            "(force_download=True, or install again); if the new file is meant, correct the release (release_entry)"
        )


def _release(name: str, value: dict[str, Any], relative_to: Path) -> Release:
    if unknown := sorted(set(value) - {"model", "saes", *SOURCE_KEYS}):
        raise KeyError(f"unknown {', '.join(unknown)} in {name}")
    given: dict[str, Any] = {key: value[key] for key in SOURCE_KEYS if key in value}
    if "repo_id" in given:
        source = HubSource(**given)
    elif "package" in given:
        source = PackageSource(**given)
    else:
        source = FolderSource(**given | {"folder": relative_to / given["folder"]})
    saes = tuple(ReleasedSAE(**sae) for sae in value["saes"])
    return Release(name=name, model=value["model"], source=source, saes=saes)


def _plain(release: Release) -> dict[str, Any]:
    source = {key: value if isinstance(value, str) else str(value) for key, value in asdict(release.source).items()}
    return {
        "model": release.model,
        **source,
        "saes": [{**asdict(sae), "sha256": dict(sae.sha256)} for sae in release.saes],
    }


def _existing(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: {remedy}")
    return path
