"""The systems as models of EleutherAI's lm-evaluation-harness (package lm-eval).

    python -m evaluation.harness --model llmslm --model_args folder=runs/quickstart/llm_to_slm --tasks TASK

The systems are trained to end their targets, so the likelihood of a continuation includes that of its end. The models
of the harness leave it out: compare systems of this project with each other, by this adapter.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if __name__ == "__main__" and (error.name or "").partition(".")[0] == "lm_eval":
        sys.exit("evaluation.harness: the package lm-eval is not installed; pip install 'llmslm[harness]'")
    raise
from tqdm import tqdm

from evaluation.systems import EvaluatedSystem, TargetScore
from llmslm.errors import UserError


@register_model("llmslm")
class HarnessModel(LM):
    """A llm, slm or llm_to_slm system behind the harness's interface.

    Args:
        folder: run folder of a system, or the system folder in it.
        system: a loaded system, where there is no folder.
        batch_size: requests in a batch.
        device: torch device for a folder; the CPU where there is no GPU.
        max_new_tokens: token budget where a task names none.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        system: EvaluatedSystem | None = None,
        batch_size: int | str = 16,
        device: str = "cpu",
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__()
        if folder is not None:
            system = _load(folder, device)
        if system is None:
            raise UserError("no system was given; expected its folder (--model_args folder=DIR)")
        self.system = system
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch size {batch_size!r} was given; expected a number of at least 1 (--batch_size)")
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score continuations, their end included; greedy is one that the system itself would generate."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        return self._in_batches("score", pairs, self._score_batch)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Score whole texts after an empty prompt.

        Raises:
            UserError: if the system takes no empty prompt, or a text is longer than it can score.
        """
        pairs = [("", str(request.args[0])) for request in requests]
        return [nats for nats, _ in self._in_batches("score", pairs, self._score_batch)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate greedily and cut at the first of the task's stop strings."""
        return self._in_batches("generate", [request.args for request in requests], self._generate_batch)

    def _in_batches(self, what: str, items: Sequence[Any], work: Callable[[Sequence[Any]], Iterable[Any]]) -> list[Any]:
        results: list[Any] = []
        for start in tqdm(range(0, len(items), self.batch_size), desc=what, unit="batch", delay=1):
            results += work(items[start : start + self.batch_size])
        return results

    def _score_batch(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        prompts, targets = ([pair[side] for pair in pairs] for side in (0, 1))
        scores = self.system.log_likelihood(prompts, targets)
        self._check_whole(scores)
        budget = max(score.tokens for score in scores)
        generations = self.system.generate(prompts, max_new_tokens=budget)
        return [
            (-score.nats, generation.text.strip() == target.strip())
            for score, generation, target in zip(scores, generations, targets, strict=True)
        ]

    def _check_whole(self, scores: Sequence[TargetScore]) -> None:
        codec = getattr(self.system, "codec", None)
        limit = None if codec is None else codec.text_format.max_target_tokens
        if limit is not None and any(score.tokens >= limit for score in scores):
            raise UserError(
                f"a text has {limit} tokens or more, which is where {self.system.name} cuts targets; "
                "choose a task with shorter ones, or train with a larger data.max_target_tokens"
            )

    def _generate_batch(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        budgets = [int(settings.get("max_gen_toks", self.max_new_tokens)) for _, settings in arguments]
        texts: dict[int, str] = {}
        for budget in sorted(set(budgets)):  # what else is in the batch gives no request more than it asked for
            chosen = [index for index, each in enumerate(budgets) if each == budget]
            prompts = [arguments[index][0] for index in chosen]
            made = self.system.generate(prompts, max_new_tokens=budget)
            texts |= {index: each.text for index, each in zip(chosen, made, strict=True)}
        return [cut(texts[index], settings.get("until", [])) for index, (_, settings) in enumerate(arguments)]


def cut(text: str, until: str | Sequence[str]) -> str:
    """Cut a text before the first of some strings."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def main() -> None:
    """Run the harness's own command line with the model "llmslm" known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _load(folder: str, device: str) -> EvaluatedSystem:
    import torch

    from llmslm.system import System

    # the harness's command line asks for a GPU by default, whether there is one or not
    return System.load(folder, device=device if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
