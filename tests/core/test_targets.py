"""Which modules a config selects, and what is said about entries that select nothing."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import LoraConfig, PeftConfig
from trimtab.core.targets import condense, inside, layer_index, matches, nearest, select, unused_patterns
from trimtab.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning
from trimtab.methods import METHODS, config_class

KINDS: dict[str, str | None] = {
    "model": None,
    "model.embed_tokens": "embedding",
    "model.layers": None,
    **{
        f"model.layers.{i}.{n}": kind
        for i in range(12)
        for n, kind in [
            ("self_attn", None),
            ("self_attn.q_proj", "linear"),
            ("self_attn.v_proj", "linear"),
            ("mlp.up_proj", "linear"),
            ("norm", None),
        ]
    },
    "lm_head": "linear",
}


def names(config: Any, **more: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [t.name for t in select(KINDS, config, **more)]


# ---------------------------------------------------------------------- one name
@pytest.mark.parametrize(
    ("wanted", "name", "entry"),
    [
        ({"q_proj"}, "a.b.q_proj", "q_proj"),
        ({"b.q_proj"}, "a.b.q_proj", "b.q_proj"),
        ({"q_proj"}, "q_proj", "q_proj"),
        ({"q"}, "a.b.q_proj", None),  # a segment, not a substring
        ({"proj"}, "a.b.q_proj", None),
        ({"a"}, "a.b", None),  # an ending, not a beginning
        ({"a.b.q_proj"}, "x.a.b.q_proj", "a.b.q_proj"),
        ([], "a.b", None),
        (None, "a.b", None),
        (r".*\.q_proj", "a.b.q_proj", r".*\.q_proj"),
        (r"q_proj", "a.b.q_proj", None),  # a string is a regular expression over the whole path
        (r"a\..*(q|v)_proj", "a.b.v_proj", r"a\..*(q|v)_proj"),
        (r"a.*", "b.a", None),
    ],
)
def test_matches(wanted: Any, name: str, entry: str | None) -> None:
    assert matches(wanted, name) == entry


@settings(derandomize=True)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "q_proj", "1"]), min_size=1, max_size=5),
    st.sampled_from(["a", "b", "ab", "a.b", "q_proj", "1.a"]),
)
def test_matches_as_peft_defines_it(segments: list[str], entry: str) -> None:
    name = ".".join(segments)
    assert bool(matches({entry}, name)) == (name == entry or name.endswith("." + entry))


def test_inside() -> None:
    assert inside(["score"], "score")
    assert inside(["score"], "a.score")
    assert inside(["score"], "a.score.dense")
    assert not inside(["score"], "a.my_score")
    assert not inside(None, "a")


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.7.q", None, 7),
        ("model.layers.7.experts.3.q", None, 7),
        ("model.layers.12.q", "layers", 12),
        ("encoder.block.3.layer.1.q", "block", 3),
        ("encoder.block.3.layer.1.q", "layer", 1),
        ("encoder.block.3.layer.1.q", ["none", "layer"], 1),
        ("layers.4.q", "layers", 4),
        ("layers.4.q", None, None),  # PEFT wants something before the list's name
        ("model.layers.q", None, None),
        ("model.layers.7", None, None),  # the block itself lies in no block
        ("model.h.7.q", "layers", None),
    ],
)
def test_layer_index(name: str, pattern: Any, index: int | None) -> None:
    assert layer_index(name, pattern) == index


# ---------------------------------------------------------------------- the table
def test_a_list_selects_by_ending_in_model_order() -> None:
    found = names(LoraConfig(target_modules=["v_proj", "q_proj"]))
    assert found[:4] == [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
    assert len(found) == 24


def test_a_string_is_a_regular_expression() -> None:
    assert names(LoraConfig(target_modules=r".*\.[01]\.mlp\..*")) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]


def test_all_linear_is_what_the_caller_says_it_is() -> None:
    assert names(LoraConfig(target_modules="All-Linear"), linear=["lm_head"]) == ["lm_head"]


def test_rows_say_why() -> None:
    (row,) = select(KINDS, LoraConfig(target_modules=["lm_head"]))
    assert (row.name, row.kind, row.why) == ("lm_head", "linear", "lm_head")


@pytest.mark.parametrize("exclude", [["model.layers.3.self_attn.q_proj"], r".*\.3\.self_attn\..*"])
def test_exclusion_wins(exclude: Any) -> None:
    found = names(LoraConfig(target_modules=["q_proj"], exclude_modules=exclude))
    assert len(found) == 11
    assert "model.layers.3.self_attn.q_proj" not in found


def test_what_is_saved_whole_is_not_adapted() -> None:
    assert (
        names(LoraConfig(target_modules=["lm_head", "v_proj"], modules_to_save=["lm_head"]))[-1]
        == "model.layers.11.self_attn.v_proj"
    )


@pytest.mark.parametrize(("layers", "expected"), [(3, [3]), ([0, 11], [0, 11]), (0, [0])])
def test_layers_to_transform(layers: Any, expected: list[int]) -> None:
    found = names(LoraConfig(target_modules=["q_proj"], layers_to_transform=layers))
    assert found == [f"model.layers.{i}.self_attn.q_proj" for i in expected]
    assert names(LoraConfig(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern="layers")) == found


# ---------------------------------------------------------------------- speaking up
def test_nothing_fits_names_the_nearest() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"not found in the base model.*nearest names.*'q_proj'"):
        select(KINDS, LoraConfig(target_modules=["q_porj"]))


def test_nothing_near_lists_what_there_is() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="can be adapted are named 'embed_tokens', 'q_proj'"):
        select(KINDS, LoraConfig(target_modules=["zzzz"]))


def test_nothing_fits_because_of_the_layers() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="You specified 'layers_to_transform': 99"):
        select(KINDS, LoraConfig(target_modules=["q_proj"], layers_to_transform=99))


def test_all_excluded_says_so() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"No modules were targeted .*q_proj'\] fit, but are excluded"):
        select(KINDS, LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    with pytest.raises(NoMatchingPeftModuleError, match="All modules were excluded"):
        select(KINDS, LoraConfig(target_modules=["q_proj"], exclude_modules=".*"))


def test_some_entries_fit_nothing() -> None:
    config = LoraConfig(target_modules=["q_proj", "w_proj"])
    with pytest.warns(PeftWarning, match=r"\['w_proj'\] fit no module of the model.*nearest names"):
        assert len(select(KINDS, config)) == 12
    with pytest.raises(NoMatchingPeftModuleError, match="w_proj"):
        select(KINDS, config, strict=True)


def test_an_exclusion_that_excludes_nothing() -> None:
    with pytest.warns(PeftWarning, match="no modules were excluded"):
        select(KINDS, LoraConfig(target_modules=["q_proj"], exclude_modules=["k_proj"]))


def test_no_targets_select_nothing_silently() -> None:
    assert names(LoraConfig(target_modules=[])) == []


def test_nearest_looks_at_last_segments_of_what_can_be_adapted() -> None:
    assert "'q_proj'" in nearest(["model.q_prj"], KINDS)
    assert nearest(["x"], {}) == ""
    assert "'norm'" not in nearest(["norn"], KINDS)


def test_unused_patterns() -> None:
    assert unused_patterns({"q_proj": 1, "k_proj": 2, r".*\.1\..*": 3}, KINDS) == ["k_proj"]


# ---------------------------------------------------------------------- condensing
def test_condense_gives_the_shortest_endings() -> None:
    targets = [n for n in KINDS if n.endswith(("q_proj", "v_proj"))]
    assert condense(targets, set(KINDS) - set(targets)) == {"q_proj", "v_proj"}
    some = [n for n in targets if ".1." in n or ".2." in n]
    assert condense(some, set(KINDS) - set(some)) == {
        f"{i}.self_attn.{p}" for i in (1, 2) for p in ("q_proj", "v_proj")
    }


@settings(derandomize=True)
@given(st.sets(st.sampled_from(sorted(KINDS)), min_size=1))
def test_condensed_endings_select_the_same(targets: set[str]) -> None:
    others = set(KINDS) - targets
    short = condense(targets, others)
    assert {n for n in KINDS if matches(short, n)} == targets
    assert len(short) <= len(targets)


# ---------------------------------------------------------------------- fields that contradict each other
@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layer_fields_go_with_lists_only(field: str) -> None:
    with pytest.raises(ConfigError, match=f"`{field}` cannot be used when `target_modules` is a str"):
        LoraConfig(target_modules=r".*q_proj", **{field: [1] if field == "layers_to_transform" else ["h"]})


def test_a_pattern_needs_layers() -> None:
    with pytest.raises(ConfigError, match="`layers_to_transform` must also be specified"):
        LoraConfig(target_modules=["q_proj"], layers_pattern=["h"])
    LoraConfig(target_modules=["q_proj"], layers_pattern=["h"], layers_to_transform=0)


REQUIRED = {"ADALORA": {"total_step": 10}}
NARROWED = [
    name for name in METHODS if "layers_to_transform" in {f.name for f in dataclasses.fields(config_class(name))}
]


@pytest.mark.parametrize("name", NARROWED)
def test_files_that_narrow_down_what_cannot_be_narrowed_load(name: str) -> None:
    fields = {"peft_type": name, "target_modules": r".*q_proj", "layers_to_transform": [1]}
    with pytest.warns(PeftWarning, match="`layers_to_transform` in .* is ignored"):
        config = PeftConfig.from_dict(fields | REQUIRED.get(name, {}))
    assert (config.target_modules, config.layers_to_transform) == (r".*q_proj", None)
    fields = {"peft_type": name, "target_modules": ["q_proj"], "layers_pattern": ["h"]}
    with pytest.warns(PeftWarning, match="`layers_pattern` in .* is ignored"):
        config = PeftConfig.from_dict(fields | REQUIRED.get(name, {}))
    assert (config.target_modules, config.layers_pattern) == ({"q_proj"}, None)


# ---------------------------------------------------------------------- what was meant
SLIPS: list[tuple[Any, str]] = [
    ("q_proj", r"expression over a module's whole path, such as 'model\.layers\.0\.self_attn\.q_proj'; for names "
               r"write a list, target_modules=\['q_proj'\]"),
    ("q_proj,v_proj", r"target_modules=\['q_proj', 'v_proj'\]"),
    ("q_proj, v_proj", r"target_modules=\['q_proj', 'v_proj'\]"),
    ("q_proj|v_proj", r"target_modules=\['q_proj', 'v_proj'\]"),
    ("(q_proj|v_proj)", r"target_modules=\['q_proj', 'v_proj'\]"),
    ("q_proj v_proj", r"target_modules=\['q_proj', 'v_proj'\]"),
    ("['q_proj']", r"target_modules=\['q_proj'\]"),
    ("self_attn.q_proj", r"target_modules=\['self_attn.q_proj'\]"),
    ("q_prj", r"target_modules=\[\.\.\.\]. The nearest names in this model are 'q_proj'"),
    ("all_linear", 'write target_modules="all-linear"'),
    ("linear", 'write target_modules="all-linear"'),
    (["all-linear"], 'write target_modules="all-linear", which stands alone'),
    (["q_proj,v_proj"], r"'q_proj,v_proj' is one name here: write \['q_proj', 'v_proj'\]"),
    (["q_proj.weight"], "'q_proj.weight' is a parameter: name its module, 'q_proj'"),
    ([r".*\.q_proj"], "is a name, not a regular expression: that is given as a string alone"),
    (["q_prj"], "nearest names in this model are 'q_proj'"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "said"), SLIPS, ids=[str(w) for w, _ in SLIPS])
def test_slips_are_told_what_was_meant(wanted: Any, said: str) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=said):
        select(KINDS, LoraConfig(target_modules=wanted))
    if isinstance(wanted, list):
        with pytest.warns(PeftWarning, match=said):
            select(KINDS, LoraConfig(target_modules=[*wanted, "up_proj"]))
    else:
        with pytest.warns(
            PeftWarning, match="no modules were excluded.*" + said.replace("target_modules", "exclude_modules")
        ):
            select(KINDS, LoraConfig(target_modules=["up_proj"], exclude_modules=wanted))


def test_names_that_fit_are_never_called_the_nearest_of_themselves() -> None:
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        select(KINDS, LoraConfig(target_modules="q_proj"))
    assert "nearest" not in str(caught.value)


def test_what_fits_nothing_beside_parameters_that_fit_is_a_warning() -> None:
    with pytest.warns(PeftWarning, match=r"`target_modules` \['q_prj'\] fit no module of the model\. The nearest"):
        assert select(KINDS, LoraConfig(target_modules=["q_prj"], target_parameters=["experts"])) == []


def test_what_compiling_adds_to_paths_is_looked_through() -> None:
    kinds = {name.replace("layers.", "layers._orig_mod."): kind for name, kind in KINDS.items()}
    for wanted in (r"model\.layers\.1\.mlp\.up_proj", ["layers.1.mlp.up_proj"], ["layers._orig_mod.1.mlp.up_proj"]):
        assert [t.name for t in select(kinds, LoraConfig(target_modules=wanted))] == [
            "model.layers._orig_mod.1.mlp.up_proj"
        ]
