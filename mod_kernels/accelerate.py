"""Let the MoD blocks of a model run as one fused op each, in inference."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from . import foreign
from .nn._folding import why_not_fusible
from .nn._spec_cache import SpecCache
from .nn.mod_block import MoDBlock
from .recognise import Plan, Refused, readings, recognise, why_not_as_described

# So many are named where there is nothing to accelerate; a large network may have one in each of its blocks.
_MOST_NAMED = 8


class NoBlocks(ValueError):
    """There is nothing in the model to accelerate."""


def accelerate(model: nn.Module, overwrite_input: bool = False) -> nn.Module:
    """Change ``model`` in place so that its MoD blocks run fused in inference, and return it.

    In eval mode, where no gradient is needed, each block that can runs as one op with its BN folded
    (:func:`mod_kernels.functional.mod_block`). In training mode, with gradients, with a hook on one of the
    block's parts or with a BN in training mode, the ordinary path runs, call by call. Submodules, parameters
    and ``state_dict`` stay what they are; ``.to``, ``.half``, ``load_state_dict``, ``copy.deepcopy`` and
    pickling work, and a fold of weights that have changed is never used. Under ``torch.compile`` the fold is
    part of the graph. Lowest overhead under ``torch.inference_mode()`` or ``torch.no_grad()``.

    MoD blocks are: :class:`mod_kernels.nn.MoDBlock`; modules of the classes given to
    :func:`mod_kernels.register_mod_block`; and modules that are recognised as the paper's block written in plain
    PyTorch, by the shapes of their layers and then by comparing what a copy of them computes in float64, on random
    weights and inputs, with the reference. A module that agrees with no form of the block is left alone.

    Foreign blocks keep their class as a base: ``isinstance`` holds, ``type(block) is ...`` does not. They give
    their result in a new tensor, even where their own code writes into x, unless ``overwrite_input`` is set.

    Args:
        model: a module with MoD blocks in it, or one itself.
        overwrite_input: let every fused block write into its input where that is dense (otherwise only MoDBlocks
            made so, and those that a MoDStage lets). Right only if nothing else reads the input of a MoD block.

    Blocks that can't be fused are left alone, with one warning that names them and says why.

    Raises:
        TypeError: model is not a module, or is scripted.
        ValueError: there is no MoD block in it. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must not be scripted: accelerate the model it was scripted from")
    # All questions and the warning first: once the first block is changed nothing can fail.
    own = {name: module for name, module in model.named_modules() if isinstance(module, MoDBlock)}
    foreign_blocks, passed_over = _foreign_blocks(model, own)
    reasons = {name: reason for name, block in own.items() if (reason := why_not_fusible(block))}
    reasons |= {name: found.reason for name, found in foreign_blocks.items() if isinstance(found, Refused)}
    fused = [name for name in (*own, *foreign_blocks) if name not in reasons]
    registered = any(foreign.is_registered(model.get_submodule(name)) for name in foreign_blocks)
    if not own and not fused and not registered:
        raise NoBlocks(_nothing_found(model, reasons | passed_over))
    if reasons:
        left_alone = "\n  ".join(f"{name or 'the model'}: {reason}" for name, reason in reasons.items())
        count = len(fused) + len(reasons)
        warnings.warn(f"accelerate left {len(reasons)} of {count} MoD blocks alone:\n  {left_alone}", stacklevel=2)
    for name in fused:
        if name in own:
            own[name]._fused = SpecCache()
            own[name].overwrite_input = own[name].overwrite_input or overwrite_input
        else:
            foreign.fuse(model.get_submodule(name), foreign_blocks[name], overwrite_input)
    return model


def _foreign_blocks(
    model: nn.Module, own: dict[str, MoDBlock]
) -> tuple[dict[str, Plan | Refused | None], dict[str, str]]:
    """Blocks that are not MoDBlocks: how each is read (None: as registered) or why it is refused.

    And what has a block's shapes and can't be one, with reasons. Of blocks inside blocks the innermost that can be
    fused counts, or else the innermost.
    """
    outcomes: dict[str, Plan | Refused | None] = {}
    inside_own = {part for block in own.values() for part in block.modules()}
    taken: set[nn.Module] = set(own.values())
    for name, module in reversed(list(model.named_modules())):  # what is inside comes first
        if module in inside_own:
            continue
        if foreign.is_registered(module):
            inner = next((part for part in module.modules() if part in taken), None)
            if inner is None:
                outcome = why_not_as_described(module)
            else:
                outcome = Refused(f"another MoD block is inside it, a {type(inner).__name__}")
        elif (found := readings(module)) and taken.isdisjoint(module.modules()):
            outcome = recognise(module, found)
        else:
            continue
        if not isinstance(outcome, Refused) and (reason := foreign.why_not_subclassed(module)):
            outcome = Refused(reason)
        within = [other for other in outcomes if other.startswith(f"{name}." if name else "")]
        if not isinstance(outcome, Refused):
            taken.add(module)
            outcomes = {other: held for other, held in outcomes.items() if other not in within}
        elif within and not foreign.is_registered(module):
            continue
        outcomes[name] = outcome
    in_order = dict(reversed(outcomes.items()))
    passed_over = {
        name: held.reason for name, held in in_order.items() if isinstance(held, Refused) and not held.chooses
    }
    return {name: held for name, held in in_order.items() if name not in passed_over}, passed_over


def _nothing_found(model: nn.Module, looked_at: dict[str, str]) -> str:
    message = (
        "model must contain a mod_kernels.nn.MoDBlock, a block of a registered class or one that is recognised, "
        f"{type(model).__name__} has none"
    )
    if not looked_at:
        return message
    lines = [f"{name or 'the model'}: {reason}" for name, reason in looked_at.items()]
    more = [f"and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    return "\n  ".join([f"{message}; looked at:", *lines[:_MOST_NAMED], *more])
