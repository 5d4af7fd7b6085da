"""Recipes: who overrides whom, what is refused and in which words, and that a saved recipe is the recipe."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.config import CHOICES, Recipe, resolve
from compressor.errors import RecipeError


def written(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def refused(config: Path | None = None, **settings: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(config, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    file = written(tmp_path / "r.yaml", ratio=0.3, samples=7)
    assert (Recipe().ratio, Recipe().samples) == (0.2, 500)  # what --help promises
    assert (resolve(None, {}).ratio, resolve(None, {}).samples) == (0.2, 500)
    assert (resolve(file, {}).ratio, resolve(file, {}).samples) == (0.3, 7)
    mixed = resolve(file, {"ratio": 0.4, "samples": None})
    assert (mixed.ratio, mixed.samples) == (0.4, 7)


def test_flags_that_are_false_or_zero_or_empty_still_override(tmp_path: Path) -> None:
    file = written(tmp_path / "r.yaml", allow_empty=True, samples=7, triple_layers=[0, 1])
    recipe = resolve(file, {"allow_empty": False, "samples": 0, "triple_layers": []})
    assert (recipe.allow_empty, recipe.samples, recipe.triple_layers) == (False, 0, [])


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert resolve(tmp_path / "empty.yaml", {}) == Recipe()


def test_a_saved_recipe_is_read_back_as_it_was(tmp_path: Path) -> None:
    recipe = Recipe(
        model="a: b # c",
        revision="007",
        data="naïve\\päth\n'x'",
        triple_layers=[0, 3],
        ratio=1 / 3,
        samples=0,
        dtype="bfloat16",
        allow_empty=True,
        max_length=99,
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert resolve(tmp_path / "r.yaml", {}) == recipe
    assert list(yaml.safe_load(recipe.to_yaml())) == [field.name for field in fields(Recipe)]  # every setting, in order


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_every_field_is_checked_for_its_type(field: str) -> None:
    for wrong in ({"a": 1}, object(), b"bytes"):
        assert refused(**{field: wrong}).startswith(f"{field} is ")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("samples", True),
        ("samples", 2.0),
        ("samples", "2"),
        ("ratio", True),
        ("ratio", "0.2"),
        ("allow_empty", 0),
        ("allow_empty", "no"),
        ("model", 1),
        ("model", False),
        ("max_length", 2.5),
        ("triple_layers", (0,)),
        ("triple_layers", 0),
        ("triple_layers", ["0"]),
        ("triple_layers", [True]),
        ("triple_layers", [0.0]),
    ],
)
def test_near_misses_of_a_type(field: str, wrong: Any) -> None:
    assert repr(wrong) in refused(**{field: wrong})


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, 0.0, 1.0, float("nan"), float("inf"), -0.0])
def test_the_ratio_is_strictly_between_zero_and_one(ratio: float) -> None:
    assert "between 0 and 1" in refused(ratio=ratio)


@pytest.mark.parametrize("ratio", [1e-9, 0.05, 0.999])
def test_ratios_that_are_fine(ratio: float) -> None:
    assert resolve(None, {"ratio": ratio}).ratio == ratio


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("samples", 0),
        ("eval_samples", 0),
        ("train_samples", 0),
        ("epochs", 1),
        ("eval_every", 1),
        ("lora", 1),
        ("seed", 0),
        ("batch_size", 1),
        ("max_length", 2),
        ("random_seeds", 2),
        ("repeats", 1),
        ("prompt_length", 1),
        ("new_tokens", 1),
    ],
)
def test_numbers_have_a_least_value(field: str, least: int) -> None:
    assert getattr(resolve(None, {field: least}), field) == least
    message = refused(**{field: least - 1})
    assert message.startswith(f"{field} is {least - 1}")
    assert f"{least} or more" in message


@pytest.mark.parametrize("field", sorted(CHOICES))
def test_words_come_from_a_list(field: str) -> None:
    for choice in CHOICES[field]:
        assert getattr(resolve(None, {field: choice}), field) == choice
    message = refused(**{field: CHOICES[field][0] + "x"})
    assert f"did you mean {CHOICES[field][0]!r}?" in message
    assert all(choice in message for choice in CHOICES[field])


def test_unknown_settings_get_a_suggestion(tmp_path: Path) -> None:
    assert "did you mean 'batch_size'?" in refused(batchsize=3)
    assert "did you mean 'criterion'?" in refused(written(tmp_path / "r.yaml", criterium="x"))
    message = refused(qqqq=1)
    assert "did you mean" not in message
    assert all(field.name in message for field in fields(Recipe))
    assert "unknown setting" in refused(written(tmp_path / "r.yaml", **{"output-dir": "x"}))


def test_unknown_settings_are_refused_even_beside_good_flags(tmp_path: Path) -> None:
    assert "modle" in refused(written(tmp_path / "r.yaml", modle="x"), model="gpt2")


def test_data_goes_with_the_model() -> None:
    assert Recipe(model="embedded").calibration_data == "embedded"
    assert Recipe(model="gpt2").calibration_data == "gsm8k"
    assert Recipe(model="embedded", data="x.jsonl").calibration_data == "x.jsonl"
    assert Recipe(model="gpt2", data="embedded").calibration_data == "embedded"


def test_a_recipe_never_changes() -> None:
    with pytest.raises(AttributeError):
        Recipe().ratio = 0.5  # type: ignore[misc]
    assert asdict(Recipe()) == asdict(Recipe())


# --- budgets --------------------------------------------------------------------------------------------------------


def test_a_ratio_where_nothing_else_is_said() -> None:
    plain = Recipe()
    assert (plain.ratio, plain.scope_in_force, plain.target, plain.unit_in_force) == (0.2, "layer", None, "head")
    aimed = Recipe(target_params=0.7)
    assert (aimed.ratio, aimed.scope_in_force, aimed.target) == (None, "global", ("params", 0.7))
    assert Recipe(target_flops=0.7, scope="layer").scope_in_force == "layer"
    even = Recipe(target_latency=0.7, deployable=True)
    assert (even.scope_in_force, even.unit_in_force, even.target) == ("layer", "query", ("latency", 0.7))
    assert Recipe(deployable=True, unit="group").unit_in_force == "group"


@pytest.mark.parametrize("settings", [{}, {"target_flops": 0.7}, {"target_params": 0.7, "deployable": True}])
def test_a_settled_recipe_settles_to_itself(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = Recipe(**settings)
    assert Recipe(**asdict(recipe)) == recipe
    assert replace(recipe, model="x") == Recipe(model="x", **settings)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert resolve(tmp_path / "r.yaml", {}) == recipe


def test_a_budget_on_the_command_line_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    file = written(tmp_path / "r.yaml", ratio=0.3)
    assert resolve(file, {"target_flops": 0.7}).target == ("flops", 0.7)
    assert resolve(file, {"target_flops": 0.7}).ratio is None
    assert resolve(written(tmp_path / "t.yaml", target_flops=0.7), {"ratio": 0.1}).target is None
    assert "both say" in refused(ratio=0.3, target_flops=0.7)
    assert "both say" in refused(target_params=0.3, target_flops=0.7)


def test_what_was_left_open_stays_open_in_a_recipe(tmp_path: Path) -> None:
    """A saved or shipped recipe with another budget takes the scope and unit that go with that budget."""
    (tmp_path / "plain.yaml").write_text(Recipe().to_yaml())
    (tmp_path / "even.yaml").write_text(Recipe(deployable=True).to_yaml())
    for config in (tmp_path / "plain.yaml", "embedded.yaml", "gpt2-gsm8k.yaml"):
        assert resolve(config, {"target_flops": 0.8}).scope_in_force == "global"
        assert resolve(config, {}).scope_in_force == "layer"
    loose = resolve(tmp_path / "even.yaml", {"deployable": False, "target_flops": 0.8})
    assert (loose.unit_in_force, loose.scope_in_force) == ("head", "global")


@pytest.mark.parametrize("structures", [[], ["heads", "heads"], ["neurons"]])
def test_structures_that_are_none(structures: list[str]) -> None:
    assert "expected heads, channels or heads,channels" in refused(structures=structures)
