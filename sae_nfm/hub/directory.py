"""Pretrained releases behind SAELens's own doors, every file verified by its sha256.

    import sae_nfm
    sae = SAE.from_pretrained("sae-nfm-demo", "blocks.2.hook_resid_post")        # packaged, works offline

    entry = release_entry("runs/mine")                                           # digests of a saved SAE
    register_release("mine", model="gpt2", source=FolderSource(folder="runs"), saes=[entry])
    register_releases("pretrained.yaml")                                         # a file of releases, such as `push` writes

SAELens keeps its releases in one cached dictionary, read from a large YAML file when first asked for (about a second). Ours
are entered when that happens, so that importing the package stays cheap: `get_pretrained_saes_directory` gets a layer, in
every module that has imported it by name. Each release has a loader of its own, because SAELens tells a loader neither the
release nor the revision. The loader of plain hub repositories gets a layer too, for our architectures only: it refuses an
incomplete config and says what a damaged file means.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

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
from sae_nfm.hub.release import (
    FolderSource,
    HubSource,
    PackageSource,
    Release,
    ReleasedSAE,
    Source,
    read_releases,
    release_entry,
)

__all__ = [
    "FolderSource",
    "HubSource",
    "PackageSource",
    "Release",
    "ReleasedSAE",
    "read_releases",
    "register_packaged_releases",
    "register_release",
    "register_releases",
    "release_entry",
]

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
        release: name of the release.
        model: name of the language model.
        source: where the files lie: `HubSource`, `FolderSource` or `PackageSource`.
        saes: the SAEs; `release_entry(folder)` makes an entry from a saved one.
        replace: whether other content under a name that was registered here before is replaced.

    Raises:
        ValueError: the name is taken by SAELens or another package, or was registered here with other content.
    """
    entry = Release(name=release, model=model, source=source, saes=tuple(saes))
    known = _packaged() | _releases
    if entry.name in known and known[entry.name] != entry and not replace:
        raise ValueError(
            f"release {release!r} is registered already, with other content; choose another name or give replace=True"
        )
    directory: dict[str, PretrainedSAELookup] = getattr(pretrained_saes_directory, DIRECTORY)()
    _enter(directory, entry, replace=True)
    _releases[entry.name] = entry
    return entry


def register_releases(path: str | Path, *, replace: bool = False) -> tuple[Release, ...]:
    """Register every release of a YAML file; its format is in the docstring of `sae_nfm.hub.release`.

    Raises:
        FileNotFoundError, ValueError: see `read_releases` and `register_release`.
    """
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
        raise ValueError(
            f"release name {release.name!r} is taken in SAELens's directory (by {present.repo_id!r}); choose another name"
        )
    loader = _Loader(release=release)
    NAMED_PRETRAINED_SAE_LOADERS[loader_name] = loader.load
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader_name] = loader.config
    if present is not None and not replace:
        return
    neuronpedia: dict[str, Any] = {
        sae.id: sae.neuronpedia for sae in release.saes
    }  # None, as in SAELens, without an id
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
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
        """The verified config, weights and log sparsity of one SAE."""
        sae = self._sae(folder_name)
        config = self.config(repo_id, folder_name, device, force_download, cfg_overrides)
        weights = self.release.verified_file(sae, SAE_WEIGHTS_FILENAME, force_download=force_download)
        config, state_dict = read_sae_components_from_disk(config, weights, device)
        sparsity = None
        if SPARSITY_FILENAME in sae.sha256:
            file = self.release.verified_file(sae, SPARSITY_FILENAME, force_download=force_download)
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
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
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
    return (
        config if neuronpedia is None else config | {"metadata": config["metadata"] | {"neuronpedia_id": neuronpedia}}
    )
