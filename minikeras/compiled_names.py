"""`Model(torch.compile(net))` saves and loads under the names of `Model(net)`.

You may skip this file at a first reading.
"""

from __future__ import annotations

from typing import Any

from torch import nn

COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


def hide_compiled_names(model: nn.Module) -> None:
    """Let `Model(torch.compile(net))` save and load under the names of `Model(net)`."""
    model.register_state_dict_post_hook(_drop_compiled_names)
    model.register_load_state_dict_pre_hook(_add_compiled_names)


def _drop_compiled_names(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Remove torch.compile's names from a state_dict that is being saved."""
    for name in list(state):
        if name.startswith(prefix) and COMPILED in name:
            state[name.replace(COMPILED, "")] = state.pop(name)


def _add_compiled_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add torch.compile's names to a state_dict that is being loaded."""
    for wrapper, _ in module.named_modules(prefix=prefix.rstrip(".")):
        if not f"{wrapper}.".endswith("." + COMPILED):
            continue
        outer = wrapper[: -len(COMPILED)] + "."
        for name in list(state):
            if name.startswith(outer) and not name.startswith(wrapper):
                state[wrapper + name[len(outer) - 1 :]] = state.pop(name)
