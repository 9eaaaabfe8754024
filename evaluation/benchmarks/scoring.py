"""How long scoring takes: BLEU, chrF, ROUGE, 1,000 bootstrap draws and the paired test, on 10,000 predictions.

    python -m evaluation.benchmarks.scoring --out evaluation/records/scoring.json

The texts are runs of 10 to 40 words of this project's installed sources, of which a third is replaced. The last line is
one JSON object.
"""

import argparse
import inspect
import random
import time
import typing
from pathlib import Path
from types import ModuleType

from evaluation.benchmarks.report import report
from evaluation.bootstrap import RESAMPLES, SEED
from evaluation.scoring import as_record, score, statistics_of

METRICS = ("bleu", "chrf", "rouge")


def make_texts(modules: list[ModuleType], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Make references of real words and predictions that share two thirds of them."""
    rng = random.Random(seed)
    words = " ".join(inspect.getsource(module) for module in modules).split()
    references, predictions = [], []
    for _ in range(count):
        start = rng.randrange(len(words) - 40)
        chosen = words[start : start + rng.randint(10, 40)]
        references.append(" ".join(chosen))
        predictions.append(" ".join(rng.choice(words) if rng.random() < 1 / 3 else word for word in chosen))
    return references, predictions


def main() -> None:
    """Measure, print and, where asked, write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the record")
    out, count = parser.parse_args().out, 10_000
    references, predictions = make_texts([argparse, typing, inspect], count, seed=0)
    columns = {"prediction": predictions}
    llm = score(statistics_of(METRICS, references, {"prediction": predictions[1:] + predictions[:1]}))
    start = time.perf_counter()
    statistics = statistics_of(METRICS, references, columns)
    counted = time.perf_counter()
    as_record(score(statistics), {"llm": llm}, RESAMPLES, SEED)
    end = time.perf_counter()
    print(f"counting {counted - start:.1f} s, bootstrap and paired tests {end - counted:.1f} s")
    record = {"predictions": count, "seconds": end - start}
    report(record, out)


if __name__ == "__main__":
    main()
