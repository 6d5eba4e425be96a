"""Tiny random Hugging Face checkpoints of the families people train SAEs on, written as local folders."""

from pathlib import Path
from typing import Any

import torch
from builders import D_MODEL, D_VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

N_CTX = 32
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHAPE = SPECIAL | {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": N_CTX,
}
FAMILIES = ("gpt2", "neox", "llama", "gemma", "gemma2")
HF_BLOCK = {"gpt2": "transformer.h.0", "neox": "gpt_neox.layers.0"} | dict.fromkeys(FAMILIES[2:], "model.layers.0")
"""What Hugging Face calls the first block."""


def new_model(family: str) -> PreTrainedModel:
    """An untrained model; where a family has an option that TransformerLens could overlook, it is not at its default."""
    if family == "gpt2":
        shape = {"n_embd": D_MODEL, "n_layer": 2, "n_head": 2, "n_positions": N_CTX, "n_inner": 40}
        return GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB, **shape, **SPECIAL))
    if family == "neox":
        rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
        return GPTNeoXForCausalLM(GPTNeoXConfig(rope_parameters=rope, **SHAPE))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, head_dim=12, **SHAPE))
    if family == "gemma":
        return GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, head_dim=12, **SHAPE))
    scale = {"query_pre_attn_scalar": 10, "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=12, **scale, **SHAPE))


def write_checkpoint(folder: Path, model: PreTrainedModel | str, *, tokenizer: bool = True) -> Path:
    """Give a model, or a new one of a family, random weights (biases and norms too) and write it to a folder."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = new_model(model) if isinstance(model, str) else model
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer:
        new_tokenizer().save_pretrained(folder)
    return folder


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """One checkpoint of each family, in a folder named like a model that TransformerLens knows by name."""
    return {family: write_checkpoint(folder / f"llama-7b-{family}", family) for family in FAMILIES}


def new_tokenizer() -> Any:
    """Words t1 ... t49, as in `builders.tiny_model`; id 0 is BOS, EOS and padding."""
    vocabulary = {"<bos>": 0} | {f"t{i}": i for i in range(1, D_VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>", model_max_length=N_CTX
    )
