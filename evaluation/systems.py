"""What the evaluation needs of a system: a small protocol, met by `llmslm.system.System` and by yours; its arms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from llmslm.system import System

LLM = "llm"
SLM = "slm"
LLM_TO_SLM = "llm_to_slm"
CONTROLS = ("zero", "shuffled")


class Generation(Protocol):
    """One prediction."""

    @property
    def text(self) -> str:
        """The generated text, special tokens left out."""

    @property
    def tokens(self) -> int:
        """Tokens produced, end of sequence included."""


class TargetScore(Protocol):
    """How likely a target is."""

    @property
    def nats(self) -> float:
        """-log p(target | prompt), summed over its tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of the target, end of sequence included."""


class EvaluatedSystem(Protocol):
    """Anything that can be evaluated.

    A system on an accelerator also has `device` (a torch device), so that the clock waits for it, and `model`
    (a torch module), so that its weights are counted in its memory. One with a `dtype` (such as "float32") is compared
    in speed with the llm where that has the same. One with a `draft` (another system) reads the weights of that, too.
    One whose `card` names a folder as `source`, or a `revision`, is
    known again by a later call, which goes on where this one was killed.
    """

    name: str

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        on_first_token: Callable[[], None] | None = None,
    ) -> Sequence[Generation]:
        """Generate from one batch; call `on_first_token` once, when the batch's first new token is known.

        That is on the host: the clock is read then, and does not wait for a device that is still to compute it.
        """

    def log_likelihood(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Score one batch of targets given their prompts."""

    def parameters(self) -> dict[str, int]:
        """Count parameters: `total`, `trained`, and `decoding`, those read for each generated token."""


@runtime_checkable
class ControllableSystem(Protocol):
    """A system that uses an encoder, whose message can be destroyed to show that it is used."""

    def with_features(self, control: str) -> EvaluatedSystem:
        """Return a twin whose features are "zero" or "shuffled" (those of another prompt)."""


@dataclass(frozen=True)
class Arm:
    """A system in a comparison."""

    system: EvaluatedSystem
    checkpoint: str | None = None
    """Content hash of what it was loaded from; without one, earlier predictions are not taken over."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What is known of its training."""
    device: str = "cpu"
    """Its kind: cpu or cuda."""
    dtype: str | None = None
    target_limit: int | None = None
    """Tokens from which a reference is cut before it is scored."""
    folder: str | None = None
    """Where it was loaded from."""

    @property
    def is_control(self) -> bool:
        """Whether it is another system without its message; it costs what that one costs."""
        return "/" in self.system.name


def control_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Return llm_to_slm without its message and with that of another prompt."""
    return [
        replace(arm, system=arm.system.with_features(control), folder=None)
        for arm in arms
        if arm.system.name == LLM_TO_SLM and isinstance(arm.system, ControllableSystem)
        for control in CONTROLS
    ]


def decoded_by_engine(system: EvaluatedSystem) -> "System | None":
    """Return a system that the decode engine decodes token by token; None of any other."""
    from llmslm.system import System
    from llmslm.verified_system import VerifiedSystem

    if not isinstance(system, System) or isinstance(system, VerifiedSystem) or system.decoder != "engine":
        return None
    engine = system.engine
    return system if engine.decoder is not None and engine.reason_for_generate(1) is None else None


def decoder_of(system: EvaluatedSystem) -> str | None:
    """Say what decodes: "engine", "verified", "generate" (transformers'); None of a system that says nothing."""
    if hasattr(system, "verified_engine"):
        return "verified"
    said: str | None = getattr(system, "decoder", None)
    return "generate" if said == "engine" and decoded_by_engine(system) is None else said


def file_stem(task: str, system: str) -> str:
    """Name the files of one task and system; a control's slash does not make a folder."""
    return f"{task}.{system}".replace("/", "-")
