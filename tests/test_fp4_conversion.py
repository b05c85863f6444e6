"""FP4 in one form and in another: codes stay, scales are the same numbers, or the conversion is refused."""

from __future__ import annotations

import hashlib
import json
from itertools import permutations
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from packfmt import checkpoint, codecs, conversion, grids
from packfmt.codec import PackedTensor, exact_if, only_inverts, same_numbers, why_inexact
from packfmt.errors import LayoutError, PlanError
from packfmt.layout import dtype_of
from packfmt.placement import pack
from packfmt.plan import Recipe
from tests import models
from tests.models import normal, same

F32 = np.float32
MXFP4 = ("mxfp4", "mxfp4_pairs", "mxfp4_e8m0")
NVFP4 = ("nvfp4", "nvfp4_modelopt", "nvfp4_ct", "nvfp4_swizzled")
SHAPE = (128, 128)


def layout(name: str):  # type: ignore[no-untyped-def]
    return codecs.get(name).layout


def made(name: str, codes: np.ndarray, scale: np.ndarray, whole: float = 0) -> PackedTensor:
    """A tensor of these codes and stored scales."""
    form = layout(name)
    parts = {k: p for k, p in form.fit(*codes.shape).parts.items()}
    given = {"codes": codes.astype(np.uint8), "scale": scale.astype(np.uint8).view(dtype_of(parts["scale"].dtype))}
    given["scale"] = given["scale"].reshape(parts["scale"].shape)
    if whole:
        given["global_scale"] = np.full((1, 1), whole, F32)
    return PackedTensor(form, codes.shape, pack(form, codes.shape, given))


def weights() -> np.ndarray:
    """Normal numbers, zeros, and blocks of zeros of either sign."""
    out = normal(*SHAPE)
    out[:2] = 0
    out[2] = -0.0
    out[3, ::3] = 0
    return out


def assert_there_and_back(packed: PackedTensor, target: str) -> None:
    moved = packed.repack(layout(target))
    assert np.array_equal(moved.decode(), packed.decode())
    back = moved.repack(packed.layout)
    assert all(same(back.components[name], c) for name, c in packed.components.items())


# ---------------------------------------------------------------- among the containers of one format


@pytest.mark.parametrize(("source", "target"), [*permutations(MXFP4, 2)])
def test_mxfp4_passes_between_all_its_layouts_and_back(source: str, target: str) -> None:
    for encoder in codecs.get(source).encoders:
        assert_there_and_back(codecs.get(source).encode(weights(), encoder), target)


@pytest.mark.parametrize(("source", "target"), [*permutations(NVFP4, 2)])
def test_nvfp4_with_a_power_of_two_passes_between_all_its_layouts_and_back(source: str, target: str) -> None:
    for encoder in ("best", "tiles"):
        packed = codecs.get(source).encode(weights(), encoder)
        (whole,) = packed.unpack()["global_scale"].reshape(-1)
        assert np.frexp(whole)[0] == 0.5
        assert_there_and_back(packed, target)


def test_codes_that_mean_zero_stay_apart() -> None:
    codes = np.tile(np.array([0, 8], np.uint8), (1, 16))
    packed = made("mxfp4_pairs", codes, np.array([[127]]))
    assert same(packed.repack(layout("mxfp4")).unpack()["codes"], codes)
    assert np.signbit(packed.decode()).tolist() == [[False, True] * 16]


# ---------------------------------------------------------------- a scale of the whole tensor


@pytest.mark.parametrize("whole", [0.00146484375, 1.1e-3, 682.6667, 3.0])
@pytest.mark.parametrize(("source", "target"), [("nvfp4_modelopt", "nvfp4_ct"), ("nvfp4_ct", "nvfp4")])
def test_a_reciprocal_is_rounded_only_if_asked_for(source: str, target: str, whole: float) -> None:
    rng = np.random.default_rng(3)
    packed = made(source, rng.integers(0, 16, SHAPE), rng.integers(1, 127, (128, 8)), whole)
    assert only_inverts(packed.layout, layout(target), SHAPE)
    with pytest.raises(LayoutError, match="no exact reciprocal"):
        packed.repack(layout(target))
    moved = packed.repack(layout(target), rounded_reciprocal=True)
    here, there = packed.unpack(), moved.unpack()
    assert same(here["codes"], there["codes"]) and here["scale"].tobytes() == there["scale"].tobytes()
    assert there["global_scale"][0, 0] == F32(1) / F32(whole)
    a, b = packed.decode().astype(np.float64), moved.decode().astype(np.float64)
    assert (np.abs(a - b) <= 2.0**-22 * np.abs(a)).all()
    again = moved.repack(packed.layout, rounded_reciprocal=True)
    invertible = F32(1) / (F32(1) / F32(whole)) == F32(whole)
    assert same(again.unpack()["global_scale"], here["global_scale"]) == invertible


def test_a_whole_scale_goes_into_float32_scales_whatever_it_is() -> None:
    rng = np.random.default_rng(4)
    for name in ("nvfp4_modelopt", "nvfp4_ct"):
        packed = made(name, rng.integers(0, 16, SHAPE), rng.integers(1, 127, (128, 8)), 0.0123)
        assert same(packed.repack(layout("e2m1_g16")).decode(), packed.decode())


@pytest.mark.parametrize(("byte", "says"), [(0x7F, "nan"), (0x81, "-0.00195312")])
def test_ggml_has_no_scale_that_is_negative_or_nan(byte: int, says: str) -> None:
    scale = np.full((1, 4), 0x38)
    scale[0, 2] = byte
    packed = made("nvfp4_ct", np.full((1, 64), 3), scale, 2.0)
    with pytest.raises(LayoutError, match=rf"scale \[0, 2\] is {says}.*, which is no ufloat7_e4m3"):
        packed.repack(layout("nvfp4"))
    assert same(packed.repack(layout("nvfp4_modelopt")).unpack()["scale"], packed.unpack()["scale"])


# ---------------------------------------------------------------- MXFP4 and NVFP4


@pytest.mark.parametrize("target", NVFP4)
@pytest.mark.parametrize("span", [0, 17, 18])
def test_mxfp4_becomes_nvfp4_if_its_exponents_span_at_most_17(target: str, span: int) -> None:
    rng = np.random.default_rng(5)
    scale = rng.integers(120 - span, 121, (128, 4))
    scale[0, 0], scale[1, 1] = 120 - span, 120
    packed = made("mxfp4_pairs", rng.integers(1, 8, SHAPE), scale)
    assert same_numbers(packed.layout, layout(target), SHAPE)
    assert "every scale is" in exact_if(packed.layout, layout(target), SHAPE)
    if span == 18:
        with pytest.raises(LayoutError, match=r"scale \[0, 0\] is .*, which is no u?float"):
            packed.repack(layout(target))
    else:
        assert_there_and_back(packed, target)


def test_nvfp4_whose_scales_are_no_pairs_of_powers_of_two_is_no_mxfp4() -> None:
    codes, whole = np.full((1, 64), 5), 2.0**-5
    scale = np.array([[0x38, 0x38, 0x40, 0x40]])  # 1, 1, 2, 2
    moved = made("nvfp4_ct", codes, scale, whole).repack(layout("mxfp4"))
    assert moved.unpack()["scale"].tolist() == [[132, 133]]
    with pytest.raises(LayoutError, match=r"scale .* that of weights before it"):
        made("nvfp4_ct", codes, np.array([[0x38, 0x40, 0x40, 0x40]]), whole).repack(layout("mxfp4"))
    with pytest.raises(LayoutError, match="which is no float8_e8m0fnu"):
        made("nvfp4_ct", codes, np.array([[0x39, 0x39, 0x40, 0x40]]), whole).repack(layout("mxfp4_pairs"))


def test_a_block_of_zeros_takes_any_scale() -> None:
    """Where all weights of 16 are zero, MXFP4 shares the other half's scale; a zero scale makes its codes zeros."""
    codes = np.full((1, 32), 5)
    codes[0, 16:] = 8
    moved = made("nvfp4_ct", codes, np.array([[0x38, 0x55]]), 1).repack(layout("mxfp4_pairs"))
    assert moved.unpack()["scale"].tolist() == [[127]] and same(moved.unpack()["codes"], codes.astype(np.uint8))
    codes[0, 16:] = 9
    packed = made("nvfp4_ct", codes, np.array([[0x38, 0x00]]), 1)
    assert np.array_equal(packed.repack(layout("mxfp4_pairs")).decode(), packed.decode())


def test_what_e8m0_reserves_is_a_number_only_in_ggml() -> None:
    codes = np.full((1, 32), 2)
    with pytest.raises(LayoutError, match=r"scale \[0, 0\] is 3.40282367e\+38, which is no float8_e8m0fnu"):
        made("mxfp4", codes, np.array([[255]])).repack(layout("mxfp4_pairs"))
    nothing = made("mxfp4_pairs", codes, np.array([[255]]))
    assert nothing.repack(layout("mxfp4_e8m0")).components["scale"].view(np.uint8).tolist() == [[255]]
    with pytest.raises(LayoutError, match="is nan, which is no power of two"):
        nothing.repack(layout("mxfp4"))


# ---------------------------------------------------------------- other formats


def test_mxint8_is_q8_0_where_float16_has_the_scales() -> None:
    packed = codecs.get("mxint8").encode(normal(8, 64))
    moved = packed.repack(layout("q8_0"))
    assert np.array_equal(moved.decode(), packed.decode())
    assert same(moved.unpack()["codes"], packed.unpack()["codes"])
    assert same(moved.repack(packed.layout).components["weight_scale"], packed.components["weight_scale"])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("fp8_row_bf16", "fp8_row"),
        ("fp8_tensor", "fp8_row"),
        ("fp8_tensor_bf16", "fp8_block"),
        ("fp8_block_e8m0", "fp8_block"),
        ("fp8_block_e8m0", "fp8_block_bf16"),
    ],
)
def test_fp8_takes_finer_and_wider_scales_without_a_look_at_its_codes(source: str, target: str) -> None:
    packed = codecs.get(source).encode(normal(300, 200))
    moved = packed.repack(layout(target))
    assert same(moved.decode(), packed.decode())
    assert same(moved.unpack()["codes"], packed.unpack()["codes"])


def test_fp8_is_refused_where_scales_do_not_fit() -> None:
    packed = codecs.get("fp8_row").encode(normal(4, 128))
    row = packed.unpack()["scale"][0, 0]
    with pytest.raises(LayoutError, match=rf"scale \[0, 0\] is {row:.9g}, which is no bfloat16"):
        packed.repack(layout("fp8_row_bf16"))
    assert packed.refuses(layout("fp8_tensor")) == (
        "128 columns share a scale in fp8_row, in fp8_tensor 4 rows and 128 columns"
    )
    assert packed.refuses(layout("q8_0")) == "the numbers of fp8_row are too far apart to be steps"


def test_rotated_weights_are_not_taken_for_others() -> None:
    packed = codecs.get("nvfp4_modelopt_h16").encode(normal(*SHAPE))
    assert why_inexact(packed.layout, layout("nvfp4_modelopt"), SHAPE) == (
        "nvfp4_modelopt_h16 has 16 columns rotated, nvfp4_modelopt none rotated"
    )
    assert_there_and_back(packed, "nvfp4_h16")


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0)])
def test_nothing_keeps_the_scale_of_its_tensor(shape: tuple[int, int]) -> None:
    packed = codecs.get("nvfp4_modelopt").encode(np.zeros(shape, F32))
    moved = packed.repack(layout("nvfp4_ct"))
    assert moved.components["weight_global_scale"].tolist() == [1.0]
    assert moved.decode().shape == shape


# ---------------------------------------------------------------- plans


def nvfp4_folder(path: Path, encoder: str) -> Path:
    model = models.folder(path / "dense", {"a.weight": normal(64, 128), "norm.weight": normal(64)})
    conversion.convert(model, path / "packed", to="nvfp4_modelopt", encoder=encoder)
    return path / "packed"


def test_a_plan_says_that_the_scale_of_the_tensor_is_inverted(tmp_path: Path) -> None:
    source = nvfp4_folder(tmp_path, "modelopt")
    with checkpoint.open(source) as model:
        plan = conversion.plan_for(model, tmp_path / "ct", Recipe("nvfp4_ct"))
        (step,) = (s for s in plan.steps if s.name == "a.weight")
        assert (step.action, step.exact) == ("rescale", False)
        assert step.reason.endswith("the tensor's scale becomes its reciprocal")
        conversion.run(plan, model, tmp_path / "ct")
        with pytest.raises(PlanError, match="no exact reciprocal"):
            conversion.plan_for(model, tmp_path / "no", Recipe("nvfp4_ct", lossless=True))
        again = conversion.plan_for(model, tmp_path / "no", Recipe("nvfp4_ct", encoder="best"))
        assert [s.action for s in again.steps] == ["requantise", "keep"]
    with checkpoint.open(source) as before, checkpoint.open(tmp_path / "ct") as after:
        assert same(before["a.weight"].unpack()["codes"], after["a.weight"].unpack()["codes"])


def test_a_power_of_two_is_inverted_without_loss(tmp_path: Path) -> None:
    source = nvfp4_folder(tmp_path, "best")
    conversion.convert(source, tmp_path / "ct", to="nvfp4_ct", lossless=True)
    with checkpoint.open(source) as before, checkpoint.open(tmp_path / "ct") as after:
        assert same(before["a.weight"].decode(), after["a.weight"].decode())


def test_layers_that_run_as_one_share_the_scale_of_the_tensor(tmp_path: Path) -> None:
    sizes = {"q_proj": 1, "k_proj": 4, "v_proj": 2, "o_proj": 8}
    dense = {
        f"layers.{i}.attn.{n}.weight": F32(s * (i + 1)) * normal(64, 128) for i in (0, 3) for n, s in sizes.items()
    }
    dense |= {"layers.0.mlp.gate_proj.weight": normal(64, 128), "layers.0.mlp.up_proj.weight": 9 * normal(64, 128)}
    model = models.folder(tmp_path / "dense", dense)
    for encoder in ("best", "modelopt"):
        out = tmp_path / encoder
        conversion.convert(model, out, to="nvfp4_modelopt", encoder=encoder)
        with checkpoint.open(out) as packed:
            whole = {name: float(packed[name].unpack()["global_scale"][0, 0]) for name in packed}
        for i in (0, 3):
            shared = {whole[f"layers.{i}.attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj")}
            peak = max(np.abs(dense[f"layers.{i}.attn.{n}.weight"]).max() for n in ("q_proj", "k_proj", "v_proj"))
            alone = codecs.get("nvfp4_modelopt").encode(np.full((1, 16), peak, F32), encoder)
            assert shared == {float(alone.unpack()["global_scale"][0, 0])}
        assert whole["layers.0.mlp.gate_proj.weight"] == whole["layers.0.mlp.up_proj.weight"]
        assert whole["layers.0.attn.q_proj.weight"] != whole["layers.3.attn.q_proj.weight"]
        assert whole["layers.0.attn.o_proj.weight"] != whole["layers.0.attn.q_proj.weight"]


def test_the_bytes_of_scales_are_those_of_ml_dtypes() -> None:
    packed = codecs.get("nvfp4_ct").encode(normal(*SHAPE))
    assert packed.components["weight_scale"].dtype == ml_dtypes.float8_e4m3fn


# ---------------------------------------------------------------- what only numbers can tell


def test_a_zero_scale_beside_codes_stays_zero_where_no_scale_is_zero() -> None:
    codes = np.full((1, 64), 2)
    for scale in ([0, 0, 0, 0], [0, 0x38, 0x38, 0x38], [0, 0, 0x38, 0x38]):
        packed = made("nvfp4_modelopt", codes, np.array([scale]), 1)
        for target in ("mxfp4_pairs", "mxfp4_e8m0", "mxfp4"):
            assert np.array_equal(packed.repack(layout(target)).decode(), packed.decode())
    nothing = PackedTensor(
        layout("bitnet"),
        (32, 32),
        {"weight": np.zeros((8, 32), np.uint8), "weight_scale": np.zeros(1, ml_dtypes.bfloat16)},
    )
    assert not nothing.repack(layout("mxfp4")).decode().any()


def test_zeros_beside_what_is_no_number_are_not_made_no_numbers() -> None:
    codes = np.full((1, 32), 2)
    codes[0, :16] = 0
    with pytest.raises(LayoutError, match="share one there"):
        made("nvfp4_modelopt", codes, np.array([[0x38, 0x7F]]), 1).repack(layout("mxfp4_pairs"))


def test_a_tensor_whose_scale_is_zero_has_zeros_everywhere() -> None:
    packed = made("nvfp4_modelopt", np.full((1, 32), 9), np.array([[0x38, 0x40]]), 1)
    packed.components["weight_scale_2"][:] = 0
    moved = packed.repack(layout("nvfp4_ct"))
    assert same(moved.decode(), packed.decode()) and moved.components["weight_global_scale"].tolist() == [1.0]


def test_products_too_small_to_round_alike_are_refused() -> None:
    packed = made("nvfp4_modelopt", np.full((1, 32), 2), np.array([[0x38, 0x38]]), 1.4e-45)
    with pytest.raises(LayoutError, match="too small or too large to be sure of its rounding"):
        packed.repack(layout("nvint4"))


def test_what_every_scale_can_become_is_known_before_reading() -> None:
    assert exact_if(layout("mxfp4"), layout("q8_0"), SHAPE) == "every scale is a float16"
    assert exact_if(layout("mxfp4"), layout("ct_int8_g32_f32"), SHAPE) == ""
    assert exact_if(layout("mxfp4_e8m0"), layout("mxfp4_pairs"), SHAPE) == ""


@pytest.mark.parametrize("name", ["mxfp4_out999", "arcquant_512"])
def test_more_channels_than_columns_are_refused_in_the_plan(tmp_path: Path, name: str) -> None:
    model = models.folder(tmp_path / "m", {"a.weight": normal(64, 128)})
    with checkpoint.open(model) as source, pytest.raises(PlanError, match=rf"128 columns, {name} needs \d+ or more"):
        conversion.plan_for(source, tmp_path / "o", Recipe(name))


def test_an_embedding_that_is_packed_becomes_dense_where_it_must_be(tmp_path: Path) -> None:
    model = models.folder(tmp_path / "m", {n: normal(64, 128) for n in ("embed_tokens.weight", "a.q_proj.weight")})
    conversion.convert(model, tmp_path / "p", "nvfp4")
    report = conversion.convert(tmp_path / "p", tmp_path / "ct", "nvfp4_ct", container="compressed_tensors")
    actions = {s.name: (s.action, s.layout.name) for s in report.plan.steps}
    assert actions == {"embed_tokens.weight": ("decode", "f32"), "a.q_proj.weight": ("rescale", "nvfp4_ct")}


def test_importance_of_columns_reaches_every_encoder_that_weighs_it() -> None:
    weight = normal(128, 256)
    costs = np.ones(256, F32)
    costs[::7] = 100
    names = [n for n in (*codecs.names(), "nvfp4_out4", "arcquant_64", "nvfp4_x4", "e2m1_g32", "ct_int4_g32")]
    weighed = 0
    for name in names:
        codec = codecs.get(name)
        for encoder in codec.weighted:
            if name == "ptq161":
                continue  # which asks for activations of all columns
            found = codec.encode(weight, encoder, importance=costs).decode()
            plain = codec.encode(weight, encoder).decode()
            cost = [float(((w - weight).astype(np.float64) ** 2 * costs).sum()) for w in (found, plain)]
            assert cost[0] <= cost[1] * (1 + 1e-6), (name, encoder)
            weighed += 1
    assert weighed > 30


def test_a_plan_knows_its_folder(tmp_path: Path) -> None:
    model = models.folder(tmp_path / "m", {"a.q_proj.weight": normal(64, 128)})
    with checkpoint.open(model) as source:
        plan = conversion.plan_for(source, tmp_path / "ct", Recipe("nvfp4_ct"), "compressed_tensors")
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
        assert conversion.saved_plan(tmp_path / "plan.json", source, tmp_path / "ct") == plan


def test_a_rotation_beyond_float32_is_refused() -> None:
    weight = np.full((1, 32), 1e38, F32)
    for encoder in codecs.get("mxfp4_h32").encoders:
        with pytest.raises(LayoutError, match="mxfp4_h32: rotated weights are beyond float32"):
            codecs.get("mxfp4_h32").encode(weight, encoder)


@pytest.mark.parametrize(("name", "most"), [("hif4", 344064), ("nvfp4_plain", 2688), ("fp4_ue5m3", 688128)])
def test_weights_beyond_the_largest_number_are_told(tmp_path: Path, name: str, most: float) -> None:
    weight = normal(64, 128)
    weight[3, 5] = -1e9
    model = models.folder(tmp_path / "m", {"a.weight": weight})
    (remark,) = conversion.convert(model, tmp_path / "o", name).remarks
    assert remark.startswith(f"a.weight: 1 of 8192 weights are beyond {most:g}")
    (tmp_path / "n").mkdir()
    assert not conversion.convert(
        models.folder(tmp_path / "n/m", {"a.weight": normal(64, 128)}), tmp_path / "p", name
    ).remarks


def test_decoding_tells_of_weights_that_are_no_numbers(tmp_path: Path) -> None:
    packed = codecs.get("mxfp4_pairs").encode(normal(64, 128))
    model = models.folder(tmp_path / "m", {"a.weight": normal(64, 128)})
    conversion.convert(model, tmp_path / "p", "mxfp4_pairs")
    path = tmp_path / "p" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    scale = packed.components["weight_scale"].tobytes()
    raw[raw.index(scale)] = 255
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    digest = hashlib.sha256(scale).hexdigest().encode()
    raw[8 : 8 + len(header)] = header.replace(digest, hashlib.sha256(b"\xff" + scale[1:]).hexdigest().encode())
    path.write_bytes(raw)
    with checkpoint.open(tmp_path / "p") as source:
        report = conversion.run(conversion.decode_plan(source, tmp_path / "d"), source, tmp_path / "d")
    assert report.remarks == ("a.weight: some weights are not finite; packfmt validate says where",)


# ---------------------------------------------------------------- what is cut off at the edge


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", ["ct_int4_row", "ct_int2_row", "ct_int3_legacy_row", "ct_int7_legacy_row_asym", "fp8_block"]
)
@pytest.mark.parametrize("cols", [3, 64, 101])
def test_cells_beyond_the_edge_are_read_within_bounds(name: str, cols: int) -> None:
    packed = codecs.get(name).encode(normal(3, cols))
    assert same(packed.decode(), grids.decode(packed.layout, (3, cols), packed.components))
