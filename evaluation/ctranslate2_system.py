"""Models converted to CTranslate2 (package ctranslate2) as systems: what a careful user of today would run on CPUs.

A converted model is a folder of `ct2-transformers-converter`. The tokenizer is that of the model it was made from.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmslm.data.codec import Codec, TextFormat
from llmslm.data.tokenizer import load_tokenizer
from llmslm.errors import UserError
from llmslm.system import Generation, TargetScore


class CTranslate2System:
    """A CTranslate2 model, greedy.

    Args:
        folder: the converted model.
        tokenizer: hub name or folder of the tokenizer.
        name: in records.
        text_format: how prompts are written and where they and targets end.
        device: cpu or cuda.
        compute_type: CTranslate2's; "default" keeps that of the conversion.
        threads: of one batch; 0 leaves it to CTranslate2.

    Raises:
        UserError: if the package is missing or the folder holds no converted model.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: str,
        name: str = "ctranslate2",
        text_format: TextFormat | None = None,
        device: str = "cpu",
        compute_type: str = "default",
        threads: int = 0,
    ) -> None:
        try:
            import ctranslate2
        except ImportError as error:
            raise UserError("CTranslate2 is not installed: pip install 'llmslm[ctranslate2]'") from error
        if not ctranslate2.contains_model(folder):
            raise UserError(f"{folder} holds no CTranslate2 model; expected a folder of ct2-transformers-converter")
        self.name = name
        self.card = {"source": folder}
        settings = {"device": device.split(":")[0], "compute_type": compute_type, "intra_threads": threads}
        decoder_only = any(Path(folder).glob("vocabulary.*"))  # an encoder-decoder's is shared_ or source_vocabulary
        self._model: Any = (ctranslate2.Generator if decoder_only else ctranslate2.Translator)(folder, **settings)
        self.dtype = str(self._model.compute_type)
        words = load_tokenizer(tokenizer)
        start = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("decoder_start_token")
        self.codec = Codec(
            words,
            text_format=text_format or TextFormat(),
            is_encoder_decoder=not decoder_only,
            decoder_start_token_id=words.convert_tokens_to_ids(start) if start else None,
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        on_first_token: Callable[[], None] | None = None,
    ) -> list[Generation]:
        """Generate from one batch, all rows at once."""
        waiting = [on_first_token] if on_first_token is not None else []

        def on_token(_step: Any) -> bool:
            while waiting:
                waiting.pop()()
            return False  # goes on

        rows = self._tokens(row["input_prompt_ids"] for row in self.codec.encode(prompts))
        common = {"max_batch_size": 0, "beam_size": 1, "return_end_token": True, "callback": on_token}
        if self.codec.is_encoder_decoder:
            lengths = {"max_decoding_length": max_new_tokens, "min_decoding_length": min_new_tokens}
            results = self._model.translate_batch(rows, max_input_length=0, **lengths, **common)
            produced = [result.hypotheses[0] for result in results]
        else:
            lengths = {"max_length": max_new_tokens, "min_length": min_new_tokens}
            results = self._model.generate_batch(rows, include_prompt_in_result=False, **lengths, **common)
            produced = [result.sequences[0] for result in results]
        texts = self.codec.decode([self.codec.slm_tokenizer.convert_tokens_to_ids(tokens) for tokens in produced])
        return [Generation(text, len(tokens)) for text, tokens in zip(texts, produced, strict=True)]

    def log_likelihood(self, prompts: Sequence[str], targets: Sequence[str]) -> list[TargetScore]:
        """Score one batch of targets given their prompts, end of sequence included where they are not cut."""
        encoded = self.codec.encode(prompts, targets)
        rows = self._tokens(row["input_prompt_ids"] for row in encoded)
        gold = self._tokens(row["target_ids"] for row in encoded)
        if self.codec.is_encoder_decoder:  # CTranslate2 adds the end of sequence itself, also to what was cut
            end = self.codec.slm_tokenizer.eos_token
            results = self._model.score_batch(
                rows, [tokens[:-1] if tokens[-1] == end else tokens for tokens in gold], max_input_length=0
            )
            logs = [result.log_probs[: len(tokens)] for result, tokens in zip(results, gold, strict=True)]
        else:
            results = self._model.score_batch([row + tokens for row, tokens in zip(rows, gold, strict=True)])
            logs = [result.log_probs[-len(tokens) :] for result, tokens in zip(results, gold, strict=True)]
        return [TargetScore(-sum(row), len(row)) for row in logs]

    def parameters(self) -> dict[str, int]:
        """Return nothing: CTranslate2 does not tell."""
        return {}

    def _tokens(self, rows: Iterable[list[int]]) -> list[list[str]]:
        return [self.codec.slm_tokenizer.convert_ids_to_tokens(row) for row in rows]
