"""The shelf of formats: a module here, or an entry point of another package.

A module `codecs/<name>.py` holds `CODEC`, whose layout bears the module's name; or it is a family and holds
`CODECS`, by name, of the names that `FAMILIES` says. An installed package adds formats of its own with
entry points of the group "packfmt.codecs" (name = module). Nothing is imported before it is asked for.

Some formats have numbers in their names, for their bytes depend on them (`PATTERNS`): mote_8 is for eight
experts. Their modules make a codec of a name: `codec(name)`.
"""

from __future__ import annotations

import pkgutil
import re
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from packfmt.codec import Codec
from packfmt.errors import PlanError

SHERRY = ("sherry", "sherry_s16", "sherry_s16_perm", "sherry_g128", "sherry_row", "sherry_t32", "sherry_t32_s16")
SPQR = ("spqr", "spqr_merged_add", "spqr_merged_replace", "spqr_tiles_add", "spqr_tiles_replace")
TRIT_PLANES = (
    *(f"ptqtp{n}{how}" for n in (1, 2, 3, 4) for how in ("", "_b3")),
    *(f"ptqtp{n}{how}_tied" for n in (2, 3, 4) for how in ("", "_b3")),
    *("ptqtp2_n4", "ptqtp2_n4_tied"),
)
MX = ("mxfp4_pairs", "mxfp4_e8m0", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
NVFP4 = ("nvfp4", "nvfp4_plain", "nvfp4_modelopt", "nvfp4_ct", "nvfp4_rows", "nvfp4_swizzled")
FP8 = (*(f"fp8_{shared}{dtype}" for shared in ("tensor", "row", "block") for dtype in ("", "_bf16")), "fp8_block_e8m0")
FAMILIES = {  # module -> the formats that it holds
    "bitnet": ("bitnet", "bitnet_divide"),
    "fp4": ("nvint4", "fp4_ue5m3", "if4", "hif4"),
    "fp8": FP8,
    "i2_s": ("i2_s", "i2_s_arm"),
    "mx": MX,
    "nvfp4": NVFP4,
    "q2_0": ("q2_0", "pq2_0"),
    "sherry": SHERRY,
    "spqr": SPQR,
    "squeezellm": ("squeezellm_w3", "squeezellm_w4"),
    "trit_planes": TRIT_PLANES,
}
BASES = "mxfp4|mxfp4_pairs|nvfp4|nvfp4_plain|nvfp4_modelopt|nvfp4_ct"
ROTATED = f"{BASES}|mxfp6_e2m3|mxfp6_e3m2|mxfp8_e4m3|mxint8|nvint4|if4|hif4|q4_0|q8_0"
SPARSE = r"(csr|ell[1-9]\d{0,4}|gaps)(_32)?(_f32|_bf16)?(_replace)?"
PATTERNS = {  # module -> the names that it makes formats of: an expression, and how people write it
    "arcquant": (r"arcquant_[1-9]\d{0,4}", "arcquant_<channels>"),
    "codebook": (r"cb[2-8](_f32|_bf16)?", "cb<bits>"),
    "dense_sparse": (rf"[a-z0-9_]+_{SPARSE}", "<format>_csr, _ell<n> or _gaps"),
    "minifloats": (r"e[1-6]m[0-6](b\d{1,2})?_(tensor|row|g[1-9]\d{0,4})", "e<E>m<M>_<tensor, row or g<n>>"),
    "nvfp4_experts": (r"nvfp4_x[1-9]\d{0,3}", "nvfp4_x<experts>"),
    "outlier_channels": (rf"({BASES})_out[1-9]\d{{0,3}}", "<4-bit float>_out<columns>"),
    "packed_int": (r"ct_int[2-8](_legacy)?_(row|g[1-9]\d{0,4})(_asym)?(_f16|_f32)?", "ct_int<bits>_<row or g<n>>"),
    "rotated": (rf"({ROTATED})_h(16|32|64|128|256)", "<format>_h<size>"),
    "mote": (r"mote_[1-9]\d{0,3}", "mote_<experts>"),
    "tiled": (r"[a-z0-9_]+_(tile16|words32|nibbles32)", "<format>_tile16, _words32 or _nibbles32"),
    "tl1": (r"tl1(_[1-9]\d{0,5}){3}", "tl1_<bm>_<bk>_<bmm>"),
    "tl2": (r"tl2(_[1-9]\d{0,6}){4}", "tl2_<rows>_<cols>_<bm>_<bk>"),
}
EXAMPLES = {  # module -> some of the names, to show what they mean
    "arcquant": ("arcquant_64",),
    "codebook": ("cb3", "cb4"),
    "dense_sparse": ("mxfp4_csr", "ct_int3_g128_ell16", "mxfp4_pairs_gaps"),
    "minifloats": ("e3m2_g32",),
    "mote": ("mote_8",),
    "nvfp4_experts": ("nvfp4_x8",),
    "outlier_channels": ("mxfp4_out8",),
    "packed_int": ("ct_int4_g128",),
    "rotated": ("nvfp4_h16",),
    "tiled": ("mxfp4_tile16", "sherry_words32", "sherry_nibbles32"),
    "tl1": ("tl1_256_128_64",),
    "tl2": ("tl2_3200_8640_160_96",),
}
NEARLY = {  # module -> what names look like that were meant for it
    "arcquant": r"arcquant.*",
    "codebook": r"cb\d*.*",
    "dense_sparse": r".*_(csr|ell|gaps).*",
    "minifloats": r"e\d+m\d+.*",
    "mote": r"mote.*",
    "nvfp4_experts": r"nvfp4_x.*",
    "outlier_channels": r".*_out\d*",
    "packed_int": r"ct_int.*",
    "rotated": r".*_h\d+",
    "tiled": r".*_(tile|word|nibble)s?\d*",
    "tl1": r"tl1.*",
    "tl2": r"tl2.*",
}


@cache
def _modules() -> dict[str, str]:
    """Format name -> module that holds it."""
    modules = [m.name for m in pkgutil.iter_modules(__path__)]
    ours = {name: f"{__name__}.{m}" for m in modules if m not in PATTERNS for name in FAMILIES.get(m, (m,))}
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
    for module, (pattern, _) in PATTERNS.items():
        if re.fullmatch(pattern, name):
            made: Codec = import_module(f"{__name__}.{module}").codec(name)
            return made
    if name not in _modules():
        near = _near(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "packfmt formats lists them"
        raise PlanError(f"no format is called {name!r}; {hint}")
    holder = import_module(_modules()[name])
    codec: Codec = holder.CODECS[name] if hasattr(holder, "CODECS") else holder.CODEC
    return codec


def _near(name: str) -> list[str]:
    """What a name of no format may mean: formats, or the way that names with numbers are written."""
    plain = name.lower().replace("-", "_")
    if known(plain):
        return [plain]
    if called := [n for n in names() if plain in (other.lower() for _, other in get(n).layout.also)]:
        return called
    if tiling := import_module(f"{__name__}.tiled").meant(plain):
        return [tiling]
    numbered = [PATTERNS[m][1] for m, loosely in NEARLY.items() if re.fullmatch(loosely, plain)]
    return numbered or get_close_matches(plain, names(), 3, 0.5)


def known(name: str) -> bool:
    """Whether there is a format of this name, listed or made of its numbers."""
    return name in _modules() or any(re.fullmatch(pattern, name) for pattern, _ in PATTERNS.values())


def family(name: str) -> str:
    """The module that holds a format, without its package: its page in spec/formats is called so."""
    return _modules()[name].rpartition(".")[2]
