"""Releases of pretrained SAEs: where their files lie and which they are, by sha256; registered with SAELens.

    sae = SAE.from_pretrained("sae-nfm-demo", "blocks.2.hook_resid_post")        # packaged, works offline

    entry = release_entry("runs/mine")                                           # digests of a saved SAE
    register_release("mine", model="gpt2", source=FolderSource(folder="runs"), saes=[entry])
    register_releases("pretrained.yaml")                                         # a file of releases, such as `push` writes

The YAML is SAELens's own (`pretrained_saes.yaml`: release, `model`, `saes` with `id`, `path`, `variance_explained`, `l0`,
`neuronpedia`) with the digests added, and one of three sources:

    my-release:
      model: gpt2                     # name of the language model
      repo_id: user/repository        # a hub repository (with `revision`, a branch, tag or commit; "main" unless given),
      # folder: saes                  # or a local folder, relative to the YAML file,
      # package: sae_nfm              # or a folder inside an installed package, which you have imported
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

SAELens keeps its releases in one cached dictionary, read from a large YAML file when first asked for (about a second). Ours
are entered when that happens, so that importing the package stays cheap: `get_pretrained_saes_directory` gets a layer, in
every module that has imported it by name. Each release has a loader of its own, because SAELens tells a loader neither the
release nor the revision. The loader of plain hub repositories gets a layer too, for our architectures only: it refuses an
incomplete config and says what a damaged file means.
"""

import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.loading import pretrained_saes_directory
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    get_sae_lens_config_from_disk,
    get_sae_lens_config_from_hf,
    read_sae_components_from_disk,
)
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_nfm.architectures import INFERENCE_CONFIGS, refuse_missing_keys
from sae_nfm.common import check_digests, explained, printable, quoted, reading, whole
from sae_nfm.loading import SAVE_AGAIN, check_folder, check_sparsity, check_state_dict

VERIFIED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME)
"""The files of a saved SAE whose digests a release has; the sparsity may be missing."""
SOURCE_KEYS = ("repo_id", "revision", "package", "folder")
LARGEST = 16 * 2**20
"""Bytes of the largest file of releases that is read: tens of thousands of SAEs."""
Loaded = tuple[dict[str, Any], dict[str, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on the hub."""

    repo_id: str
    revision: str = "main"

    def __post_init__(self) -> None:
        check_repo_id(self.repo_id)
        _check_text("revision", self.revision)

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return self.repo_id

    def file(self, path: str, *, force_download: bool = False) -> Path:
        """The file in huggingface_hub's cache, downloaded where it is missing; a FileNotFoundError where neither has it."""
        with explained(f"{path} of {self.repo_id!r} at revision {self.revision!r}"):
            cached = hf_hub_download(self.repo_id, path, revision=self.revision, force_download=force_download)
        return Path(cached)


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A local folder that holds one folder for each SAE."""

    folder: str | Path
    """A relative one is relative to the working folder of now."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).absolute())

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return f"folder:{self.folder}"

    def file(self, path: str, *, force_download: bool = False) -> Path:  # noqa: ARG002
        """The file; a FileNotFoundError where there is none."""
        return _existing(Path(self.folder) / path, "restore it, or register the release again")


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """Data files of an installed package."""

    package: str
    folder: str
    """Folder inside the package, with forward slashes."""

    def __post_init__(self) -> None:
        _check_text("package", self.package)
        _check_path(f"the release's package {self.package!r}", self.folder)

    @property
    def name(self) -> str:
        """What SAELens's directory shows as `repo_id`."""
        return f"package:{self.package}/{self.folder}"

    def file(self, path: str, *, force_download: bool = False) -> Path:  # noqa: ARG002
        """The file; a FileNotFoundError where the package was installed without it.

        A ValueError where the package is not imported yet: importing runs its code, which a file of releases must not decide.
        """
        if self.package not in sys.modules:
            raise ValueError(
                f"the release reads files of the package {self.package!r}, which is not imported, and importing it would run "
                f"its code: if you trust it, `import {printable(self.package)}` first"
            )
        folder = Path(str(files(self.package))) / self.folder
        return _existing(folder / path, f"install {self.package} again, with its data")


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
        _check_text("id", self.id)
        _check_path(f"SAE {self.id!r}", self.path)
        _check_text("neuronpedia", self.neuronpedia, optional=True)
        for name in ("variance_explained", "l0"):
            value: Any = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
                shown = value if isinstance(value, float) else f"a {type(value).__name__}"
                raise ValueError(f"SAE {self.id!r} has {name} {shown}; give a number, or leave it out")
        needed = {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME}
        if not needed <= set(self.sha256) <= set(VERIFIED):
            raise ValueError(
                f"SAE {self.id!r} has sha256 of {sorted(self.sha256)}; give one for each of {sorted(needed)}, and for "
                f"{SPARSITY_FILENAME} where there is one (`release_entry(folder)` computes them)"
            )
        digests: Mapping[str, Any] = self.sha256
        for name, digest in digests.items():
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"SAE {self.id!r} has another sha256 of {name} than one of 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Release:
    """SAEs that were published together."""

    name: str
    """What `SAE.from_pretrained(name, id)` is called with."""
    model: str
    source: Source
    saes: tuple[ReleasedSAE, ...]

    def __post_init__(self) -> None:
        _check_text("release", self.name)
        _check_text("model", self.model)
        for what in ("id", "path"):
            values = [getattr(sae, what) for sae in self.saes]
            if len(set(values)) != len(values) or not values:
                raise ValueError(f"release {self.name!r} has SAEs of {what} {values}; give at least one, all different")

    def verified_file(self, sae: ReleasedSAE, name: str, *, force_download: bool = False) -> Path:
        """A file of one SAE; a ValueError where its digest is another than the release's, errors of the source's `file`."""
        path = self.source.file(f"{sae.path}/{name}", force_download=force_download)
        check_sha256(path, sae.sha256[name], f"{name} of SAE {sae.id!r} in release {self.name!r} ({self.source.name})")
        return path


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError for what the hub does not allow as the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"repo_id is {quoted(repo_id)}; give owner and name, as in 'user/repository' ({printable(error)})"
        ) from error


def _check_text(what: str, value: Any, *, optional: bool = False) -> None:
    """Names go into Python code, pages and terminals: they are text that can be seen, and nothing else."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value or printable(value) != value:
        shown = quoted(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{what} of a release is {shown}; give text without control characters, on one line")


def _check_path(whose: str, value: Any) -> None:
    _check_text("path", value)
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in value or value[1:2] == ":":
        raise ValueError(f"{whose} has path {value!r}; give a folder within the source, as in 'a/b'")


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

    Raises:
        FileNotFoundError, ValueError: the folder is no saved SAE, or a damaged one, or says no hook name.
    """
    folder = Path(folder)
    check_folder(folder)
    check_digests(folder)
    with reading(folder, "a saved SAE that loads", remedy=SAVE_AGAIN):
        sae = SAE.load_from_disk(folder, device="cpu")
    check_state_dict(sae.state_dict(), sae.state_dict())  # for what is not finite, of any architecture
    check_sparsity(folder, sae.cfg.d_sae)
    metadata = sae.cfg.metadata
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
    _existing(path, "give the YAML file of a release")
    with reading(path, "a list of releases", remedy=f"see the docstring of {__name__}"):
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return tuple(_release(name, value, path.parent) for name, value in content.items())


def write_releases(releases: Sequence[Release], path: str | Path) -> Path:
    """Write releases as `read_releases` reads them, under a temporary name first."""
    with whole(path) as partial:
        partial.write_text(releases_yaml(releases), encoding="utf-8")
    return Path(path)


def releases_yaml(releases: Sequence[Release]) -> str:
    """Releases as YAML text."""
    content: dict[str, Any] = {}
    for release in releases:
        source = {key: value if isinstance(value, str) else str(value) for key, value in asdict(release.source).items()}
        saes = [{**asdict(sae), "sha256": dict(sae.sha256)} for sae in release.saes]
        content[release.name] = {"model": release.model, **source, "saes": saes}
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


def _existing(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: {remedy}")
    return path


PACKAGED = Path(__file__).with_name("pretrained.yaml")
"""The releases that are installed with the package."""
DIRECTORY = "get_pretrained_saes_directory"
_OURS = "_sae_nfm_original"
_releases: dict[str, Release] = {}


def register_release(
    release: str, *, model: str, source: Source, saes: Sequence[ReleasedSAE], replace: bool = False
) -> Release:
    """Make `SAE.from_pretrained(release, id)` and the rest of SAELens find these SAEs, of any architecture, in this process.

    Registering the same release again is harmless. The files are looked for, and verified, when an SAE is loaded.

    Args:
        saes: the SAEs; `release_entry(folder)` makes an entry from a saved one.
        replace: whether other content under a name that was registered here before is replaced.

    Raises:
        ValueError: the name is taken by SAELens or another package, or was registered here with other content.
    """
    entry = Release(name=release, model=model, source=source, saes=tuple(saes))
    known = _packaged() | _releases
    if entry.name in known and known[entry.name] != entry and not replace:
        raise ValueError(f"release {release!r} has other content already; choose another name or give replace=True")
    directory: dict[str, PretrainedSAELookup] = getattr(pretrained_saes_directory, DIRECTORY)()
    _enter(directory, entry, replace=True)
    _releases[entry.name] = entry
    return entry


def register_releases(path: str | Path, *, replace: bool = False) -> tuple[Release, ...]:
    """Register every release of a YAML file (see the head of this module); raises as `read_releases`, `register_release`."""
    return tuple(
        register_release(one.name, model=one.model, source=one.source, saes=one.saes, replace=replace)
        for one in read_releases(path)
    )


def register_packaged_releases() -> None:
    """Have the packaged releases entered whenever SAELens's directory is read; nothing is read now.

    Calling it again, or re-importing the package, replaces our own layers. A packaged name that is taken by somebody else
    is a ValueError when the directory is read.
    """
    current = getattr(pretrained_saes_directory, DIRECTORY)
    original = getattr(current, _OURS, current)
    layered = _with_our_releases(original)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(DIRECTORY) is current:
            setattr(module, DIRECTORY, layered)
    loader = NAMED_PRETRAINED_SAE_LOADERS["sae_lens"]
    NAMED_PRETRAINED_SAE_LOADERS["sae_lens"] = _strict_hub_loader(getattr(loader, _OURS, loader))


def _with_our_releases(original: Any) -> Callable[[], dict[str, PretrainedSAELookup]]:
    @wraps(original)
    def get_pretrained_saes_directory() -> dict[str, PretrainedSAELookup]:
        directory = original()
        for release in (_packaged() | _releases).values():
            _enter(directory, release)
        return directory

    for name in ("cache_info", "cache_clear"):
        setattr(get_pretrained_saes_directory, name, getattr(original, name))
    setattr(get_pretrained_saes_directory, _OURS, original)
    return get_pretrained_saes_directory


_packaged_releases: dict[str, Release] = {}


def _packaged() -> dict[str, Release]:
    if not _packaged_releases:
        _packaged_releases.update({release.name: release for release in read_releases(PACKAGED)})
    return _packaged_releases


def _enter(directory: dict[str, PretrainedSAELookup], release: Release, *, replace: bool = False) -> None:
    """Put a release into SAELens's directory, and its loaders into SAELens's tables."""
    loader_name = f"sae_nfm:{release.name}"
    present = directory.get(release.name)
    if present is not None and present.conversion_func != loader_name:
        raise ValueError(f"{release.name!r} is taken in SAELens (by {present.repo_id!r}); choose another name")
    loader = _Loader(release=release)
    NAMED_PRETRAINED_SAE_LOADERS[loader_name] = loader.load
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader_name] = loader.config
    if present is not None and not replace:
        return
    neuronpedia: dict[str, Any] = {sae.id: sae.neuronpedia for sae in release.saes}  # None: as in SAELens, no id
    explained = {sae.id: sae.variance_explained for sae in release.saes if sae.variance_explained is not None}
    directory[release.name] = PretrainedSAELookup(
        release=release.name,
        repo_id=release.source.name,
        model=release.model,
        conversion_func=loader_name,
        saes_map={sae.id: sae.path for sae in release.saes},
        expected_var_explained=dict.fromkeys(neuronpedia, 1.0) | explained,  # 1.0 and 0.0: SAELens's for "not known"
        expected_l0={sae.id: sae.l0 or 0.0 for sae in release.saes},
        neuronpedia_id=neuronpedia,
        norm_scaling_factor={},
        config_overrides=None,
    )


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """SAELens's two loader protocols, for one release."""

    release: Release

    def config(
        self,
        repo_id: str,  # noqa: ARG002 (the release knows its source)
        folder_name: str,
        device: str | None = None,
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The verified config of one SAE."""
        path = self.release.verified_file(self._sae(folder_name), SAE_CFG_FILENAME, force_download=force_download)
        config = get_sae_lens_config_from_disk(path.parent, device, cfg_overrides)
        return _checked(config, f"{folder_name}/{SAE_CFG_FILENAME} of release {self.release.name!r}")

    def load(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> Loaded:
        """The verified config, weights and log sparsity of one SAE."""
        sae = self._sae(folder_name)
        config = self.config(repo_id, folder_name, device, force_download, cfg_overrides)
        weights = self.release.verified_file(sae, SAE_WEIGHTS_FILENAME, force_download=force_download)
        config, state_dict = read_sae_components_from_disk(config, weights, device)
        sparsity = None
        if SPARSITY_FILENAME in sae.sha256:
            file = self.release.verified_file(sae, SPARSITY_FILENAME, force_download=force_download)
            with reading(file, remedy="download it again with force_download=True, or restore it"):
                sparsity = load_file(file, device=device)["sparsity"]
        return config, state_dict, sparsity

    def _sae(self, path: str) -> ReleasedSAE:
        return next(sae for sae in self.release.saes if sae.path == path)


def _strict_hub_loader(original: Any) -> Any:
    @wraps(original)
    def sae_lens_huggingface_loader(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> Loaded:
        try:
            config, state_dict, sparsity = original(repo_id, folder_name, device, force_download, cfg_overrides)
        except SafetensorError as error:
            if get_sae_lens_config_from_hf(repo_id, folder_name).get("architecture") not in INFERENCE_CONFIGS:
                raise
            raise ValueError(
                f"a weight file of {folder_name!r} in {repo_id!r} is damaged ({error}); download it again with "
                "force_download=True. If that does not help it was uploaded so: ask who published it"
            ) from error
        return _checked(config, f"{folder_name}/{SAE_CFG_FILENAME} of {repo_id!r}"), state_dict, sparsity

    setattr(sae_lens_huggingface_loader, _OURS, original)
    return sae_lens_huggingface_loader


def _checked(config: dict[str, Any], source: str) -> dict[str, Any]:
    """For our architectures: a complete config, the Neuronpedia id in its metadata, where SAELens's readers look for it."""
    ours = INFERENCE_CONFIGS.get(config.get("architecture", ""))
    if ours is None:
        return config
    refuse_missing_keys(ours, config, source)
    neuronpedia = config.pop("neuronpedia_id", None)
    if neuronpedia is None:
        return config
    return config | {"metadata": config["metadata"] | {"neuronpedia_id": neuronpedia}}
