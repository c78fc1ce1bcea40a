"""Recipes: each is well formed, builds its methods, and its schedule fits its task."""

from __future__ import annotations

import pytest

from sparsebert.cli import recipes
from sparsebert.methods import METHODS, SVD, Magnitude
from sparsebert.roles import FAMILIES
from tiny_models import tiny_model

NAMES = recipes.names()
ROLES = tuple(FAMILIES["bert"].roles)
# What the published code of SEVEN ends its training after, at batch 32.
STEPS_OF_SEVEN = {
    "mnli": 122_720,
    "qqp": 113_710,
    "qnli": 32_740,
    "sst2": 21_050,
    "cola": 2_680,
    "mrpc": 1_150,
}


def write(tmp_path, text):
    file = tmp_path / "own.toml"
    file.write_text(text)
    return str(file)


def test_every_method_has_a_recipe_for_every_task():
    found: dict[str, set[str]] = {}
    for name in NAMES:
        file, task = name.split(":")
        for stage in recipes.load(name).stages:
            found.setdefault(stage.method, set()).add(task)
    assert set(METHODS) <= set(found)
    assert {method for method, tasks in found.items() if tasks != set(recipes.tasks())} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_task(name):
    """Prepared on a small model for as many steps as it has: a schedule that does not fit is refused there."""
    recipe = recipes.load(name)
    assert recipe.task is not None
    model, plan = tiny_model(), None
    for stage in recipe.stages:
        steps = stage.total_steps(recipe.task.train_rows)
        assert stage.warmup_steps(steps) < steps
        method = stage.build(steps, selection := stage.selection(ROLES), plan)
        teacher = tiny_model(seed=1) if stage.teacher else None
        run = method.prepare(model, total_steps=steps, teacher=teacher)
        assert run.total_steps == steps
        if stage is not recipe.stages[-1]:
            # The next begins with a model like what this one ends in.
            model = tiny_model()
            one_shot = Magnitude if (stage.target or "").startswith("bitmap") else SVD
            plan = one_shot(selection).prepare(model, total_steps=1).finalize()


@pytest.mark.parametrize(("task", "steps"), STEPS_OF_SEVEN.items())
def test_seven_takes_the_steps_of_its_published_code(task, steps):
    (stage,) = recipes.load(f"seven:{task}").stages
    assert stage.total_steps(recipes.tasks()[task].train_rows) == steps


def test_losparse_on_mnli_takes_the_published_settings():
    recipe = recipes.load("losparse:mnli")
    (stage,) = recipe.stages
    # 392,702 rows are 12,272 batches of 32, eight of them a step.
    assert stage.total_steps(recipe.task.train_rows) == 8 * 1534
    assert (stage.lr, stage.warmup, stage.options["start"], stage.options["end"]) == (9e-5, 480, 675, 5 * 675)


def test_stages_inherit_and_the_most_special_setting_wins(tmp_path):
    file = write(
        tmp_path,
        """
        lr = 1e-5
        batch_size = 8
        [[stages]]
        method = "movement"
        target = "bitmap:0.2"
        options = { start = 1, end = 2 }
        [[stages]]
        method = "lpaf"
        target = "low-rank:0.5"
        lr = 2e-5
        [tasks.cola]
        batch_size = 16
        [[tasks.cola.stages]]
        options = { end = 3 }
        [[tasks.cola.stages]]
        lr = 3e-5
        """,
    )
    first, second = recipes.load(file).stages
    assert (first.lr, first.batch_size, first.options) == (1e-5, 8, {"start": 1, "end": 2})
    assert (second.lr, second.batch_size, second.options) == (2e-5, 8, {})
    recipe = recipes.load(f"{file}:cola")
    first, second = recipe.stages
    assert (first.lr, first.batch_size, first.options) == (1e-5, 16, {"start": 1, "end": 3})
    assert (second.lr, second.batch_size) == (3e-5, 16)
    assert recipe.task == recipes.tasks()["cola"]


def test_shares_of_steps_are_counted_out():
    stage = recipes.Stage("magnitude", "2:4", warmup="10%", steps=205)
    assert stage.warmup_steps(stage.total_steps(1)) == 20
    assert recipes.Stage("magnitude", "2:4", warmup="0%").warmup_steps(100) == 0
    assert recipes.Stage("magnitude", "2:4", warmup="1%").warmup_steps(5) == 1
    with pytest.raises(ValueError, match="warmup takes 50 steps, expected fewer than the 50"):
        recipes.Stage("magnitude", "2:4", warmup=50).warmup_steps(50)
    assert recipes.Stage("magnitude", batch_size=8, accumulate=4, epochs=2).total_steps(100) == 2 * 4


def test_options_are_checked_against_the_method():
    stage = recipes.Stage("magnitude", "2:4", options={"start": "10%"})
    with pytest.raises(ValueError, match="magnitude: has no option 'start'; it has none"):
        stage.build(100, stage.selection(ROLES))
    with pytest.raises(ValueError, match="method is 'magic', expected one of .*magnitude"):
        recipes.Stage("magic", "2:4").build(100, {})


def test_what_is_measured_on_the_data_is_asked_for_by_its_name():
    stage = recipes.Stage("svd", "low-rank:0.5", options={"rows": 4})
    asked = []
    method = stage.build(100, stage.selection(ROLES), None, lambda name, count: asked.append((name, count)) or {})
    assert asked == [("rows", 4)] and method.rows == {}
    with pytest.raises(
        ValueError, match="svd: Fisher row weights are measured on the training's batches, of which none"
    ):
        stage.build(100, stage.selection(ROLES))


def test_a_method_is_given_the_teacher_or_distilled_beside_it():
    with pytest.raises(ValueError, match="distillation is 0.5, but knowledge is given the teacher itself"):
        recipes.Stage("knowledge", "bitmap:0.5", teacher=True, distillation=0.5)
    with pytest.raises(ValueError, match="temperature is 0, expected a positive number"):
        recipes.Stage("magnitude", "2:4", temperature=0)


def test_the_selection_puts_layers_before_the_target():
    stage = recipes.Stage("magnitude", "2:4", layers={"query": "1:4", "output": "dense"})
    found = stage.selection(ROLES)
    assert (str(found["query"]), found["output"], str(found["key"])) == ("1:4", None, "2:4")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr = 1e-5", "has no method"),
        ('method = "magnitude"\nlearning_rate = 1', "has the key 'learning_rate', expected one of accumulate, "),
        ('method = "magnitude"\nlr = "1e-5"', "lr is '1e-5', expected float or int"),
        ('method = "magnitude"\nepochs = true', "epochs is True, expected int or float"),
        ('method = "magnitude"\nlr = 0.0', "lr is 0.0, expected a positive number"),
        ('method = "magnitude"\nlr = nan', "lr is nan, expected a positive number"),
        ('method = "magnitude"\nwarmup = "a tenth"', "warmup is 'a tenth', expected a number, or a share"),
        ('method = "magnitude"\nschedule = "cosine"', "schedule is 'cosine', expected one of linear, constant"),
        ('method = "magnitude"\ntarget = "2-4"', "'2-4' is no format"),
        ('method = "magnitude"\nlayers = { query = 4 }', "expected formats by role or pattern"),
        ('method = "magnitude"\n[tasks.sst3]', "tasks has 'sst3', expected one of cola, "),
        ('method = "magnitude"\n[tasks.cola]\nlength = 1', "tasks.cola: has the key 'length'"),
        ('method = "magnitude"\n[tasks]\ncola = 1', "tasks.cola is int, expected a table"),
        ("stages = []", "stages is empty or no list"),
        ('[[stages]]\nmethod = "magnitude"\n[tasks.cola]\nstages = [{}, {}]', "tasks.cola.stages: expected 1"),
        ("method = ", "Invalid value"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, complaint):
    file = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        recipes.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert complaint in str(error.value)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="recipe is 'magic', expected one of admm, .* or a file that ends in .toml"):
        recipes.load("magic:cola")
    with pytest.raises(ValueError, match="no.toml: there is no such file"):
        recipes.load(str(tmp_path / "no.toml"))
    with pytest.raises(ValueError, match="magnitude.toml: has no task 'squad'; its tasks: cola, "):
        recipes.load("magnitude:squad")


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("start=100", ("start", 100)),
        ("alpha1=.8", ("alpha1", 0.8)),
        ("alpha1=0.8", ("alpha1", 0.8)),
        ("signed=true", ("signed", True)),
        ("variant=pre", ("variant", "pre")),
        ("start=10%", ("start", "10%")),
        ('terms=["hidden"]', ("terms", ["hidden"])),
    ],
)
def test_options_of_the_command_line(text, option):
    assert recipes.parse_option(text) == option


@pytest.mark.parametrize("text", ["start", "=3", "a b=3"])
def test_what_is_no_option(text):
    with pytest.raises(ValueError, match="write it as start=100"):
        recipes.parse_option(text)
