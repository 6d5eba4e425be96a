"""The embedded language model as a `HookedSAETransformer`.

A GPT-2-shaped model (4 layers, d_model 256, 4 heads, 256 positions, 4,096 byte-level BPE tokens, 4.3M
parameters), kept as a Hugging Face folder in half precision. Weights are neither folded nor centred, as with
`HookedTransformer.from_pretrained_no_processing`: the value at a hook is the value in the raw model.
"""

import warnings
from pathlib import Path

import torch
from sae_lens import HookedSAETransformer
from safetensors.torch import load_model as load_safetensors
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_nfm.demo import MODEL_NAME

MODEL_DIR = Path(__file__).parent / "data" / "model"
"""The packaged Hugging Face folder: config.json, model.safetensors (half precision), tokenizer files."""


def load_model(device: str | torch.device = "cpu") -> HookedSAETransformer:
    """The embedded model with its tokenizer, float32, in eval mode; reads packaged files only, never the hub.

    Id 0 (`<|endoftext|>`) is BOS, EOS and padding. In training one stood before every document;
    `model.to_tokens(text)` puts it there. Because padding and BOS are one id, TransformerLens takes a BOS
    without text after it for padding where a key-value cache is in use: start `model.generate` from a text.

    Raises:
        FileNotFoundError: the package was installed without its data files.
    """
    return hooked_gpt2(load_gpt2(MODEL_DIR), load_tokenizer(MODEL_DIR), name=MODEL_NAME, device=device)


def load_gpt2(folder: Path) -> GPT2LMHeadModel:
    """The Hugging Face model of a folder, float32 whatever the precision on disk, in eval mode.

    Strict: a missing, extra or misshapen tensor is an error that names it; a tied one is stored once.

    Raises:
        FileNotFoundError: the folder has no config.json or no model.safetensors.
        RuntimeError: the tensors are not those of the config.
    """
    for name in ("config.json", "model.safetensors"):
        _require(folder / name)
    config = GPT2Config.from_json_file(folder / "config.json")
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: the caller's random state stays
        model = GPT2LMHeadModel(config)
    load_safetensors(model, folder / "model.safetensors")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, putting BOS in front of every text.

    `add_bos_token=True` stands here because TransformerLens otherwise loads the tokenizer again, by its name.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
    """
    _require(folder / "tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(folder, add_bos_token=True, local_files_only=True)


def hooked_gpt2(
    gpt2: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    name: str,
    device: str | torch.device = "cpu",
) -> HookedSAETransformer:
    """A Hugging Face GPT-2 as a `HookedSAETransformer` of the same logits and raw weights, in eval mode."""
    hf = gpt2.config
    cfg = HookedTransformerConfig(
        model_name=name,
        original_architecture="GPT2LMHeadModel",
        n_layers=hf.n_layer,
        d_model=hf.n_embd,
        n_ctx=hf.n_positions,
        n_heads=hf.n_head,
        d_head=hf.n_embd // hf.n_head,
        d_mlp=hf.n_inner or 4 * hf.n_embd,
        d_vocab=hf.vocab_size,
        act_fn=hf.activation_function,
        eps=hf.layer_norm_epsilon,
        normalization_type="LN",
        default_prepend_bos=True,
        init_weights=False,
        device=str(device),
    )
    with warnings.catch_warnings():  # SAELens builds on this class: its deprecation is nothing the caller can act on
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedSAETransformer(cfg, tokenizer, default_padding_side="right")
    model.load_and_process_state_dict(
        convert_gpt2_weights(gpt2, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; expected a Hugging Face folder with config.json, model.safetensors and "
            "tokenizer.json (the packaged one is written by `python docs/embedded_model/convert_lm.py --source FOLDER`)"
        )
