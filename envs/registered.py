"""Which package registers an environment's id, and one line where an id is not to be had."""

from __future__ import annotations

import importlib

import gymnasium

from crl.core import CrlError, brief, imported

REGISTERED_BY = {  # the start of an id: the package that registers it, and how to get that
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "ALE/": ("ale_py", "gymnasium[atari]"),
}


def find(env: str) -> None:
    """Import what registers an id, and say in one line why an id is not to be had."""
    module, _, name = env.rpartition(":")
    package, extra = next((found for start, found in REGISTERED_BY.items() if name.startswith(start)), ("", ""))
    for needed in filter(None, (module, package)):
        try:
            imported(needed)
        except CrlError:
            raise
        except Exception as error:
            if needed == package and isinstance(error, ImportError):
                raise CrlError(f'{name} needs an extra: pip install "{extra}"') from None
            raise CrlError(f"cannot import {needed!r}: {brief(error)}") from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        near = nearest(name)
        hint = f"; did you mean {', '.join(near)}?" if near else "; `crl list envs` shows the installed ones"
        reason = "unknown environment" if "doesn't exist" in str(error) else brief(error).partition(": ")[2]
        raise CrlError(f"{reason} {name!r}{hint}" if reason == "unknown environment" else f"{reason}{hint}") from None


def nearest(name: str) -> list[str]:
    """Registered ids that look like `name`."""
    import difflib

    importlib.import_module("minigrid")
    ids = list(gymnasium.registry)
    lower = {identifier.lower(): identifier for identifier in ids}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), list(lower), 3, 0.6)]
