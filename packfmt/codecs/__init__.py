"""The shelf of formats: a format is a module here, or an entry point of another package.

A module `codecs/<name>.py` holds `CODEC`, whose layout bears the module's name. An installed
package adds formats of its own with entry points of the group "packfmt.codecs" (name = module).
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from packfmt.codec import Codec
from packfmt.errors import PlanError


@cache
def _modules() -> dict[str, str]:
    """Format name -> module that holds it."""
    ours = {m.name: f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)}
    theirs = {e.name: e.value for e in entry_points(group="packfmt.codecs")}
    if both := sorted(ours.keys() & theirs.keys()):
        raise PlanError(f"an installed package claims the format {both[0]!r}, which packfmt has; a name is for life")
    return dict(sorted({**ours, **theirs}.items()))


def names() -> tuple[str, ...]:
    """Every format, in alphabetical order."""
    return tuple(_modules())


@cache
def get(name: str) -> Codec:
    """The codec called `name`, exactly as `names` spells it.

    Raises
    ------
    PlanError
        If there is none; the nearest names are given.
    """
    if name not in _modules():
        near = get_close_matches(name, names(), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
        raise PlanError(f"no format is called {name!r}; {hint}")
    codec: Codec = import_module(_modules()[name]).CODEC
    return codec
