"""Let the MoD blocks of a model run as one fused op each, in inference."""

from __future__ import annotations

import warnings

from torch import nn

from .nn._folding import why_not_fusible
from .nn._spec_cache import SpecCache
from .nn.mod_block import MoDBlock


def accelerate(model: nn.Module, overwrite_input: bool = False) -> nn.Module:
    """Change ``model`` in place so that its MoD blocks run fused in inference, and return it.

    In eval mode, where no gradient is needed, each block that can runs as one op with its BN folded
    (:func:`mod_kernels.functional.mod_block`). In training mode, with gradients, with a hook on one of the
    block's parts or with a BN in training mode, the ordinary path runs, call by call. Submodules, parameters
    and ``state_dict`` stay what they are; ``.to``, ``.half``, ``load_state_dict``, ``copy.deepcopy`` and
    pickling work, and a fold of weights that have changed is never used. Under ``torch.compile`` the fold is
    part of the graph. Lowest overhead under ``torch.inference_mode()`` or ``torch.no_grad()``.

    Args:
        model: a module with :class:`mod_kernels.nn.MoDBlock` in it, or one itself.
        overwrite_input: let every fused block write into its input (otherwise only those made so). Right only
            if nothing else reads the input of a MoD block.

    Blocks that can't be fused are left alone, with one warning that names them and says why.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no MoD block in it. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoDBlock)}
    if not blocks:
        raise ValueError(f"model must contain a mod_kernels.nn.MoDBlock, {type(model).__name__} has none")
    # All questions first: once the first block is changed nothing can fail.
    reasons = {name: why_not_fusible(block) for name, block in blocks.items()}
    for name, block in blocks.items():
        if not reasons[name]:
            block._fused = SpecCache()
            block.overwrite_input = block.overwrite_input or overwrite_input
    left_alone = [f"{name or 'the model'}: {reason}" for name, reason in reasons.items() if reason]
    if left_alone:
        warnings.warn(
            f"accelerate left {len(left_alone)} of {len(blocks)} MoD blocks alone:\n  " + "\n  ".join(left_alone),
            stacklevel=2,
        )
    return model
