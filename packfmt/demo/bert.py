"""A BERT sentence encoder in NumPy: what packing does to the numbers that a user of the model sees.

Token ids to unit vectors: embeddings, encoder layers that normalise after each sum, mean over the
tokens, length one. float32 throughout.

Sources: Vaswani et al. 2017, sections 3.1 and 3.2 (layers, attention); Devlin et al. 2019, section 3
(embeddings); Hendrycks and Gimpel 2016, section 2 (GELU); Reimers and Gurevych 2019, section 3 (mean
pooling). Tensor names are the checkpoint's, as Hugging Face transformers writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from packfmt.errors import PlanError

Array = NDArray[np.float32]

SIZES: Final = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)
ONLY: Final = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}

EDGE: Final = 8  # the normal distribution beyond it rounds to 0 and 1 in float32
STEPS: Final = 1024  # of its table, a unit
_AT: Final = np.arange(-EDGE * STEPS, EDGE * STEPS + 1) / STEPS
_SHARE: Final = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in _AT], np.float32)
_DENSITY: Final = (np.exp(-_AT * _AT / 2) / math.sqrt(2 * math.pi)).astype(np.float32)


def embed(weights: Mapping[str, Array], config: Mapping[str, Any], token_ids: Sequence[Sequence[int]]) -> Array:
    """The sentence embeddings of tokenised texts, each run alone, so that nothing is padded or masked.

    Parameters
    ----------
    weights : the tensors that `shapes` names, all with a leading "bert." or all without
    config : the model's config.json
    token_ids : one list a text, with the special tokens, without padding

    Returns
    -------
    (texts, hidden_size) float32, each row of length one

    Raises
    ------
    PlanError
        If the config is not of such a model, a tensor is missing or has another shape, or a text
        has no tokens, more than the model has positions, or one that is not in its vocabulary.
    """
    tensors = _checked(weights, config)
    positions, vocabulary = config["max_position_embeddings"], config["vocab_size"]
    for i, ids in enumerate(token_ids):
        if not 1 <= len(ids) <= positions:
            raise PlanError(f"text {i}: {len(ids)} tokens, needs 1 to {positions}")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise PlanError(f"text {i}: token ids {min(ids)} to {max(ids)}, needs 0 to {vocabulary - 1}")
    out = np.empty((len(token_ids), config["hidden_size"]), np.float32)
    for i, ids in enumerate(token_ids):
        mean = _encode(tensors, config, ids).mean(axis=0)
        out[i] = mean / max(np.linalg.norm(mean), np.float32(1e-12))
    return out


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `embed` reads.

    Raises
    ------
    PlanError
        If the config lacks a size, or is of a model that `embed` does not run.
    """
    if lacking := [key for key in SIZES if key not in config]:
        raise PlanError(f"config.json: has no {lacking[0]}; a BERT encoder's is needed")
    for key, value in ONLY.items():
        if config.get(key, value) != value:
            raise PlanError(f"config.json: {key} is {config[key]!r}, the demo runs {value!r} only")
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    if heads < 1 or hidden % heads:
        raise PlanError(f"config.json: {heads} attention heads do not divide hidden_size {hidden}")
    tables = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    modules: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        modules |= {f"{at}attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        modules |= {f"{at}attention.output.dense": (hidden, hidden), f"{at}attention.output.LayerNorm": (hidden,)}
        modules |= {f"{at}intermediate.dense": (inner, hidden), f"{at}output.dense": (hidden, inner)}
        modules |= {f"{at}output.LayerNorm": (hidden,)}
    out: dict[str, tuple[int, ...]] = {}
    out |= {f"embeddings.{name}_embeddings.weight": (config[size], hidden) for name, size in tables.items()}
    out |= {f"{name}.weight": shape for name, shape in modules.items()}
    return out | {f"{name}.bias": shape[:1] for name, shape in modules.items()}


def gelu(x: Array) -> Array:
    """x times the share of the normal distribution that lies below x.

    NumPy has no erf: from the nearest of a table's points, at most 1/2048 away, the share follows its
    density in a straight line. That is off by at most 0.242 / 2 / 2048**2 < 3e-8, 0.242 being the
    share's largest second derivative, before rounding to float32.
    """
    inside = np.clip(x, np.float32(-EDGE), np.float32(EDGE))
    nearest = np.rint(inside * np.float32(STEPS))
    at = nearest.astype(np.int32) + EDGE * STEPS
    beyond = inside - nearest / np.float32(STEPS)  # exact, as STEPS is a power of two
    out: Array = x * (_SHARE.take(at, mode="clip") + beyond * _DENSITY.take(at, mode="clip"))
    return out


def _checked(weights: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in weights else ""
    out = {}
    for name, shape in shapes(config).items():
        if prefix + name not in weights:
            raise PlanError(f"{prefix}{name}: not among the weights; the config asks for it, shaped {shape}")
        out[name] = np.asarray(weights[prefix + name], np.float32)
        if out[name].shape != shape:
            raise PlanError(f"{prefix}{name}: shaped {out[name].shape}, the config asks for {shape}")
    return out


def _encode(weights: Mapping[str, Array], config: Mapping[str, Any], ids: Sequence[int]) -> Array:
    """The last layer's output for one text: (tokens, hidden) float32."""

    def linear(name: str, x: Array) -> Array:
        out: Array = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return out

    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        spread = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(config["layer_norm_eps"]))
        out: Array = centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return out

    def heads(x: Array) -> Array:
        """(tokens, hidden) -> (heads, tokens, width of a head)."""
        return x.reshape(len(ids), config["num_attention_heads"], -1).swapaxes(0, 1)

    def attend(at: str, x: Array) -> Array:
        query, key, value = (heads(linear(at + part, x)) for part in ("query", "key", "value"))
        scores = query @ key.swapaxes(1, 2) / np.float32(math.sqrt(query.shape[2]))
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed: Array = shares / shares.sum(axis=2, keepdims=True) @ value
        return mixed.swapaxes(0, 1).reshape(x.shape)

    tables = (weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type"))
    word, position, token_type = tables
    x = norm("embeddings.LayerNorm", word[list(ids)] + position[: len(ids)] + token_type[0])
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        mixed = linear(f"{at}attention.output.dense", attend(f"{at}attention.self.", x))
        x = norm(f"{at}attention.output.LayerNorm", x + mixed)
        inner = gelu(linear(f"{at}intermediate.dense", x))
        x = norm(f"{at}output.LayerNorm", x + linear(f"{at}output.dense", inner))
    return x
