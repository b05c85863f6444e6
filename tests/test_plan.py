"""Every decision is made, and every refusal told, before a weight is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from packfmt import checkpoint, codecs, conversion, exporters, plan
from packfmt.errors import PlanError
from packfmt.layout import DENSE
from packfmt.plan import Plan, Recipe
from tests.models import folder, normal, tensors


def planned(path: Path, recipe: Recipe, target: str = "out") -> Plan:
    with checkpoint.open(path) as model:
        return conversion.plan_for(model, Path(target), recipe)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model")


def layouts(found: Plan) -> dict[str, str]:
    return {s.name: s.layout.name for s in found.steps}


def test_matrices_of_linear_layers_embeddings_and_experts_are_packed_and_the_rest_stays(model: Path) -> None:
    found = planned(model, Recipe("q8_0"))
    assert {s.name: (s.layout.name, s.action, s.reason) for s in found.steps} == {
        "embed.weight": ("q8_0", "quantise", "linear layer or embedding"),
        "layers.0.mlp.up_proj.weight": ("q8_0", "quantise", "linear layer or embedding"),
        "layers.0.mlp.experts.down_proj": ("q8_0", "quantise", "linear layer or embedding"),
        "layers.0.mlp.up_proj.bias": ("f32", "keep", "1-D: norm, bias or scalar"),
        "layers.0.norm.weight": ("f32", "keep", "1-D: norm, bias or scalar"),
        "layers.0.mlp.gate.weight": ("f32", "keep", "router: picks experts"),
        "layers.0.conv.weight": ("f32", "keep", "3-D, and its name says nothing of experts"),
        "positions": ("i64", "keep", "int64, not a float"),
    }


def test_keep_changes_only_the_container(model: Path, tmp_path: Path) -> None:
    conversion.convert(model, tmp_path / "out", "q4_0", overrides={"embed": "q8_0"})
    found = planned(tmp_path / "out", Recipe("keep"), "out.gguf")
    assert {s.action for s in found.steps} == {"keep"} and found.container == "gguf"
    assert layouts(found)["embed.weight"] == "q8_0" and layouts(found)["layers.0.mlp.up_proj.weight"] == "q4_0"


def test_the_last_rule_that_matches_wins(model: Path) -> None:
    rules = (
        (r"\.weight$", "q8_0"),
        (r"^embed", "keep"),
        (r"^embed\.", "f16"),
        (r"norm", "keep"),
        (r"bias|conv", "keep"),
    )
    found = layouts(planned(model, Recipe("q4_0", rules)))
    assert found["embed.weight"] == "f16" and found["layers.0.mlp.gate.weight"] == "q8_0"
    assert found["layers.0.norm.weight"] == "f32" and found["layers.0.mlp.experts.down_proj"] == "q4_0"


def test_a_rule_that_matches_nothing_is_refused(model: Path) -> None:
    with pytest.raises(PlanError, match=r"--map 'lm_head=q8_0' matches no tensor"):
        planned(model, Recipe("q4_0", (("lm_head", "q8_0"),)))


def test_a_rule_leaves_whole_numbers_alone_and_is_refused_if_there_is_nothing_else(model: Path) -> None:
    found = planned(model, Recipe("q4_0", (("positions|embed", "q8_0"),)))
    assert layouts(found)["positions"] == "i64" and layouts(found)["embed.weight"] == "q8_0"
    with pytest.raises(PlanError, match=r"--map 'positions=q8_0' matches only tensors that are no floats"):
        planned(model, Recipe("q4_0", (("positions", "q8_0"),)))


def test_a_rule_that_is_no_regular_expression_is_refused(model: Path) -> None:
    with pytest.raises(PlanError, match=r"--map '\(': not a regular expression: missing \)"):
        planned(model, Recipe("q4_0", (("(", "q8_0"),)))


def test_a_rule_reaches_what_would_have_stayed_and_then_it_must_fit(model: Path) -> None:
    with pytest.raises(PlanError, match=r"layers\.0\.conv\.weight: 3 columns, q8_0 needs a multiple of 32"):
        planned(model, Recipe("q4_0", (("conv", "q8_0"),)))


def test_columns_that_do_not_fill_blocks_are_refused_together(tmp_path: Path) -> None:
    odd = folder(tmp_path / "odd", tensors(cols=384))
    with pytest.raises(PlanError) as caught:
        planned(odd, Recipe("tq2_0", (("nothing", "q8_0"),)))
    assert str(caught.value).split("\n") == [
        "embed.weight and 2 more: 384 columns, tq2_0 needs a multiple of 256; choose with --fallback LAYOUT or --map",
        "--map 'nothing=q8_0' matches no tensor",
    ]


def test_a_fallback_takes_what_does_not_fit_and_is_told(tmp_path: Path) -> None:
    model = tensors(cols=384) | {"wide.weight": normal(16, 512)}
    found = planned(folder(tmp_path / "odd", model), Recipe("tq2_0", fallback="q8_0"))
    by_name = {s.name: s for s in found.steps}
    assert by_name["wide.weight"].layout.name == "tq2_0"
    assert by_name["embed.weight"].layout.name == "q8_0"
    assert by_name["embed.weight"].reason == "--fallback, as 384 columns do not fill tq2_0"


def test_a_fallback_that_does_not_fit_either_is_refused(tmp_path: Path) -> None:
    model = {"a.weight": normal(128, 100), "b.weight": normal(16, 512)}
    with pytest.raises(PlanError, match=r"a\.weight: 100 columns, .*; 100 columns, q8_0 a multiple of 32; "):
        planned(folder(tmp_path / "odd", model), Recipe("tq2_0", fallback="q8_0"))


def test_a_job_that_would_pack_nothing_is_refused_and_says_why(tmp_path: Path) -> None:
    small = folder(tmp_path / "small", {"a.weight": normal(2, 32), "b": normal(64), "c": normal(3)})
    with pytest.raises(PlanError, match=r"nothing here would become q8_0: 1 stays \(small: 64 weights\), 2 tens"):
        planned(small, Recipe("q8_0"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("q4_9"), r"no format is called 'q4_9'; did you mean q4_0"),
        (Recipe("q4_0", (("embed", "f33"),)), r"no format is called 'f33'; did you mean f32"),
        (Recipe("q4_0", fallback="zzzzzz"), r"no format is called 'zzzzzz'; packfmt formats lists them"),
        (Recipe("q4_0", encoder="best"), r"q4_0 has no encoder 'best'; there are ggml"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(model: Path, recipe: Recipe, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(model, recipe)


def test_what_the_container_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", {"a.weight": normal(64, 64), "flags": np.ones(5, np.bool_)})
    with pytest.raises(PlanError, match=r"flags: GGUF has no type for bool"):
        planned(model, Recipe("q8_0"), "out.gguf")
    long = folder(tmp_path / "n", {"a" * 70 + ".weight": normal(64, 64)})
    with pytest.raises(PlanError, match=r"a name of 77 bytes, GGUF holds 63 or fewer"):
        planned(long, Recipe("q8_0"), "out.gguf")


def test_weights_whose_scale_stands_beside_them_are_not_taken_for_weights(tmp_path: Path) -> None:
    fp8 = normal(64, 64, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn)
    model = folder(tmp_path / "m", {"a.weight": fp8, "a.weight_scale_inv": normal(1, 1)})
    with pytest.raises(PlanError, match=r"a\.weight: has a weight_scale_inv beside it"):
        planned(model, Recipe("q8_0"))
    assert {s.action for s in planned(model, Recipe("keep")).steps} == {"keep"}  # which needs no number


E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("a.weight", E4M3, "a.weight_scale"),
        ("a.weight", E4M3, "a.scale"),
        ("a.weight", E5M2, "a.weight_scale_inv"),
        ("a.weight", np.int8, "a.weight_scale"),
        ("a.weight", np.int8, "a.SCB"),
        ("a.weight", np.uint8, "a.weight.absmax"),
        ("a.qweight", np.int32, "a.scales"),
        ("a.weight_packed", np.int32, "a.weight_scale"),
        ("experts.up_blocks", np.uint8, "experts.up_scales"),
        ("experts.up", E4M3, "experts.up_scale_inv"),
        ("weight", E4M3, "weight_scale"),
    ],
)
def test_codes_beside_a_scale_that_nobody_read_are_not_packed(
    tmp_path: Path, name: str, dtype: type, scale: str
) -> None:
    codes = np.ones((64, 64), dtype)
    model = folder(tmp_path / "m", {name: codes, scale: normal(64), "b.weight": normal(64, 64)})
    beside = scale.rpartition(".")[2] if not scale.endswith("absmax") else "weight.absmax"
    for to in ("q8_0", "dense"):
        with pytest.raises(
            PlanError, match=rf"^{name}: has a {beside} beside it; .* copy its bytes with --map REGEX=k"
        ):
            planned(model, Recipe(to))
    kept = planned(model, Recipe("q8_0", ((f"^{name}$", "keep"),)))
    assert [s.layout.name for s in kept.steps if s.name in ("b.weight", name)].count("q8_0") == 1


def test_codes_alone_and_floats_beside_a_scale_are_what_they_are(tmp_path: Path) -> None:
    found = {
        "a.weight": np.ones((64, 64), E4M3),
        "b.weight": normal(64, 64),
        "b.weight_scale": normal(1),
        "c.ids": np.ones(64, np.int32),
        "d.position": np.ones(64, np.int64),
        "d.scale": normal(1),
    }
    by_name = layouts(planned(folder(tmp_path / "m", found), Recipe("q8_0")))
    assert {n for n, layout in by_name.items() if layout == "q8_0"} == {"a.weight", "b.weight"}


def test_a_model_that_another_tool_quantised_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(PlanError, match="quantised already, as 'gptq'"):
        planned(model, Recipe("q8_0"))
    (model / "config.json").write_text('{"quantization_config": null}')
    assert len(planned(model, Recipe("q8_0")).steps) == len(tensors())


def test_shards_are_cut_in_order_and_a_large_tensor_has_its_own(model: Path) -> None:
    found = planned(model, Recipe("f32", max_shard=70_000))
    files = [s.file for s in found.steps]
    count = len(set(files))
    assert files == sorted(files) and files[-1] == f"model-{count:05}-of-{count:05}.safetensors" and count > 2
    for file in set(files):
        sizes = [s.nbytes for s in found.steps if s.file == file]
        assert sum(sizes) <= 70_000 or len(sizes) == 1


def test_sizes_and_what_is_held_follow_from_layouts(model: Path) -> None:
    found = planned(model, Recipe("q4_0"))
    step = next(s for s in found.steps if s.name == "embed.weight")
    assert step.nbytes == 96 * 256 // 32 * 18
    assert step.working_set == 96 * 256 * 4 + 5 * 96 * 256 + step.nbytes
    assert found.working_set == max(s.working_set for s in found.steps)


@pytest.mark.parametrize(
    ("before", "after", "action", "exact"),
    [
        ("f32", "f32", "keep", True),
        ("f32", "f16", "cast", False),
        ("bf16", "f32", "cast", True),
        ("f16", "f32", "cast", True),
        ("f16", "bf16", "cast", False),
        ("f32", "q4_0", "quantise", False),
        ("q4_0", "q4_0", "keep", True),
        ("q4_0", "q8_0", "repack", True),
        ("q8_0", "q4_0", "requantise", False),
        ("q4_0", "f32", "decode", True),
        ("q4_0", "f16", "decode", False),
    ],
)
def test_the_plan_says_which_steps_are_exact(tmp_path: Path, before: str, after: str, action: str, exact: bool) -> None:
    first = folder(tmp_path / "first", {"a.weight": normal(64, 256)})
    conversion.convert(first, tmp_path / "second", before, overrides={"a": before})
    (step,) = planned(tmp_path / "second", Recipe(after, ((r"a\.", after),))).steps
    assert (step.action, step.exact) == (action, exact)


def test_a_saved_plan_is_the_plan(model: Path) -> None:
    found = planned(model, Recipe("q4_0", (("embed", "q8_0"),)))
    data = json.loads(json.dumps(found.to_json()))
    with checkpoint.open(model) as source:
        assert plan.from_json(data, source.index, exporters.get("safetensors"), codecs.get) == found


def test_an_edited_plan_is_followed_and_checked(model: Path) -> None:
    data = planned(model, Recipe("q4_0")).to_json()
    step = next(s for s in data["steps"] if s["name"] == "embed.weight")
    with checkpoint.open(model) as source:

        def replay() -> Plan:
            return plan.from_json(data, source.index, exporters.get("safetensors"), codecs.get)

        step.update(to="q8_0", id=None, encoder="")
        assert layouts(replay())["embed.weight"] == "q8_0"
        step.update(encoder="magic")
        with pytest.raises(PlanError, match=r"embed\.weight: q8_0 has no encoder 'magic'; there are ggml"):
            replay()
        step.update(encoder="", id="0" * 64)
        with pytest.raises(PlanError, match=r"embed\.weight: the plan's q8_0 has id 0000000000000000, here it is"):
            replay()
        step.update(id=None, shape=[96, 128])
        with pytest.raises(PlanError, match=r"embed\.weight: the source has F32 \[96, 256\], the plan f32 \[96, 128\]"):
            replay()
        step.update(name="other.weight")
        with pytest.raises(PlanError, match=r"the plan names 'other\.weight', which is not in the source"):
            replay()
        data["steps"].remove(step)
        with pytest.raises(PlanError, match=r"must name every tensor once; embed\.weight is not"):
            replay()
        data["version"] = 7
        with pytest.raises(PlanError, match="a plan of version 7, this packfmt replays 1"):
            replay()
        for wrong in (None, [], {"version": 1}, {"version": 1, "container": "safetensors", "steps": [3]}):
            with pytest.raises(PlanError, match="not a saved plan"):
                plan.from_json(wrong, source.index, exporters.get("safetensors"), codecs.get)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["../out.safetensors"], r"in the file '\.\./out\.safetensors', needs a plain name"),
        (["/x.safetensors"], "needs a plain name"),
        ([".hidden.safetensors"], "needs a plain name"),
        (["config.json"], "needs a plain name"),
        (["a.safetensors", "b.safetensors", "a.safetensors"], "which other files follow already; order the steps"),
        (["a.safetensors", ""], "some steps name a file and some do not"),
    ],
)
def test_a_saved_plan_cannot_leave_the_folder_or_write_a_file_twice(
    model: Path, files: list[str], message: str
) -> None:
    data = planned(model, Recipe("q4_0")).to_json()
    for step, file in zip(data["steps"], files + files[-1:] * len(data["steps"]), strict=False):
        step["file"] = file
    with checkpoint.open(model) as source, pytest.raises(PlanError, match=message):
        plan.from_json(data, source.index, exporters.get("safetensors"), codecs.get)


def test_a_saved_plan_that_packs_whole_numbers_is_refused(model: Path) -> None:
    data = planned(model, Recipe("q4_0")).to_json()
    next(s for s in data["steps"] if s["name"] == "positions").update(to="q8_0", id=None)
    with checkpoint.open(model) as source, pytest.raises(PlanError, match="positions: is int64, which q8_0 does not"):
        plan.from_json(data, source.index, exporters.get("safetensors"), codecs.get)


def test_decoding_gives_each_weight_its_own_dtype_again(tmp_path: Path) -> None:
    first = folder(
        tmp_path / "first", {"a.weight": normal(64, 64, dtype=ml_dtypes.bfloat16), "b.weight": normal(64, 64)}
    )
    conversion.convert(first, tmp_path / "second", "q8_0")
    with checkpoint.open(tmp_path / "second") as model:
        found = conversion.decode_plan(model, Path("out"))
        assert layouts(found) == {"a.weight": "bf16", "b.weight": "f32"}
        assert layouts(conversion.decode_plan(model, Path("out"), "f16")) == {"a.weight": "f16", "b.weight": "f16"}
        with pytest.raises(PlanError, match="cannot decode to 'q4_0'; there are f64, f32, f16, bf16"):
            conversion.decode_plan(model, Path("out"), "q4_0")


def test_a_plan_for_a_dense_layout_that_only_borrows_a_name_is_not_dense(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with checkpoint.open(tmp_path / "a.safetensors") as model:
        info = model.index["a"]
    assert info.layout == DENSE["f32"]
    assert plan._action(replace(info, layout=replace(codecs.get("q4_0").layout, name="f32")), DENSE["f32"]) == "decode"
