"""Every fusion with every alignment that it uses: trained with several seeds, compared on the same examples.

    python -m evaluation.ablation                # into runs/ablation, and the table to the screen
    python -m evaluation.ablation --publish      # also into evaluation/records/ablation and docs/results
    python -m evaluation.ablation --config ablations/pretrained      # states of a pretrained LLM

The recipe's llm is trained once and read by all; alignments of two tokenizers get an slm whose vocabulary is a smaller
one. A pretrained llm reads all prompts once, into a feature cache; the slm has tokens of its own throughout. What is
done already is not done again, so a stopped call goes on where it was.
"""

import argparse
import functools
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from evaluation.benchmarks.report import mistakes_in_one_line
from evaluation.leaderboard.rows import Row, leaderboard_rows
from evaluation.leaderboard.table import number
from evaluation.record import find_records, read_record
from evaluation.systems import CONTROLS, LLM, LLM_TO_SLM, SLM, Arm
from llmslm.models.encoder import Encoder
from llmslm.models.modeling import LlmToSlm
from llmslm.recipe import find_recipe, load_source, read_recipe
from llmslm.system import System
from llmslm.writing import write_text

RECIPE = "ablations/fusions"
RUNS = Path("runs/ablation")
RECORDS, PAGES = Path("evaluation/records/ablation"), Path("docs/results")
LLM_STEPS = 1000
OTHER_VOCABULARY = 1024
"""Of the slm's tokenizer, where it is not the llm's."""
OWN_TOKENS = f"--data.tokenizer.vocab_size={OTHER_VOCABULARY}"
TRAINED = "trained.json"
SCORES = {"bits_per_byte": ("bits/byte", 3), "chrf": ("chrF", 1), "rouge_l": ("ROUGE-L", 1), "bleu": ("BLEU", 1)}
QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@dataclass(frozen=True)
class Variant:
    """One system of the ablation."""

    name: str
    """Its row in the table."""
    system: str
    arguments: tuple[str, ...] = ()
    """Of `llmslm fit`, beside the recipe's."""

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return "-".join(self.name.replace(",", "").split())

    @property
    def has_own_tokens(self) -> bool:
        """Whether the slm's tokenizer is not the llm's."""
        return OWN_TOKENS in self.arguments


def variants(pretrained: bool = False) -> Iterator[Variant]:
    """Name the slm in both tokenizers, then each fusion with each alignment that it uses.

    Args:
        pretrained: the llm is, so that the recipe's tokenizer is the slm's own. EncoderTokenizer is then left out: it
            reads the llm's embeddings, which a feature cache does not hold.
    """
    from llmslm.models import alignment, fusion

    yield Variant(SLM, SLM)
    alignments = [alignment.SameTokenizer, alignment.EncoderTokenizer, alignment.Offsets]
    if pretrained:
        alignments = [alignment.Offsets]
    else:
        yield Variant("slm in its own tokens", SLM, (OWN_TOKENS,))
    for way in (fusion.Replace, fusion.Add, fusion.GatedAdd, *_unaligned(fusion)):
        chosen = f"--model.fusion={way.__module__}.{way.__name__}"
        if way.prompt_layout is not None:
            yield Variant(way.__name__, LLM_TO_SLM, (chosen,))
            continue
        for each in alignments:
            two = (OWN_TOKENS,) if each is not alignment.SameTokenizer and not pretrained else ()
            aligned = f"--model.alignment={each.__module__}.{each.__name__}"
            yield Variant(f"{way.__name__}, {each.__name__}", LLM_TO_SLM, (chosen, aligned, *two))


def _unaligned(fusion: Any) -> tuple[Any, ...]:
    return fusion.Prefix, fusion.PrefixOnly, fusion.CrossAttend, fusion.ReplaceEncoder


def run(config: str, seeds: Sequence[int], limit: int, overrides: Sequence[str]) -> list[Path]:
    """Train what is missing and compare the systems of each seed.

    Args:
        config: recipe, by name or path.
        seeds: of the trainings; the llm is trained with the first alone.
        limit: test examples.
        overrides: further arguments of all trainings.

    Returns:
        The records.
    """
    from evaluation.compare import Settings, compare
    from evaluation.examples import load_examples

    runs = RUNS / find_recipe(config).stem
    load_source(config).prepare()
    source = llm_source(config)
    llm = Variant(LLM, LLM, (f"--trainer.max_steps={LLM_STEPS}",))
    if source is None:
        fit(config, llm, runs / LLM, seeds[0], overrides)
        encoder = [f"--model.encoder.source={runs / LLM / 'system'}"]
    else:
        encoder = read_prompts(config, source, runs, overrides)
    examples = load_examples(config, "test", limit, seed=12345)
    records: list[Path] = []
    share = _shared_encoder()
    for seed in seeds:
        arms = {llm: _arm(llm, runs / LLM)} if source is None else {}
        for variant in variants(source is not None):
            folder = runs / str(seed) / variant.folder
            fit(config, variant, folder, seed, (*encoder, *overrides))
            arms[variant] = share(_arm(variant, folder))
        for own in (False, True):  # each with the slm that writes in the same tokens, as the baseline
            chosen = [arm for variant, arm in arms.items() if variant.has_own_tokens is own]
            settings = Settings(out=runs / "records" / f"{seed}{'-own-tokens' if own else ''}", runs=0)
            records += compare([*chosen, *_controls(chosen)], examples, settings) if chosen else []
    return records


def llm_source(config: str) -> str | None:
    """Return where a recipe's llm comes from, None for one that the recipe trains."""
    source: str | None = read_recipe([config], [])["model"]["llm"].get("source")
    return source


def read_prompts(config: str, source: str, runs: Path, overrides: Sequence[str]) -> list[str]:
    """Write a pretrained llm's states of all prompts, and the llm as a folder, which loads faster than GGUF.

    Returns:
        The arguments of trainings from these states.
    """
    from llmslm import training
    from llmslm.callbacks.write_features import WriteFeatures, Written

    folder, features = runs / LLM, runs / "features"
    if not folder.is_dir():
        _save_plain(source, folder)
    encoder = [f"--model.encoder.source={folder}"]
    layout = "--model.fusion=llmslm.models.fusion.Prefix"  # any that joins two tokenizers: the states are the same
    try:
        training.run(
            ["fit", "--config", str(find_recipe(config)), *QUIET, *encoder, *overrides, layout],
            [WriteFeatures(features)],
        )
    except Written:
        return [*encoder, f"--model.encoder.features={features}"]
    raise AssertionError("WriteFeatures stops the run")


def _save_plain(source: str, folder: Path) -> None:
    """Save a pretrained llm and its tokenizer as transformers does, whatever it came as."""
    from llmslm.data.tokenizer import load_tokenizer
    from llmslm.models.language_model import ModelSource, load_language_model

    model = load_language_model(ModelSource(source=source), None, "model.llm", torch.bfloat16)
    model.hf_quantizer = None  # the weights are dequantised by now; transformers refuses to save them all the same
    model.config.__dict__.pop("quantization_config", None)
    aside = folder.with_name(f"{LLM}.part")
    model.save_pretrained(aside)
    load_tokenizer(source).save_pretrained(aside)
    aside.rename(folder)


def fit(config: str, variant: Variant, folder: Path, seed: int, overrides: Sequence[str]) -> None:
    """Train one system, unless its folder holds the result of the same arguments."""
    from llmslm import training

    arguments = [*("--config", str(find_recipe(config)), f"--seed_everything={seed}"), *QUIET]
    arguments += [f"--model.system={variant.system}", f"--trainer.default_root_dir={folder}"]
    arguments += [f"--save_system.recipe={variant.name}", *overrides, *variant.arguments]
    done = folder / TRAINED
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["arguments"] == arguments:
        return
    begin = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    training.run(["fit", *arguments])
    seconds = round(time.monotonic() - begin, 1)
    write_text(done, json.dumps({"arguments": arguments, "seconds": seconds}) + "\n")
    sys.stdout.write(f"{variant.name}, seed {seed}: {seconds} s\n")
    sys.stdout.flush()


def _arm(variant: Variant, folder: Path) -> Arm:
    from evaluation.arms import load_arm

    arm = load_arm(variant.system, str(folder), "cpu", "float32")
    arm.system.name = variant.system if variant.system != LLM_TO_SLM else variant.name
    return arm


def _shared_encoder() -> Callable[[Arm], Arm]:
    """Give all arms the encoder of the first, which reads each batch once: controls and seeds read the same ones."""
    shared: list[Encoder] = []
    known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def share(arm: Arm) -> Arm:
        model = cast(System, arm.system).model
        if isinstance(model, LlmToSlm) and model.encoder is not None:
            if not shared:
                shared.append(model.encoder)
                read = functools.partial(_read_once, known, model.encoder.forward)
                model.encoder.forward = read  # type: ignore[method-assign]
            model.encoder = shared[0]
        return arm

    return share


def _read_once(
    known: dict[bytes, tuple[Tensor, Tensor]], read: Callable[..., tuple[Tensor, Tensor]], ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    key = b"".join(tensor.numpy().tobytes() for tensor in (ids, *rest) if tensor is not None)
    if key not in known:
        known[key] = read(ids, *rest)
    return known[key]


def _controls(arms: Sequence[Arm]) -> Iterator[Arm]:
    """Give each system that reads the llm's states none, and those of another prompt."""
    for arm in arms:
        if arm.card["system"] == LLM_TO_SLM:
            for control in CONTROLS:
                yield replace(arm, system=arm.system.with_features(control), folder=None)  # type: ignore[attr-defined]


def table(rows: Sequence[Row]) -> str:
    """Write the rows, best first, each with its controls beside it."""
    shown = {_key(row): row for row in rows}
    names = [name for name, control in shown if not control]
    names.sort(key=lambda name: (name != LLM, shown[name, ""].scores["bits_per_byte"].value or 0))
    titles = [title for title, _ in SCORES.values()]
    columns = ["system", *titles, "p against slm", *(f"bits/byte, {control}" for control in CONTROLS), "trained"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *(_line(name, shown) for name in names)])


def _key(row: Row) -> tuple[str, str]:
    """Name the variant, and its control if the row is one."""
    return str(row.record["training"]["recipe"]), row.system.partition("/")[2].removesuffix("_features")


def _line(name: str, shown: Mapping[tuple[str, str], Row]) -> str:
    row = shown[name, ""]
    cells = [name]
    for key, (_, digits) in SCORES.items():
        cell = row.scores[key]
        spread = "" if cell.spread is None else f" ± {number(cell.spread, digits)}"
        cells.append(number(cell.value, digits) + spread)
    cells.append(number(row.scores["bits_per_byte"].slm_p_value, 3))
    for control in CONTROLS:
        twin = shown.get((name, control))
        cells.append(number(twin.scores["bits_per_byte"].value if twin else None, 3))
    cells.append(number(row.mean(lambda record: record["parameters"]["trained"]), 2, 1e-6, " M"))
    return "| " + " | ".join(cells) + " |"


def page(config: str, records: Sequence[Path], command: str) -> str:
    """Write docs/results' page from the records."""
    rows = leaderboard_rows(read_record(path) for path in records)
    record = next(row.record for row in rows if row.system == SLM)
    seeds = len(next(row for row in rows if row.system == SLM).records)
    origin = record["provenance"]
    changed = " with local changes" if origin["dirty"] else ""
    recipe, source = find_recipe(config), llm_source(config)
    question = recipe.read_text(encoding="utf-8").split("\n")[0].partition(": ")[2]
    llm = (
        f"trained before, for {LLM_STEPS} steps"
        if source is None
        else f"{source}, frozen, its states read from a cache"
    )
    head = f"""# Ablation: {recipe.stem}

{question[:1].upper()}{question[1:]}
Recipe [ablations/{recipe.name}](../../recipes/ablations/{recipe.name}), {seeds} seeds,
{record["training"]["steps"]} steps each, {record["examples"]["effective"]} test examples, {rows[0].hardware}.
The llm: {llm}.
Commit {origin["commit"]}{changed}, {origin["date"][:10]};
records in [{RECORDS / recipe.stem}](../../{RECORDS / recipe.stem}).

    {command}
"""
    legend = """
Best bits per byte first (lower is better; the one score that compares two vocabularies). Means over seeds, ± standard
deviation over them. p: the largest over seeds of no difference in bits per byte from the slm with the same tokens
(paired bootstrap). Controls: the same system with its features set to zero, or those of another prompt.
"""
    if source is None:
        legend += f"""EncoderTokenizer and Offsets have an slm with a vocabulary of its own, {OTHER_VOCABULARY} instead
of 2048 entries.
"""
    return "\n".join([head, table(rows), legend])


def publish(config: str, records: Sequence[Path], command: str) -> None:
    """Copy the records to where they are committed, and write the page from those."""
    name = find_recipe(config).stem
    shutil.rmtree(RECORDS / name, ignore_errors=True)
    for path in records:
        target = RECORDS / name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    PAGES.mkdir(parents=True, exist_ok=True)
    write_text(PAGES / f"{name}.md", page(config, find_records([RECORDS / name]), command))


def main(args: list[str] | None = None) -> None:
    """Run the ablation from the command line."""
    given = sys.argv[1:] if args is None else args
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=RECIPE, help=f"recipe (default: {RECIPE})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
    parser.add_argument("--limit", type=int, default=100, help="test examples (default: 100)")
    parser.add_argument("--publish", action="store_true", help=f"write into {RECORDS} and {PAGES}")
    options, overrides = parser.parse_known_args(given)
    records = run(options.config, options.seeds, options.limit, overrides)
    print(table(leaderboard_rows(read_record(path) for path in records)))
    if options.publish:
        publish(options.config, records, shlex.join(["python", "-m", "evaluation.ablation", *given]))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
