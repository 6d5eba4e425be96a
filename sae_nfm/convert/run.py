"""The job of `sae-nfm convert`: a checkpoint of another package, or of SAELens, becomes a SAELens folder.

    author                 the paper's joint_sae_nfm_model.pt                 -> joint_nfm
    saelens                TopK or JumpReLU, finished or a checkpoint         -> joint_nfm, whose NFM writes zero
    dictionary_learning    AutoEncoderTopK                                    -> topk, or joint_nfm likewise
                           BatchTopKSAE, MatryoshkaBatchTopKSAE               -> jumprelu, or joint_nfm likewise
    sparsify               SparseCoder with activation topk                   -> topk, or joint_nfm likewise

Each format has a module of its own, which says what the format computes. Nothing is written unless all of it was read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME, SPARSIFY_WEIGHTS_FILENAME

from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.common import check_numbers, check_output, publishing
from sae_nfm.common.file_errors import python_string
from sae_nfm.convert import dictionary_learning, paper_author
from sae_nfm.convert.dictionary_learning import dictionary_learning_loader
from sae_nfm.convert.paper_author import NFM_TOP_K, K, author_sae
from sae_nfm.convert.sparsify import sparsify_loader
from sae_nfm.convert.warm_start import plain_sae, with_silent_nfm

Format = Literal["auto", "author", "saelens", "dictionary_learning", "sparsify"]
KNOWN_BY = {
    paper_author.WEIGHTS_FILENAME: "author",
    SAE_WEIGHTS_FILENAME: "saelens",
    dictionary_learning.WEIGHTS_FILENAME: "dictionary_learning",
    SPARSIFY_WEIGHTS_FILENAME: "sparsify",
}
"""The file that a folder of each format has."""
METADATA = {"model_name": "model", "hook_name": "hook", "context_size": "context_size", "prepend_bos": "prepend_bos"}
"""What goes into the metadata, with the option for it."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and what its files do not say."""

    source: Path
    """Folder of one SAE, or the .pt file of one."""
    output: Path
    """Folder to write; an SAE that is there is kept beside it."""
    format: Format = "auto"
    """Whose format it is: the paper's author's, SAELens's, dictionary_learning's or sparsify's; auto looks at the file names."""
    to: Literal["auto", "joint_nfm"] = "auto"
    """joint_nfm adds an NFM that writes zero to an SAE of dictionary_learning or sparsify, which else becomes SAELens's topk or
    jumprelu. What comes from SAELens or the author becomes joint_nfm in any case."""
    statistics: Path | None = None
    """File with mean and std of the activations (.safetensors, .npz or .json): the author's models were trained on standardised
    ones, and do not hold them."""
    k: int | None = None
    """Active features a token of the author's model; the paper's 1024 unless given. The other formats say theirs."""
    nfm_top_k: int | None = None
    """How many of these the NFM reads; unless given the paper's 512 for the author's models, and all for an added NFM."""
    nfm_dim: int = 64
    """Interaction dimensions of an added NFM."""
    seed: int = 0
    """Seed of an added NFM's V and W_1."""
    model: str | None = None
    """The language model, for the metadata; what the source says unless given."""
    hook: str | None = None
    """The hook point, as in blocks.16.hook_resid_pre, for the metadata; what the source says unless given."""
    context_size: int | None = None
    """Tokens in a row, for the metadata; what the source says unless given."""
    prepend_bos: bool | None = None
    """Whether rows begin with BOS, for the metadata; what the source says unless given, and true where it is silent."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` did."""

    folder: Path
    kept: Path | None
    """Where an SAE that was there before is."""
    format: str
    architecture: str
    sizes: dict[str, int | None]
    """d_in, d_sae, and where the architecture has them k, nfm_dim and nfm_top_k (None: all)."""
    assumed: tuple[str, ...]
    """What was neither in the files nor given, and what was taken for it."""
    unknown: tuple[str, ...]
    """Metadata that is neither in the files nor given."""

    def words(self) -> str:
        """What it is, what is not known of it, and how it is loaded."""
        sizes = ", ".join(f"{name} {'all' if value is None else f'{value:,}'}" for name, value in self.sizes.items())
        lines = [f"Converted from {self.format} to {self.architecture} ({sizes}): {self.folder}"]
        lines += [f"The SAE that was there is kept in {self.kept}"] if self.kept else []
        lines += [f"Not in the files, assumed: {'; '.join(self.assumed)}"] if self.assumed else []
        if self.unknown:
            flags = ", ".join(f"--{METADATA[name].replace('_', '-')}" for name in self.unknown)
            lines.append(
                f"Not in the files, and needed to use it in a language model: {flags}; convert again with them"
            )
        load = ["import sae_nfm", "from sae_lens import SAE", f"sae = SAE.load_from_disk({python_string(self.folder)})"]
        return "\n".join([*lines, "In Python:", *(f"    {line}" for line in load)])


def convert(config: ConvertConfig) -> Converted:
    """Convert one SAE.

    Raises:
        ValueError, FileNotFoundError: for a source that is damaged, mismatched, of an unknown kind or not there, an option that
            is missing or means nothing for it, an output that is something else. Nothing is written.
    """
    check_output(config.output, only_sae=True)
    form = detected(config.source) if config.format == "auto" else config.format
    _refuse_idle_options(config, form)
    sae = _read(config, form)
    _describe(sae, config, form)
    with publishing(config.output, "convert") as made:
        sae.save_model(made.folder)
    of_topk = () if getattr(sae.cfg, "k", None) is None else ("k",)
    names = ("d_in", "d_sae", *of_topk, "nfm_dim", "nfm_top_k")
    return Converted(
        kept=made.kept,
        folder=config.output,
        format=form,
        architecture=sae.cfg.architecture(),
        sizes={name: getattr(sae.cfg, name) for name in names if hasattr(sae.cfg, name)},
        assumed=_assumed(config, form),
        unknown=tuple(name for name in METADATA if sae.cfg.metadata.get(name) is None),
    )


def detected(source: Path) -> str:
    """The format of a folder or file, by the names of the files; an error when there is none, or several."""
    if source.is_file():
        beside = (source.parent / "config.json").is_file() or (source.parent.parent / "config.json").is_file()
        return "dictionary_learning" if beside and source.name.startswith("ae") else "author"
    if not source.is_dir():
        raise FileNotFoundError(f"no folder or file {str(source)!r}; give where the SAE is")
    found = [form for name, form in KNOWN_BY.items() if (source / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{str(source)!r} has files of several formats ({', '.join(found)}); say which by --format")
    formats = ", ".join(f"{form} has {name}" for name, form in KNOWN_BY.items())
    raise ValueError(f"{str(source)!r} has no file of a known format ({formats}); give the folder of one SAE")


def _adds_nfm(config: ConvertConfig, form: str) -> bool:
    return form == "saelens" or (form != "author" and config.to == ARCHITECTURE)


def _refuse_idle_options(config: ConvertConfig, form: str) -> None:
    """An option that would change nothing is a mistake about the source."""
    idle: list[str] = []
    if form != "author":
        idle += [name for name in ("statistics", "k") if getattr(config, name) is not None]
        idle += ["nfm_top_k"] if config.nfm_top_k is not None and not _adds_nfm(config, form) else []
    if not _adds_nfm(config, form):
        usual = {name: ConvertConfig.__dataclass_fields__[name].default for name in ("nfm_dim", "seed")}
        idle += [name for name, value in usual.items() if getattr(config, name) != value]
    if idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{flags} would change nothing for the format {form} without an added NFM; leave it out")


def _read(config: ConvertConfig, form: str) -> SAE[Any]:
    if form == "author":
        given = {name: getattr(config, name) for name in ("k", "nfm_top_k") if getattr(config, name) is not None}
        return author_sae(config.source, config.statistics, **given)
    if form == "saelens":
        sae: SAE[Any] = plain_sae(config.source)
    else:
        loader = dictionary_learning_loader if form == "dictionary_learning" else sparsify_loader
        sae = SAE.load_from_disk(config.source, converter=loader)
    if not _adds_nfm(config, form):
        return sae
    return with_silent_nfm(sae, seed=config.seed, nfm_dim=config.nfm_dim, nfm_top_k=config.nfm_top_k)


def _describe(sae: SAE[Any], config: ConvertConfig, form: str) -> None:
    """Put the options into the metadata, and where the SAE is from."""
    metadata = sae.cfg.metadata
    for name, option in METADATA.items():
        if (value := getattr(config, option)) is not None:
            metadata[name] = value
    metadata["converted_from"] = f"{form}: {config.source.absolute().name}"
    if config.hook is not None:  # read when the folder is loaded, which fails where the two do not agree
        sae.cfg.reshape_activations = "hook_z" if config.hook.endswith("hook_z") else "none"


def _assumed(config: ConvertConfig, form: str) -> tuple[str, ...]:
    if form != "author":
        return ()
    usual = {"k": K, "nfm_top_k": NFM_TOP_K}
    return tuple(f"{name} = {value}, the paper's" for name, value in usual.items() if getattr(config, name) is None)
