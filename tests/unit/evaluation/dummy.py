"""A system that runs the whole evaluation in milliseconds, without torch."""

import math
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Produced:
    text: str
    tokens: int


@dataclass(frozen=True)
class Scored:
    nats: float
    tokens: int


class DummySystem:
    """Copies the prompt's words and spoils a share of them; every word is a token."""

    def __init__(self, name="llm", quality=0.9, fails_after=None):
        self.name = name
        self.quality = quality
        self.fails_after = fails_after
        self.calls = 0

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        self.calls += 1
        if self.fails_after is not None and self.calls > self.fails_after:
            raise KeyboardInterrupt
        if on_first_token is not None:
            on_first_token()
        return [self._produce(prompt, max_new_tokens, min_new_tokens) for prompt in prompts]

    def log_likelihood(self, prompts, targets):
        return [Scored(-math.log(self.quality) * len(text.split()), len(text.split())) for text in targets]

    def parameters(self):
        return {"total": 10, "trained": 5, "decoding": 5}

    def with_features(self, control):
        return DummySystem(f"{self.name}/{control}_features", self.quality / 2)

    def _produce(self, prompt, most, least):
        words = [word if self._keeps(prompt, word) else "spoilt" for word in prompt.split()][:most]
        words += ["more"] * (least - len(words))
        return Produced(" ".join(words), len(words))

    def _keeps(self, prompt, word):
        return zlib.crc32(f"{prompt}{word}".encode()) % 1000 < 1000 * self.quality
