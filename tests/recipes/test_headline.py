"""The stages of the headline series: what each is run with exists and fits together."""

import io
from contextlib import redirect_stdout

import pytest
import yaml

from evaluation.cli import _parser
from evaluation.series import choose, load_series
from llmslm.recipe import read_recipe
from llmslm.training import run

STAGES = load_series("headline")
REHEARSED = load_series("rehearsal")
OTHERS = (
    "llm_alone",
    "llm_tuned",
    "layer_6_labels",
    "cross_labels",
    "slm_encoder_decoder",
    "read_labels",
    "slm_novel",
    "add_distilled",
    "mlp_labels",
    "unread_labels",
    "add_four",
    "add_deeper",
    "slm_longer",
    "slm_small",
    "add_small",
)
PARSED = [
    "pretrain/llm",
    "pretrain/t5",
    *(f"en_it/{name}" for name in OTHERS),
    *(f"t5_en_it/{name}" for name in ("llm", "slm_first", "read_first")),
    "summary/slm_labels_2",
    "smollm2_docstrings/add",
    "smollm2_summary/llm",
]


@pytest.mark.parametrize("name", PARSED)
def test_recipes_and_overlays_fit_together(name):
    stage = STAGES[name]
    arguments = [part for part in stage.command()[2:] if part != "--ckpt_path=last"]
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit):
        run([*arguments, "--print_config"])
    config = yaml.safe_load(printed.getvalue())
    model = config["model"]
    for key in ("llm", "slm"):
        assert (model[key]["source"] is None) != (model[key]["config"] is None)
    families = {model[key]["config"]["model_type"] for key in ("llm", "slm") if model[key]["config"]}
    assert families <= {"llama", "t5"}
    assert config["checkpoint"]["monitor"] == "val/bleu"
    assert config["save_system"]["recipe"] == name.removesuffix("_2").replace("/", "-")
    trained = model["llm" if model["system"] == "llm" else "slm"]["config"]
    if trained and trained["model_type"] == "t5":
        assert trained.keys() >= {"d_model", "dropout_rate"}
        assert not model["dropout"]  # T5 brings its own


def test_a_rehearsal_has_all_stages_and_none_of_a_gpu():
    assert REHEARSED.keys() == STAGES.keys()
    for name, stage in REHEARSED.items():
        assert (stage.needs, stage.folder) == (STAGES[name].needs, STAGES[name].folder)
        if stage.kind in ("compare", "speed"):
            options = _parser().parse_args(stage.command()[2:])
            assert (options.device, options.dtype) == ("cpu", "float32")
            assert options.limit <= 16
        elif stage.kind == "fit":
            given = dict(zip(stage.arguments[::2], stage.arguments[1::2], strict=True))  # the last one counts
            assert (given["--config"], given["--model.compile"]) == ("hardware/cpu", "false")
            assert int(given["--trainer.max_steps"]) <= 400


def test_other_stages_have_arguments_of_their_commands():
    for stage in STAGES.values():
        if stage.kind in ("compare", "speed"):
            options = _parser().parse_args(stage.command()[2:])
            systems = [getattr(options, name) for name in ("llm", "slm", "llm_to_slm")]
            folders = {str(STAGES[need].folder) for need in stage.needs}
            assert {system for system in systems if system} == folders


def test_nothing_is_timed_before_all_is_trained():
    assert {stage.kind for stage in choose(STAGES, ["*/speed"])} == {"data", "prompts", "fit", "label", "speed"}
    assert list(STAGES)[-1] == "summary/batches"


@pytest.mark.parametrize("task", ["en_it", "summary"])
def test_the_verified_mode_is_compared_where_rounding_turns_no_choice(task):
    options = _parser().parse_args(STAGES[f"{task}/verified"].command()[2:])
    assert (options.dtype, options.limit) == ("float32", None)


@pytest.mark.parametrize("name", ["add", "add_labels_2", "mlp_labels", "add_four", "add_small"])
def test_all_slms_read_the_llm_at_one_depth_which_is_no_matter_of_its_own_training(name):
    """What the LLM is trained with does not change with it: its weights stay."""
    assert "headline/states" in STAGES[f"en_it/{name}"].arguments
    assert "headline/states" not in {*STAGES["pretrain/llm"].arguments, *STAGES["en_it/slm"].arguments}


@pytest.mark.parametrize("task", ["en_it", "summary"])
def test_all_labels_are_those_that_the_stages_write(task):
    files = read_recipe([f"headline/{task}_labels"], [])["data"]["source"]["init_args"]["train"]
    for name in ("slm_labels", "add_labels", "add_small", "logits"):
        stage = STAGES[f"{task}/{name}"]
        assert files == [f"{STAGES[need].folder}/train.parquet" for need in stage.needs]
        assert f"headline/{task}_labels" in stage.arguments


@pytest.mark.parametrize("task", ["en_it", "summary"])
def test_the_llm_reads_what_it_was_trained_on(task):
    """One LLM does both tasks: they are told apart by what their prompts begin with, in the data."""
    for recipe in (task, "pretrain"):
        assert "prompt_template" not in read_recipe([f"headline/{recipe}"], [])["data"]
