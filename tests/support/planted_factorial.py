"""A model and a joint_nfm SAE made by hand, in which one pair of features writes what it means to have both levels.

The residual stream passes through unchanged and is not normalised. Features 0 and 1 are stronger where the first and the second
factor have their first level, 2 to 5 are noise; each reads and writes a dimension of its own. The words of bucket c read
dimension 8 + c, those of cell 0 alone what the pair (0, 1) writes; features 0 and 1 move all words, each bucket differently.
One more token has nearly all the probability, so that log-probabilities are logits less a constant.
"""

from typing import Any

import numpy as np
import torch
from builders import inference_sae, training_config
from sae_lens import SAE, HookedSAETransformer
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from sae_nfm.experiments.factorial.stimuli import Cell, Factor, StimulusSet

HOOK, D_MODEL, WORDS = "blocks.0.hook_resid_pre", 16, 4
GAIN = 0.8
"""What the pair (0, 1) adds to the logits of cell 0's words, for each unit of f_0 f_1."""
MAIN = torch.tensor([[0.9, -0.4, 0.5, 0.2], [0.3, 0.6, -0.7, 0.1]])
"""What features 0 and 1 add to the logits of each bucket's words, for each unit."""
LEVELS = ((1, 1), (1, 0), (0, 1), (0, 0))


def stimuli(per_cell: int) -> StimulusSet:
    """Sentences of one token, `s<cell>.<number>`, and words `w<cell>.<number>`."""
    names = (("high", "low"), ("up", "down"))
    cells = tuple(
        Cell(
            levels=(names[0][1 - a], names[1][1 - b]),
            sentences=tuple(f"s{c}.{k}" for k in range(per_cell)),
            words=tuple(f"w{c}.{k}" for k in range(WORDS)),
        )
        for c, (a, b) in enumerate(LEVELS)
    )
    factors = tuple(Factor(name=f"factor {i}", levels=names[i]) for i in range(2))
    return StimulusSet(name="planted", factors=(factors[0], factors[1]), cells=(cells[0], cells[1], cells[2], cells[3]))


def activations(per_cell: int, seed: int = 0) -> torch.Tensor:
    """[4 x per_cell, 6], features 0 to 5 on each sentence."""
    rng = np.random.default_rng(seed)
    f = 0.5 + 0.6 * rng.random((4 * per_cell, 6))
    f[:, :2] += np.repeat(np.array(LEVELS), per_cell, axis=0)
    return torch.from_numpy(f).float()


def model(per_cell: int, seed: int = 0) -> HookedSAETransformer:
    """The language model."""
    texts = stimuli(per_cell)
    vocabulary = {"<bos>": 0, "<rest>": 1} | {text: i for i, text in enumerate([*texts.sentences, *texts.words], 2)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(vocabulary),
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<bos>",
        add_bos_token=True,  # else TransformerLens loads the tokenizer again, by its name
        name_or_path="planted",
    )
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=D_MODEL,
        n_heads=1,
        d_head=D_MODEL,
        d_vocab=len(vocabulary),
        n_ctx=8,
        attn_only=True,
        normalization_type=None,
        seed=0,
        device="cpu",
    )
    with torch.random.fork_rng():
        found = HookedSAETransformer(cfg, tokenizer, default_padding_side="right").eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
        words = torch.arange(len(texts.sentences) + 2, len(vocabulary))
        bucket = torch.from_numpy(texts.cell_of_word)
        found.embed.W_E[2 : 2 + 4 * per_cell, :6] = activations(per_cell, seed)
        found.unembed.W_U[:2, words] = MAIN[:, bucket]
        found.unembed.W_U[8 + bucket, words] = 1.0
        found.unembed.W_U[2:6, words] = 0.1 * torch.randn(4, len(words), generator=torch.Generator().manual_seed(1))
        found.unembed.b_U[1] = 18.0
    return found


def sae(*, planted: bool) -> SAE[Any]:
    """The SAE: without the planted pair v_0*v_1 is 0, and the pairs of noise features write all the same."""
    metadata = SAEMetadata(model_name="planted", hook_name=HOOK, context_size=8, prepend_bos=True)
    sizes = {"d_in": D_MODEL, "d_sae": 8, "k": 6, "nfm_dim": 4, "nfm_top_k": None, "use_square_path": False}
    found = inference_sae(training_config("joint_nfm", HOOK, metadata=metadata, **sizes))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
        found.W_enc[:8, :8] = torch.eye(8)
        found.W_dec[:8, :8] = torch.eye(8)
        found.V[0, 0], found.V[1, 0 if planted else 1] = 1.0, 1.0
        found.V[2:6, 1:] = torch.tensor([[1.0, 0.5, 0], [0, 1, 0.5], [0.5, 0, 1], [1, 1, 1]])
        found.W_1.copy_(torch.eye(4))
        found.W_2[0, 8] = GAIN
        found.W_2[1:, 8:12] = 0.4 * torch.tensor([[1.0, -1, 1, 0], [0, 1, -1, 1], [-1, 0, 1, 1]])
    return found


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    found = Tokenizer(WordLevel(vocabulary, unk_token="<rest>"))
    found.pre_tokenizer = WhitespaceSplit()
    return found
