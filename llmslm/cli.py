"""The `llmslm` command. Heavy imports happen inside the subcommands, so that --help answers at once."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslm.errors import UserError
from llmslm.recipe import resolve_recipes
from llmslm.writing import not_writable, refuse_existing

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from llmslm.generation.sampling import Sampling
    from llmslm.system import System

USAGE = """usage: llmslm COMMAND [OPTIONS]

Train and use LLM-to-SLM systems: a large model reads the prompt once, a small one writes the answer.

commands:
  fit        train a system:        llmslm fit --config quickstart --model.system llm_to_slm
  validate   loss and BLEU on the validation split of a recipe
  test       the same on its test split
  predict    write predictions for its test split
  features   encode a recipe's prompts once: llmslm features --config R --out DIR; then fit with
             --model.encoder.features DIR
  label      let the LLM write the targets: llmslm label --config R --checkpoint LLM --out DIR
  logits     store what the LLM finds likely: llmslm logits --config R --checkpoint LLM --out DIR; then fit with
             --model.distillation.logits DIR
  plan       memory per GPU and time per step: llmslm plan --config quickstart --config hardware/8gpu_fsdp
  consolidate  make a system of a training checkpoint, sharded or not, on a CPU
  export     a folder for the hub:  llmslm export --checkpoint runs/quickstart/llm_to_slm --output FOLDER
  generate   answer prompts:        llmslm generate --checkpoint runs/quickstart/llm_to_slm "prompt"
             as text comes (--stream), for a file (--input, --output), exactly as the llm would (--verify LLM)

RECIPE after --config is a YAML file or the name of a shipped recipe; a second --config (for example
hardware/1gpu) overrides the first. `llmslm fit --help` lists all keys. Evaluation: llmslm-eval --help.
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
FOLDER_KEYS = dict.fromkeys(("features", "label", "logits"), "--out")
FOLDER_KEYS |= dict.fromkeys(("consolidate", "export", "generate"), "--output")
"""The option that says where a command writes; the others write to the run folder."""


def main(args: list[str] | None = None) -> None:
    """Run the command line; exit code 0, 1 (a mistake in what was given) or 2 (a mistake in the command)."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if args[0] == "--version":
        sys.stdout.write(f"llmslm {metadata.version('llmslm')}\n")
        return
    others = {"generate": _generate, "features": _features, "label": _label, "logits": _logits, "plan": _plan}
    others |= {"consolidate": _consolidate, "export": _export}
    if args[0] not in (*TRAINER_COMMANDS, *others):
        _fail(f"unknown command {args[0]!r}; expected one of {', '.join((*TRAINER_COMMANDS, *others))}", 2)
    try:
        resolve_recipes(args)  # a misspelt one costs no time
        others[args[0]](args[1:]) if args[0] in others else _train(args)
    except UserError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        problem = not_writable(error)
        if problem is None:
            raise
        key = FOLDER_KEYS.get(args[0], "trainer.default_root_dir")
        _fail(f"{problem}; if it is where this command writes, give another folder ({key})", 1)
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _features(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="llmslm features",
        allow_abbrev=False,
        description=(
            "Encode the prompts of a recipe once. Other arguments are those of `llmslm fit`. Under torchrun the ranks "
            "share the work; a stopped call goes on where it was."
        ),
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the features")
    options, rest = parser.parse_known_args(args)

    from llmslm.callbacks.write_features import WriteFeatures, Written

    try:
        _train(["fit", *rest, "--model.system=llm_to_slm", "--trainer.logger=false"], WriteFeatures(Path(options.out)))
    except Written:
        sys.stderr.write(f"features: {options.out}\n")


def _train(args: list[str], *callbacks: "Callback") -> None:
    from llmslm.callbacks.safeguard import requeued_when_warned
    from llmslm.training import run

    try:
        with requeued_when_warned() if args[0] == "fit" else nullcontext():
            run(args, callbacks)
    except argparse.ArgumentError as error:
        _fail(" ".join(str(error).split()), 2)


def _label(args: list[str]) -> None:
    from llmslm.distillation.label import main as label

    label(args)


def _logits(args: list[str]) -> None:
    from llmslm.distillation.logits import main as logits

    logits(args)


def _plan(args: list[str]) -> None:
    from llmslm.planning.command import main as plan

    plan(args)


def _consolidate(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="llmslm consolidate", allow_abbrev=False, description="Checkpoint to system.")
    parser.add_argument("--checkpoint", required=True, help="file or folder in the checkpoints folder of a run")
    parser.add_argument("--output", default=None, help="folder to write; default: the run's system folder")
    options = parser.parse_args(args)

    from llmslm.consolidate import consolidate

    sys.stdout.write(f"{consolidate(options.checkpoint, options.output)}\n")


def _export(args: list[str]) -> None:
    from llmslm.export import main as export

    export(args)


def _generate(args: list[str]) -> None:
    options = _generate_parser().parse_args(args)
    _check_generate(options)
    sampling = _sampling(options)  # a mistake shows before weights are read

    import torch

    from llmslm.system import System
    from llmslm.verified_system import VerifiedSystem

    device = _device(options.device)
    fast = device.startswith("cuda") and options.verify is None  # exactly the llm's output: no rounding in between
    dtype = getattr(torch, options.dtype or ("bfloat16" if fast else "float32"))
    if options.verify is not None:
        system: System = VerifiedSystem.load_pair(options.checkpoint, options.verify, device=device, dtype=dtype)
    else:
        system = System.load(options.checkpoint, device=device, dtype=dtype)
    limit = options.max_new_tokens or system.codec.text_format.max_target_tokens
    settings = {"max_new_tokens": limit, "sampling": sampling}
    if options.input is not None:
        _generate_file(system, options, settings)
    else:
        _generate_to_stdout(system, options, settings)
    if isinstance(system, VerifiedSystem):
        counts = system.acceptance
        sys.stderr.write(f"{counts.per_block:.2f} drafted tokens accepted per block of {counts.blocks}\n")


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmslm generate", allow_abbrev=False, description="Answer prompts.")
    parser.add_argument("prompts", nargs="*", help="prompts; one a line from standard input where none is given")
    parser.add_argument("--checkpoint", required=True, help="run folder or system folder")
    parser.add_argument(
        "--verify", metavar="LLM", help="the llm that the checkpoint's encoder was taken from: its output"
    )
    parser.add_argument("--stream", action="store_true", help="write the text as it comes, prompt by prompt")
    parser.add_argument("--input", help="file of prompts: .txt, one a line, or .jsonl with prompt and, if wanted, id")
    parser.add_argument("--output", help="new .jsonl for id, prompt and prediction; goes on where a stopped call was")
    parser.add_argument("--max-new-tokens", type=int, help="default: the system's target limit")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        help="of the weights; default: bfloat16 on a GPU, float32 with --verify and on the CPU, which alone has int8",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="draw tokens; default: take the most probable")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the tokens that have this much of the mass")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        help="above 1, tokens already seen are less likely; default: 1 with a --temperature, else the model's own",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def _check_generate(options: argparse.Namespace) -> None:
    if (options.input is None) != (options.output is None):
        raise UserError("give --input and --output together: a file of prompts, and the file for predictions")
    if options.input is not None and (options.prompts or options.stream):
        raise UserError("--input takes the prompts from a file and writes to one: leave out --stream and prompts")
    if options.input is not None and Path(options.output).suffix != ".jsonl":
        raise UserError(f"--output {options.output} was given; expected a name that ends in .jsonl")
    if options.output is not None:  # before weights are read
        refuse_existing(Path(options.output), "--output")
    for name, value in (("--batch-size", options.batch_size), ("--max-new-tokens", options.max_new_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} was given; expected 1 or more")
    if not options.temperature and (options.top_k, options.top_p) != (0, 1.0):
        raise UserError("--top-k and --top-p say what is drawn from; give a --temperature above 0, too")
    if options.verify is not None and options.dtype == "int8":
        raise UserError("--verify gives the llm's own output, which weights of 8 bits change; use --dtype float32")


def _sampling(options: argparse.Namespace) -> "Sampling | None":
    if not options.temperature and options.repetition_penalty is None:
        return None
    from llmslm.generation.sampling import Sampling

    penalty = 1.0 if options.repetition_penalty is None else options.repetition_penalty
    return Sampling(options.temperature, options.top_k, options.top_p, penalty, options.seed)


def _device(name: str | None) -> str:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # torch without CUDA, no such device
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}; cpu always can") from error
    return name


def _generate_file(system: "System", options: argparse.Namespace, settings: dict[str, Any]) -> None:
    from llmslm.predict_file import predict_file

    source, out = Path(options.input), Path(options.output)
    sys.stderr.write(f"{predict_file(system, source, out, batch_size=options.batch_size, **settings)}\n")


def _generate_to_stdout(system: "System", options: argparse.Namespace, settings: dict[str, Any]) -> None:
    prompts = options.prompts or (line.rstrip("\n") for line in sys.stdin)
    for batch in _batches(prompts, 1 if options.stream else options.batch_size):
        if options.stream:
            system.stream(batch[0], on_text=_write, **settings)
            _write("\n")
        else:
            _write("".join(generation.text + "\n" for generation in system.generate(batch, **settings)))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _batches(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Group prompts; nothing is read further ahead than one batch."""
    prompts = iter(prompts)
    while batch := list(islice(prompts, size)):
        yield batch


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"llmslm: error: {message}\n")
    sys.exit(code)
