"""The LLM's choice of tokens in verified decoding: its rules over blocks of logits, for its draft as for itself."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmslm.generation.acceptance import Verdict, drawn, judge_greedy, judge_sampled
from llmslm.generation.sampling import Sampling, TokenRules, cut, start_token


class Choice:
    """What the LLM's generation_config and the caller ask for.

    Args:
        llm: whose output is wanted.
        batch: rows.
        min_new: number of tokens before which no row ends.
        max_new: number of tokens after which a row ends in any case.
        sampling: how tokens are drawn, but for its seed; the most probable ones are taken if not given.
    """

    def __init__(
        self, llm: PreTrainedModel, batch: int, *, min_new: int, max_new: int, sampling: Sampling | None
    ) -> None:
        device = llm.device
        self.vocabulary = int(llm.get_output_embeddings().weight.shape[0])
        self.start_token = (start_token(llm) or 0) if llm.config.is_encoder_decoder else None
        self.rules = TokenRules(
            llm.generation_config,
            vocabulary=self.vocabulary,
            encoder_decoder=self.start_token is not None,
            device=device,
        )
        self.min_new, self.max_new, self.sampling = min_new, max_new, sampling
        self.mode = self.rules.mode(sampling)
        self.generator = torch.Generator(device=device)
        self.penalty = self.rules.repetition_penalty if sampling is None else sampling.repetition_penalty
        self.seen: Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(batch, self.vocabulary, device=device, dtype=torch.bool)
        forced = ((self.rules.forced_bos, 0), (self.rules.forced_eos, max_new - 1))
        tokens = torch.arange(self.vocabulary, device=device)
        self._forced = [((tokens == token).float().log(), at) for token, at in forced if token is not None]

    def start(self, prompt_ids: Tensor, mask: Tensor, seed: int) -> None:
        """Forget the last call.

        Args:
            prompt_ids: (batch, prompt_len), as the LLM reads them; for a repetition penalty.
            mask: (batch, prompt_len), 1 = a real token.
            seed: of what is drawn.
        """
        self.generator.manual_seed(seed)
        if self.seen is not None:
            if self.start_token is not None:
                prompt_ids, mask = torch.full_like(prompt_ids[:, :1], self.start_token), torch.ones_like(mask[:, :1])
            self.seen.copy_(_marked(prompt_ids, mask, self.vocabulary))

    def propose(self, logits: Tensor, step: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the draft's next tokens (batch,) from its logits (batch, vocabulary), and the odds they had.

        Args:
            logits: of the draft's model.
            step: (batch,) tokens before the one that is chosen.
            drafted: (batch, n) tokens of this block so far.
        """
        logits = logits[:, None, : self.vocabulary]
        logits = F.pad(logits, (0, self.vocabulary - logits.shape[2]), value=float("-inf"))
        seen = self._seen_along(drafted)
        scores = self._scores(logits, step[:, None], None if seen is None else seen[:, -1:])
        if self.mode != "sampled":
            return scores[:, 0].argmax(dim=-1), None
        odds = self._probabilities(scores)
        return drawn(odds[:, 0], self.generator), odds

    def judge(self, logits: Tensor, step: Tensor, drafted: Tensor, odds: Tensor | None) -> Verdict:
        """Hold a block against the LLM's logits (batch, block + 1, vocabulary).

        Args:
            logits: of the places of the block and the one after it.
            step: (batch, block + 1) tokens before each of these places.
            drafted: (batch, block) tokens.
            odds: (batch, block, vocabulary) probabilities that they were drawn from; None if they were not drawn.
        """
        scores = self._scores(logits, step, self._seen_along(drafted))
        if self.mode != "sampled":
            return judge_greedy(scores.argmax(dim=-1), drafted)
        target = self._probabilities(scores)
        odds = target[:, :0] if odds is None else odds
        return judge_sampled(target, odds, drafted, self.generator)

    def note(self, tokens: Tensor, kept: Tensor) -> None:
        """Remember tokens (batch, n) as seen where `kept`."""
        if self.seen is not None:
            self.seen |= _marked(tokens, kept, self.vocabulary)

    def _scores(self, logits: Tensor, step: Tensor, seen: Tensor | None) -> Tensor:
        if self.mode == "plain" and self.min_new == 0:
            return logits
        rows = step.flatten()
        seen = None if seen is None else seen.flatten(0, 1)
        flat = logits.flatten(0, 1).float()
        scores = self.rules.processed(flat, rows, self.min_new, seen=seen, penalty=self.penalty)
        for only, at in self._forced:
            scores = torch.where((rows == at)[:, None], only, scores)
        return scores.view(logits.shape)

    def _probabilities(self, scores: Tensor) -> Tensor:
        sampling = self.sampling
        assert sampling is not None
        mass, order = cut(scores, sampling.temperature, sampling.top_k or self.vocabulary, sampling.top_p)
        return torch.zeros_like(mass).scatter(-1, order, mass / mass.sum(dim=-1, keepdim=True))

    def _seen_along(self, drafted: Tensor) -> Tensor | None:
        """(batch, n + 1, vocabulary): what has been seen before each place of a block of n tokens and after it."""
        if self.seen is None:
            return None
        before = [self.seen]
        for token in drafted.unbind(dim=1):
            before.append(before[-1].scatter(1, token[:, None], True))
        return torch.stack(before, dim=1)


def _marked(tokens: Tensor, kept: Tensor, vocabulary: int) -> Tensor:
    """(batch, vocabulary): which tokens (batch, n) occur where `kept`."""
    counts = torch.zeros(len(tokens), vocabulary, device=tokens.device, dtype=torch.long)
    return counts.scatter_add(1, tokens, kept.long()) > 0
