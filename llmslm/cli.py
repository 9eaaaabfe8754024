"""The `llmslm` command. Heavy imports happen inside the subcommands, so that --help answers at once."""

import argparse
import sys
from collections.abc import Iterator
from importlib import metadata

from llmslm.errors import UserError

USAGE = """usage: llmslm COMMAND [OPTIONS]

Train and use LLM-to-SLM systems: a large model reads the prompt once, a small one writes the answer.

commands:
  fit        train a system:        llmslm fit --config quickstart --model.system llm_to_slm
  validate   loss and BLEU on the validation split of a recipe
  test       the same on its test split
  predict    write predictions for its test split
  generate   answer prompts:        llmslm generate --checkpoint runs/quickstart/llm_to_slm "prompt"

RECIPE after --config is a YAML file or the name of a shipped recipe; a second --config (for example
hardware/1gpu) overrides the first. `llmslm fit --help` lists all keys. Evaluation: llmslm-eval --help.
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: list[str] | None = None) -> None:
    """Run the command line; exit code 0, 1 (a mistake in what was given) or 2 (a mistake in the command)."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if args[0] == "--version":
        sys.stdout.write(f"llmslm {metadata.version('llmslm')}\n")
        return
    if args[0] not in (*TRAINER_COMMANDS, "generate"):
        _fail(f"unknown command {args[0]!r}; expected one of {', '.join((*TRAINER_COMMANDS, 'generate'))}", 2)
    try:
        _generate(args[1:]) if args[0] == "generate" else _train(args)
    except UserError as error:
        _fail(str(error), 1)


def _train(args: list[str]) -> None:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from llmslm.training import plain, run
    from llmslm.writing import is_disk_full

    try:
        run(args)
    except ArgumentError as error:
        _fail(plain(error), 2)
    except MisconfigurationException as error:
        _fail(plain(error), 1)
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        _fail("the disk is full: nothing more was written; free some space and resume with --ckpt_path last", 1)


def _generate(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="llmslm generate", allow_abbrev=False, description="Answer prompts.")
    parser.add_argument("prompts", nargs="*", help="prompts; one a line from standard input where none is given")
    parser.add_argument("--checkpoint", required=True, help="run folder or system folder")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default: the system's target limit")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts decoded together")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")
    options = parser.parse_args(args)

    import torch

    from llmslm.system import System

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    system = System.load(options.checkpoint, device=device)
    limit = options.max_new_tokens or system.codec.text_format.max_target_tokens
    for batch in _batches(options.prompts or (line.rstrip("\n") for line in sys.stdin), options.batch_size):
        for generation in system.generate(batch, max_new_tokens=limit):
            sys.stdout.write(generation.text + "\n")
            sys.stdout.flush()


def _batches(prompts: list[str] | Iterator[str], size: int) -> Iterator[list[str]]:
    """Group prompts; nothing is read further ahead than one batch."""
    batch: list[str] = []
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"llmslm: error: {message}\n")
    sys.exit(code)
