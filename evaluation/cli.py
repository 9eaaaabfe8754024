"""The command `llmslm-eval`: compare systems, build the leaderboard, check the targets."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmslm.errors import UserError
from llmslm.writing import not_writable


def main(args: list[str] | None = None) -> None:
    """Run `llmslm-eval`; a mistake of the user is printed as one line and exits with status 1, or 2 in the command."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if rest and not options.has_own_options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        options.run(options)
    except UserError as error:
        _fail(str(error), 1)
    except argparse.ArgumentError as error:  # options that went to `llmslm fit`, or the recipe's keys
        _fail(" ".join(str(error).split()), 2)
    except OSError as error:
        problem = not_writable(error)
        if problem is None:
            raise
        _fail(f"{problem}; if it is where this command writes, give another folder (--out)", 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it was", 130)


def _fail(message: str, code: int) -> None:
    print(f"llmslm-eval: {message}", file=sys.stderr)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmslm-eval", description=__doc__, allow_abbrev=False)
    parser.set_defaults(has_own_options=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, add in (
        ("compare", _add_compare),
        ("leaderboard", _add_leaderboard),
        ("mt-bench", _add_mt_bench),
        ("targets", _add_targets),
        ("experiment", _add_experiment),
        ("speed", _add_speed),
    ):
        add(commands, name)
    return parser


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "evaluate trained systems on the same examples and write a record each"
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    _add_systems(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="recipe (name or YAML), or JSONL/Parquet with prompt and target")
    what.add_argument("--task", help="task (name or YAML): data, metrics, token budget under a version")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="of --data (default: test)")
    parser.add_argument("--limit", type=_positive, help="evaluate at most so many examples, drawn with the seed")
    parser.add_argument("--out", type=_folder, required=True, metavar="DIR", help="folder of the records")
    metrics = (
        "of bleu, chrf, ter, rouge, exact_match, smoothed_bleu (default: the task's, or all but ter and the last), and "
        "models on this machine: comet=FILE.ckpt, bertscore=FOLDER[@LAYER]"
    )
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=metrics)
    reuse = "folder of further comparisons: what they predicted of the same systems and examples is not predicted again"
    parser.add_argument("--reuse", type=_folder, metavar="DIR", help=reuse)
    parser.add_argument("--controls", action="store_true", help="also llm_to_slm with zero and with shuffled features")
    numbers = parser.add_argument_group("settings")
    budget = "token budget of a prediction (default: the longest target that the systems were trained on)"
    numbers.add_argument("--max-new-tokens", type=_positive, help=budget)
    numbers.add_argument("--batch-size", type=_positive, help="examples in a batch of predictions (default: 16)")
    numbers.add_argument("--seed", type=int, help="of the draw of examples and the bootstrap (default: 12345)")
    numbers.add_argument("--resamples", type=_positive, help="draws of the bootstrap (default: 1000)")
    speed = "batch sizes of the speed measurement, such as 1 8 32 largest: the largest that fits (default: 1)"
    numbers.add_argument("--speed-batch-sizes", type=_batch_size, nargs="+", metavar="N", help=speed)
    numbers.add_argument("--warmups", type=_natural, help="uncounted rounds of each measurement (default: 10)")
    numbers.add_argument("--runs", type=_natural, help="counted rounds; 0 measures no speed (default: 10)")
    parser.set_defaults(run=_compare)


def _add_systems(parser: argparse.ArgumentParser) -> None:
    systems = parser.add_argument_group("systems (at least one)")
    for system in ("llm", "slm", "llm_to_slm"):
        flag = f"--{system.replace('_', '-')}"
        systems.add_argument(flag, metavar="DIR", help=f"folder of a trained {system} system")
    peers = (
        "made of them: generate (the llm by transformers' generate()), static_cache, assisted, prompt_lookup, verified"
    )
    systems.add_argument("--peers", nargs="+", default=[], metavar="NAME", help=peers)
    own = "further ones: YAML files with class_path and init_args, or models of transformers by hub name or folder"
    systems.add_argument("--systems", nargs="+", default=[], metavar="SPEC", help=own)
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: float32")


def _folders(options: argparse.Namespace) -> dict[str, str]:
    systems = {name: getattr(options, name) for name in ("llm", "slm", "llm_to_slm")}
    folders = {name: folder for name, folder in systems.items() if folder is not None}
    if not (folders or options.systems):
        raise UserError("no system was given; expected at least one of --llm, --slm, --llm-to-slm, --systems")
    return folders


def _compare(options: argparse.Namespace) -> None:
    folders = _folders(options)
    from evaluation.compare import Settings, compare_folders
    from evaluation.examples import load_examples, load_task_examples
    from evaluation.leaderboard.rows import leaderboard_rows
    from evaluation.leaderboard.table import markdown_table
    from evaluation.record import read_record

    names = (
        *("out", "max_new_tokens", "batch_size", "metrics", "seed", "resamples", "controls"),
        *("speed_batch_sizes", "warmups", "runs", "reuse"),
    )
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.task:
        if options.split:
            raise UserError(f"--split {options.split} was given; a task says its split itself, under its version")
        from evaluation.tasks import load_task

        name, task = load_task(options.task)
        of_task: dict[str, Any] = {"metrics": task.metrics, "max_new_tokens": task.max_new_tokens}
        settings = Settings(**of_task | given)
        examples = load_task_examples(name, task, options.limit, settings.seed)
    else:
        settings = Settings(**given)
        examples = load_examples(options.data, options.split or "test", options.limit, settings.seed)
    where: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    paths = compare_folders(folders, examples, settings, **where, peers=options.peers, specs=options.systems)
    if not paths:  # a rank that is not the first
        return
    print(markdown_table(leaderboard_rows(read_record(path) for path in paths)))
    print("\n".join(f"record: {path}" for path in paths))


def _add_leaderboard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "make a table, a page and a plot of records, and log them to MLflow"
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("records", nargs="*", metavar="RECORDS", help="record files, or folders of them")
    source = "take the evaluations of an MLflow experiment instead (and log nothing)"
    parser.add_argument("--from-mlflow", metavar="EXPERIMENT", help=source)
    parser.add_argument(
        "--out", type=_folder, required=True, metavar="DIR", help="folder of leaderboard.{md,csv,html,png}"
    )
    parent = "run that the evaluations become children of (default: one of their own)"
    parser.add_argument("--mlflow-parent", metavar="RUN_ID", help=parent)
    parser.add_argument("--no-mlflow", action="store_true", help="write the files only")
    parser.add_argument("--no-models", action="store_true", help="log no weights, and register no system in MLflow")
    parser.set_defaults(run=_leaderboard)


def _leaderboard(options: argparse.Namespace) -> None:
    if bool(options.records) == bool(options.from_mlflow):
        raise UserError("expected either RECORDS or --from-mlflow EXPERIMENT")
    from evaluation.leaderboard import build

    records = options.records
    if options.from_mlflow:
        from evaluation.tracking import fetch_records

        records = fetch_records(options.from_mlflow, options.out / "from_mlflow")
    built = build(records, options.out)
    print(built.markdown)
    print("\n".join(f"{name}: {path}" for name, path in built.files.items()))
    if not (options.no_mlflow or options.from_mlflow):
        from evaluation.tracking import log_comparison

        logged = log_comparison(built, options.mlflow_parent, models=not options.no_models)
        print(f"mlflow: run {logged.parent_run_id} in {logged.tracking_uri}")


def _add_mt_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "write answers to MT-Bench's questions for a judge elsewhere"
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    _add_systems(parser)
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="FastChat's question.jsonl")
    parser.add_argument("--out", type=_folder, required=True, metavar="DIR", help="folder of SYSTEM.jsonl")
    budget = "token budget of an answer (default: 1024)"
    parser.add_argument("--max-new-tokens", type=_positive, default=1024, help=budget)
    parser.set_defaults(run=_mt_bench)


def _mt_bench(options: argparse.Namespace) -> None:
    from evaluation.mt_bench import read_questions, write_answers

    folders = _folders(options)
    questions = read_questions(options.questions)
    import torch

    from evaluation.arms import load_arms

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for arm in load_arms(folders, device, options.dtype, options.peers, options.systems):
        print(write_answers(arm.system, questions, options.out, options.max_new_tokens, arm.checkpoint))


def _add_targets(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "print the project's targets with what was measured; exits 1 if one is unmet or unmeasured"
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    topics = "only the targets of one topic: method, decode, evaluation, training, headline or scaling"
    parser.add_argument("--topic", help=topics)
    record = parser.add_argument_group("write a measurement into the list")
    record.add_argument("--measured", nargs=2, metavar=("ID", "VALUE"), help="the target and what was measured")
    records = "records that the figure stands in, which say its commit (default: this checkout's), command and hardware"
    record.add_argument("--record", nargs="+", type=Path, default=[], metavar="FILE", help=records)
    record.add_argument("--by", metavar="COMMAND", help="what was run to measure it (default: the record's command)")
    record.add_argument("--hardware", help="where (default: the record's, or this machine)")
    parser.set_defaults(run=_targets)


def _targets(options: argparse.Namespace) -> None:
    from evaluation.targets import all_met, read_origin, read_targets, record_measurement, table

    if options.measured is not None:
        name, text = options.measured
        if not (options.by or options.record):
            raise UserError(f"a measurement of {name} needs its record (--record), or the command that made it (--by)")
        try:
            value = float(text)
        except ValueError as error:
            raise UserError(f"{text!r} is no number (--measured ID VALUE)") from error
        origin = read_origin(options.record) if options.record else {}
        command, hardware = options.by or origin["command"], options.hardware or origin.get("hardware")
        print(table([record_measurement(name, value, command, hardware=hardware, commit=origin.get("commit"))]))
        return
    targets = read_targets(topic=options.topic)
    print(table(targets))
    if not all_met(targets):
        sys.exit(1)


def _add_experiment(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "train the llm, slm and llm_to_slm of a recipe, compare them and build the leaderboard"
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="RECIPE", help="recipe: its name or a YAML file")
    what.add_argument("--series", metavar="NAME", help="run a series of stages instead, for example headline")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="stages of the series, also en_it/*")
    parser.add_argument("--list", action="store_true", help="print the series' stages and their state; run nothing")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="stages that run at a time (default: 1)")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
    parser.add_argument("--limit", type=_positive, help="evaluate at most so many examples")
    parser.epilog = "Other options go to `llmslm fit`, such as --seed_everything=2 or --trainer.max_steps=10."
    parser.set_defaults(run=_experiment, has_own_options=True)


def _experiment(options: argparse.Namespace) -> None:
    if options.series:
        from evaluation import series

        overrides = [part for part in options.rest if part != "--"]
        if options.list:
            print(series.list_stages(options.series, options.only, overrides))
        else:
            series.run(options.series, options.only, options.jobs, overrides)
        return
    from evaluation.experiment import run

    run(options.config, options.out, options.limit, options.rest)


def _add_speed(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    text = "time the decode engine and generate() on random weights of known shapes"
    parser = commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    parser.set_defaults(run=_speed, has_own_options=True)


def _speed(options: argparse.Namespace) -> None:
    from evaluation.decoding.command import main as speed

    speed(options.rest)


def _folder(text: str) -> Path:
    path = Path(text)
    if next(each for each in (path, *path.absolute().parents) if each.exists()).is_file():
        raise argparse.ArgumentTypeError(f"{text} is, or lies in, a file; expected a folder")
    return path


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _natural(text: str) -> int:
    return _whole(text, least=0)


def _batch_size(text: str) -> int | str:
    return text if text == "largest" else _positive(text)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected a whole number of at least {least}")
    return int(text)
