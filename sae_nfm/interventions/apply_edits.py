"""Edits at work: in an SAE that is at work in a language model, whoever put it there.

    with Splice(sae=sae, edits=[one]).on(model):        # an arm
        with editing(model, sae, [another]):            # and more, for a while; after those of the splice
            logits = model(tokens)

    model.add_sae(sae, use_error_term=True)             # SAELens's own way
    with editing(model, sae, [one]): ...

The clean pass that SAELens's error term is computed from has the hooks switched off, and the edits with them.
"""

from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sae_lens import SAE, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from sae_nfm.interventions.edit_targets import TokensInTurn
from sae_nfm.interventions.edits import SAEEdit
from sae_nfm.interventions.path_inputs import READ_AT, Path, PathReads
from sae_nfm.models import Attached, HookFunction, LanguageModel, SpecialTokens, tokens_read

READS = "sae_nfm path reads"
"""Key in the context of the hook point of the features: what the paths read in this pass."""
PATH_READ_AT: dict[str, Path] = {point: path for path, point in READ_AT.items()}
_SPLICED: "WeakKeyDictionary[nn.Module, list[tuple[SAE[Any], Attached]]]" = WeakKeyDictionary()
"""SAEs that a `Splice` has put into a model."""


@contextmanager
def editing(
    model: LanguageModel, sae: SAE[Any], edits: Sequence[SAEEdit], *, special_tokens: SpecialTokens = "kept"
) -> Generator[None]:
    """Edit an SAE that is at work in a model already, by `hooks.Splice` or the model's own `add_sae`.

    Contexts nest: edits of the inner one act after those of the outer one. Features in the trace of a splice are those before
    an inner context's edits.

    Args:
        sae: the SAE itself, not a copy.
        edits: in the order in which they act.
        special_tokens: whether edits leave special tokens out ("kept"), also where the SAE does not.

    Raises:
        ValueError: when the SAE is not at work in the model, or has nothing that an edit could change.
    """
    found = _attached(model, sae)
    with at_work(model, sae, found, edits, special_tokens):
        yield


@contextmanager
def at_work(
    model: LanguageModel, sae: SAE[Any], found: Attached, edits: Sequence[SAEEdit], special_tokens: SpecialTokens
) -> Generator[None]:
    """Edits in an SAE whose hook points are known; inner contexts of `editing` find it.

    Raises:
        ValueError: when the SAE has nothing that an edit could change.
    """
    spliced, entry = _SPLICED.setdefault(model, []), (sae, found)
    spliced.append(entry)
    try:
        with tokens_read(model) as read:
            tokens = TokensInTurn(model=model, read=read, special_tokens=special_tokens)
            with found.hooks(hook_functions(sae, edits, tokens)):
                yield
    finally:
        spliced.remove(entry)
        sae.hook_sae_acts_post.ctx.pop(READS, None)


def hook_functions(sae: SAE[Any], edits: Sequence[SAEEdit], tokens: TokensInTurn) -> dict[str, HookFunction]:
    """Functions for hook points of an SAE that make edits, by hook point.

    Where what a path reads is edited or needed, the last thing done at its hook point is to note it for those who need it: in
    nested contexts the innermost notes it as the path gets it.

    Raises:
        ValueError: when the SAE has nothing that an edit could change.
    """
    by_point = defaultdict[str, list[SAEEdit]](list)
    for edit in edits:
        edit.check(sae)
        by_point[edit.hook_point].append(edit)
    for edit in edits:
        if edit.needs is not None:
            by_point[READ_AT[edit.needs]]  # an empty list, where none is there
    return {point: _in_turn(sae, point, several, tokens) for point, several in by_point.items()}


def _in_turn(sae: SAE[Any], point: str, edits: Sequence[SAEEdit], tokens: TokensInTurn) -> HookFunction:
    def edit_all(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        context, edited = sae.hook_sae_acts_post.ctx, (value.to_dense() if value.is_sparse else value).flatten(2)
        reads: PathReads = context.setdefault(READS, PathReads())
        for edit in edits:
            if edit.needs is not None and edit.needs not in reads:
                raise ValueError(f"{edit.identity!r} needs the features of the same pass; call encode before decode")
            edited = edit.edited(sae, edited, reads, tokens.chosen(edit.where, edited))
        if point in PATH_READ_AT:
            reads[PATH_READ_AT[point]] = edited
        return edited.reshape(value.shape)

    return edit_all


def _attached(model: LanguageModel, sae: SAE[Any]) -> Attached:
    """How the hook points of an SAE at work in a model are reached."""
    for other, found in reversed(_SPLICED.get(model, [])):
        if other is sae:
            return found
    if not isinstance(model, HookedProxyLM) and any(other is sae for other in model.acts_to_saes.values()):
        if isinstance(model, SAETransformerBridge):
            return Attached(owner=model, prefix=model.get_sae_hook_name(sae, ""))
        metadata = sae.cfg.metadata
        return Attached(owner=model, prefix=f"{metadata.hook_name_out or metadata.hook_name}.")
    raise ValueError(
        f"the SAE for {sae.cfg.metadata.hook_name!r} is not at work in this model; put it there first, with "
        "hooks.Splice(sae=sae).on(model) or model.add_sae(sae)"
    )
