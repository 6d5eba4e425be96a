"""The README.md of a hub repository of SAEs: what they are, how to load them, what was measured, and how far to trust it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

from huggingface_hub import ModelCardData

from sae_nfm.architectures import INFERENCE_CONFIGS, SKIP_TRANSCODER, TRANSCODER
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.architectures.sequential_config import ARCHITECTURE as SEQUENTIAL
from sae_nfm.common import printable, python_string
from sae_nfm.comparison.results import PUBLISHED, CompareResult, cells, legend
from sae_nfm.hub.release import ReleasedSAE

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".txt", ".csv", ".gz", ".zst", ".arrow")
TAGS = ("sparse-autoencoder", "interpretability", "saelens", "transformer-lens")
PAPER = "[arXiv 2507.00269](https://arxiv.org/abs/2507.00269)"
NOT_MEASURED = (
    "Nothing was measured on held-out text when this was published. Before building on these SAEs, measure FVU, KL and "
    "cross-entropy on text of your own, beside a TopK SAE of equal size: `sae-nfm demo --help`."
)
DIRECT_PATH = (
    "`joint_nfm` divides its reconstruction between a direct path (features) and paths that read feature pairs. Its direct "
    "path was never trained to stand alone: a comparison of all paths with the direct path alone shows how the model divides "
    "its work, not that interactions help. For that, compare with an SAE trained on its own."
)


@dataclass(frozen=True, kw_only=True)
class CardSAE:
    """One SAE of the card."""

    entry: ReleasedSAE
    config: dict[str, Any]
    """Its cfg.json."""
    runner: dict[str, Any] | None = None
    """Its runner_cfg.json, where there is one."""
    row: str | None = None
    """Its row in the demo's table, where that is not its id."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What its config says of how it was trained; nothing where that is no JSON object."""
        metadata = self.config.get("metadata")
        return cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}


def model_card(
    load_from: str, saes: Sequence[CardSAE], *, result: CompareResult | None = None, license: str | None = None
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        load_from: first argument of `SAE.from_pretrained`: a hub repository or a release.
        result: the demo they come from; its table is printed as it is, the paper's comparison beside the fair one.
        license: the licence of the weights as the hub names it, such as "mit".
    """
    architectures = sorted({str(sae.config.get("architecture")) for sae in saes})
    header = ModelCardData(library_name="saelens", license=license, tags=[*TAGS, *architectures])
    name = load_from.split("/")[-1]
    parts = [f"---\n{header.to_yaml()}\n---\n\n# {plain(name)}", _what(saes, architectures)]
    parts += [_load(load_from, saes, architectures)]
    parts += ["## How faithful they are", NOT_MEASURED if result is None else _figures(saes, result)]
    parts += ["## How they were trained", _training(saes, result)]
    parts += ["## Limits", _limits(architectures, published=result is None)]
    parts += ["## Licence", plain(license or "") or "None is stated: ask who published this before using the weights."]
    return "\n\n".join(parts) + "\n"


def _what(saes: Sequence[CardSAE], architectures: Sequence[str]) -> str:
    text = "Sparse autoencoders for [SAELens](https://github.com/decoderesearch/SAELens)."
    if ARCHITECTURE in architectures:
        text += (
            f" `{ARCHITECTURE}` is a TopK SAE trained jointly with a Neural Factorization Machine, which adds products of "
            f"feature pairs to the reconstruction ({PAPER}); the architecture comes with the package `sae-nfm`."
        )
    if {TRANSCODER, SKIP_TRANSCODER} & set(architectures):
        text += (
            f" `{TRANSCODER}` and `{SKIP_TRANSCODER}` go from what an MLP reads (the hook point) to what it writes "
            "(`metadata.hook_name_out`), with such a machine; they come with the package `sae-nfm`."
        )
    if SEQUENTIAL in architectures:
        named = {plain(without_folders(sae.config["base"])) for sae in saes if sae.config.get("base")}
        bases = ", ".join(sorted(named))
        text += (
            f" `{SEQUENTIAL}` is a pretrained SAE{bases and f' ({bases})'}, as it was, with such a machine "
            "trained on its residual; the architecture comes with the package `sae-nfm`."
        )
    head = ("id", "architecture", "language model", "hook point", "d_in", "d_sae", "k", "L0", "variance explained")
    rows = [
        (
            as_code(sae.entry.id),
            plain(sae.config.get("architecture")),
            plain(without_folders(sae.metadata.get("model_name"))),
            as_code(sae.metadata.get("hook_name")),
            *(plain(sae.config.get(name)) for name in ("d_in", "d_sae", "k")),
            None if sae.entry.l0 is None else f"{sae.entry.l0:.1f}",
            None if sae.entry.variance_explained is None else f"{sae.entry.variance_explained:.4f}",
        )
        for sae in saes
    ]
    return f"{text}\n\n{_table(head, rows)}"


def _load(load_from: str, saes: Sequence[CardSAE], architectures: Sequence[str]) -> str:
    ours = [name for name in architectures if name in INFERENCE_CONFIGS]
    code = [
        *([f"import sae_nfm  # registers {' and '.join(ours)} with SAELens"] if ours else []),
        "from sae_lens import SAE",
        "",
        f"sae = SAE.from_pretrained({python_string(load_from)}, {python_string(saes[0].entry.id)})",
    ]
    lines = ["## How to load them", "    pip install sae-nfm", "```python\n" + "\n".join(code) + "\n```"]
    if ours:
        lines.append(f"`KeyError: '{ours[0]}'` from SAELens means that `import sae_nfm` did not come first.")
    if "/" in load_from:
        folder = f"FOLDER/{saes[0].entry.path}"
        lines.append(
            "To have every file checked against its sha256 in `pretrained.yaml`, and to load offline afterwards:\n\n"
            f"    sae-nfm pull {shlex.quote(printable(load_from))} FOLDER\n\n"
            f"then {as_code(f'SAE.load_from_disk({python_string(folder)})')}."
        )
    return "\n\n".join(lines)


def _figures(saes: Sequence[CardSAE], result: CompareResult) -> str:
    meanings, tokens = legend(result.columns), result.rows[0].tokens
    named = "".join(f"{as_code(sae.entry.id)} is the row {plain(sae.row)}. " for sae in saes if sae.row is not None)
    rows = [tuple(map(plain, row)) for row in cells(result.rows, result.columns)]
    findings = printable(result.findings(), keep="\n")
    fence = "`" * max(3, 1 + _longest_run(findings))
    return (
        f"{named}Spliced into the language model, averaged over {tokens:,} held-out tokens, special tokens and position 0 left "
        f"out. {meanings[0].upper()}{meanings[1:]}.\n\n{_table(result.columns, rows)}\n\n"
        f"{fence}\n{findings}\n{fence}"
    )


def _training(saes: Sequence[CardSAE], result: CompareResult | None) -> str:
    metadata, runner = saes[0].metadata, saes[0].runner or {}
    facts: dict[str, Any] = {
        "data": without_folders(metadata.get("dataset_path")),
        "tokens trained on": runner.get("training_tokens"),
        "context size": metadata.get("context_size"),
        "batch size": runner.get("train_batch_size_tokens"),
        "learning rate": runner.get("lr"),
        "SAELens": metadata.get("sae_lens_training_version"),
    }
    if result is not None:
        config = result.provenance.get("config", {})
        facts["tokens trained on"] = config.get("training_tokens")
        facts["learning rate"] = next(iter(config.get("learning_rates", ())), None)
        facts["seeds"] = ", ".join(map(str, result.provenance.get("seeds", ())))
        versions = result.provenance.get("versions", {})
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    texts = {name: f"{value:,}" if isinstance(value, int) else plain(value) for name, value in facts.items() if value}
    stated = [f"- {name}: {text}" for name, text in texts.items()]
    return "\n".join(stated) or "Not recorded."


def _limits(architectures: Sequence[str], *, published: bool) -> str:
    limits = ["They hold for one language model at one hook point and for text like the training data."]
    if ARCHITECTURE in architectures:
        limits += [DIRECT_PATH, *([PUBLISHED] if published else [])]  # else it stands under the table
    return "\n".join(f"- {limit}" for limit in limits)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def plain(value: Any) -> str:
    """A text from a file in a line of Markdown: no markup, link or cell's end comes of it."""
    text = (
        "" if value is None else printable(value).replace("&", "&amp;").replace("<", "&lt;").replace("://", "&#58;//")
    )
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text)


def as_code(value: Any) -> str:
    """A text as code in a line of Markdown, or in a cell of a table."""
    text = printable(value)
    ticks = "`" * (1 + _longest_run(text))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def without_folders(source: Any) -> str:
    """The name of a data set, model or SAE as it is on the hub; the last part alone where it is a path of some machine."""
    text = str(source or "")
    parts = [part for part in re.split(r"[\\/]+", text.partition("?")[0]) if part]
    is_path = re.match(r"[\\/.~]|[A-Za-z]:[\\/]", text) or "\\" in text or "://" in text or Path(text).exists()
    is_path = is_path or (
        ":" not in text and (len(parts) > 2 or (parts and PurePath(parts[-1]).suffix in DATA_SUFFIXES))
    )
    return parts[-1] if is_path and parts else text
