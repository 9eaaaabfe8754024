"""Fusions: the rule by which projected states enter the slm."""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.alignment import Alignment, PromptLayout
from llmslm.models.attention import CrossAttention
from llmslm.models.components import Component
from llmslm.models.encoder import layer_list
from llmslm.models.packing import document_mask
from llmslm.models.prompt import AlignedPrompt, ProjectedPrompt, SlmPrompt


class Fusion(Component):
    """Turns the slm's own view of a batch and the projected prompt into what the slm reads.

    `prompt_layout` says what the codec writes on the slm's prompt positions; None leaves it to the alignment, which
    the other fusions do not use.
    """

    prompt_layout: ClassVar[PromptLayout | None] = None

    def forward(self, own: SlmPrompt, projected: ProjectedPrompt, alignment: Alignment) -> SlmPrompt:
        """Return what the slm reads; its positions end with those of `own`, unless it is encoded."""
        raise NotImplementedError

    def can_pack(self, slm: PreTrainedModel) -> bool:
        """Say whether several examples may share a row: their states are then kept apart."""
        return False

    def attach(self, slm: PreTrainedModel) -> None:
        """Fit the slm, when the composition is built; called again where it is built anew from its config."""

    def step_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are read for each generated token; none where the fusion ends with the prompt."""
        return []

    @torch.no_grad()
    def reference(self, slm: PreTrainedModel, limit: int = 4096) -> Tensor:
        """Return a sample (any, slm_hidden_size) of what the slm reads where projected states will stand.

        Projected states start at its scale. Embeddings go through their module, since some models scale inside it.
        """
        table = slm.get_input_embeddings()
        embeds: Tensor = table(torch.arange(min(limit, table.num_embeddings), device=table.weight.device))
        return embeds


class AlignedFusion(Fusion):
    """A fusion that changes the slm's embeddings on the prompt positions and leaves all others."""

    def forward(self, own: SlmPrompt, projected: ProjectedPrompt, alignment: Alignment) -> SlmPrompt:
        """Align, then fuse position by position."""
        aligned = alignment(own.inputs_embeds, own.attention_mask, projected)
        return own._replace(inputs_embeds=self.fuse(aligned))

    def can_pack(self, slm: PreTrainedModel) -> bool:
        """States go to the tokens of their own prompt, in packed rows too."""
        return True

    def fuse(self, aligned: AlignedPrompt) -> Tensor:
        """Return (batch, input_len, slm_hidden_size); positions outside the prompt pass unchanged."""
        raise NotImplementedError


class Add(AlignedFusion):
    """The slm's own prompt embedding plus the projected state: the paper's better rule."""

    def fuse(self, aligned: AlignedPrompt) -> Tensor:
        """Add on prompt positions (the placed states are zero elsewhere)."""
        return aligned.inputs_embeds + aligned.prompt_embeds.to(aligned.inputs_embeds.dtype)


class Replace(AlignedFusion):
    """The projected state in place of the slm's own prompt embedding."""

    def fuse(self, aligned: AlignedPrompt) -> Tensor:
        """Replace on prompt positions."""
        states = aligned.prompt_embeds.to(aligned.inputs_embeds.dtype)
        return torch.where(aligned.on_prompt, states, aligned.inputs_embeds)


class GatedAdd(AlignedFusion):
    """Add through tanh of a gate per channel that starts at zero: a pretrained slm starts as itself, bit for bit.

    The gate is that of Flamingo (arXiv 2204.14198, section 2.2).
    """

    def __init__(self, encoder_hidden_size: int, slm_hidden_size: int) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size)
        self.gate = nn.Parameter(torch.zeros(slm_hidden_size))

    def fuse(self, aligned: AlignedPrompt) -> Tensor:
        """Add the gated states on prompt positions."""
        gated = self.gate.tanh() * aligned.prompt_embeds
        return aligned.inputs_embeds + gated.to(aligned.inputs_embeds.dtype)

    def metrics(self) -> dict[str, Tensor]:
        """Return how far the gate is open."""
        return {"fusion/gate": self.gate.detach().tanh().abs().mean()}


class Prefix(Fusion):
    """Projected states in front of the slm's own prompt, which it reads in its own tokens: no alignment is needed."""

    prompt_layout: ClassVar[PromptLayout | None] = "own"

    def forward(self, own: SlmPrompt, projected: ProjectedPrompt, alignment: Alignment) -> SlmPrompt:
        """Put the states in front, left-padded: the last of them stands right before the slm's first token."""
        order = projected.mask.argsort(dim=1, stable=True)
        index = order.unsqueeze(-1).expand_as(projected.prompt_embeds)
        states = projected.prompt_embeds.gather(1, index).to(own.inputs_embeds.dtype)
        mask = projected.mask.gather(1, order).to(own.attention_mask.dtype)
        embeds = torch.cat([states, own.inputs_embeds], dim=1)
        return SlmPrompt(embeds, torch.cat([mask, own.attention_mask], dim=1))


class PrefixOnly(Prefix):
    """Projected states and a start token: the slm never embeds the prompt. With a resampler the shortest prefill."""

    prompt_layout: ClassVar[PromptLayout | None] = "start"


class ReplaceEncoder(Fusion):
    """The decoder of an encoder-decoder slm reads the projected states; its own encoder is not run, nor kept."""

    prompt_layout: ClassVar[PromptLayout | None] = "states"

    def can_pack(self, slm: PreTrainedModel) -> bool:
        """The decoder attends to the states of its own example (see `llmslm.models.packing`)."""
        return True

    def forward(self, own: SlmPrompt, projected: ProjectedPrompt, alignment: Alignment) -> SlmPrompt:
        """Hand the states on as if the slm's encoder had made them."""
        return SlmPrompt(projected.prompt_embeds.to(own.inputs_embeds.dtype), projected.mask, is_encoded=True)

    def attach(self, slm: PreTrainedModel) -> None:
        """Remove the layers of the slm's encoder and freeze what is left of it alone."""
        if not slm.config.is_encoder_decoder:
            raise UserError(
                f"fusion ReplaceEncoder needs an encoder-decoder slm, {slm.config.model_type!r} has no encoder; "
                "set model.fusion to llmslm.models.fusion.PrefixOnly, or change model.slm"
            )
        encoder = slm.get_encoder()
        del layer_list(encoder)[:]
        shared = {id(parameter) for parameter in slm.get_decoder().parameters()}
        for parameter in encoder.parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)

    @torch.no_grad()
    def reference(self, slm: PreTrainedModel, limit: int = 256) -> Tensor:
        """Return what the slm's own encoder makes of the first ids of its vocabulary."""
        encoder = slm.get_encoder()
        was_training = encoder.training
        ids = torch.arange(min(limit, slm.config.vocab_size), device=slm.device)
        states: Tensor = encoder.eval()(input_ids=ids[None, : 4 * (len(ids) // 4)].reshape(4, -1)).last_hidden_state
        encoder.train(was_training)
        return states.flatten(0, 1)


class ReadLayer(CrossAttention):
    """A new layer of `CrossAttend`, with what it has read: in the layer itself, so that all share one compilation."""

    held: tuple[Tensor, Tensor, Tensor] | None = None

    def read(self, states: Tensor, mask: Tensor) -> None:
        """Make keys and values of states (batch, states, width), for queries that may see them by mask."""
        self.held = (*self.keys_values(states), mask)

    def attend(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer of the slm: add to what it is given what this layer finds in the states."""
        if self.held is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        # Beam search and several samples a prompt repeat each row in place.
        prompts = len(self.held[-1])
        copies, rest = divmod(len(states), prompts)
        if rest or not copies:
            raise ValueError(f"the slm was called with {len(states)} rows after {prompts} prompts")
        keys, values, mask = self.held if copies == 1 else (x.repeat_interleave(copies, 0) for x in self.held)
        states = states + self(states, keys, values, mask)
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the batch that was read last: copies start without one."""
        return super().__getstate__() | {"held": None}


class CrossAttend(Fusion):
    """The slm's decoder layers attend to the projected states through new layers, whose output starts at zero.

    A new layer stands before each `every`-th layer of the slm, as in Flamingo (arXiv 2204.14198, section 2.2), here
    without its feed-forward part and its gates: a scalar that scales a whole layer has a gradient that takes up most of
    the clipped norm, and stayed around zero (docs/results/log.md). The slm reads its prompt in its own tokens and
    starts as itself, bit for bit. Keys and values of a batch of prompts are made once and used by all later calls of
    the slm, until the next batch.

    Args:
        encoder_hidden_size: width of the encoder's states.
        slm_hidden_size: width of the slm's states.
        every: distance of the new layers; 1 puts one before each layer.
    """

    prompt_layout: ClassVar[PromptLayout | None] = "own"

    def __init__(self, encoder_hidden_size: int, slm_hidden_size: int, every: int = 1) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size)
        if every < 1:
            raise UserError(f"CrossAttend got every={every}; expected 1 or more (model.fusion)")
        self.every = every
        self.layers = nn.ModuleList()
        self._handles: list[RemovableHandle] = []

    def attach(self, slm: PreTrainedModel) -> None:
        """Put the new layers in front of the slm's; they are made for its depth at the first call."""
        while self._handles:
            self._handles.pop().remove()
        places = list(layer_list(slm.get_decoder()))[:: self.every]
        if len(self.layers) != len(places):
            width, like = self.slm_hidden_size, slm.get_input_embeddings().weight
            self.layers = nn.ModuleList(ReadLayer(width, width) for _ in places).to(like.device, like.dtype)
            for layer in self._read_layers:
                nn.init.zeros_(layer.out.weight)
        for layer, place in zip(self._read_layers, places, strict=True):
            self._handles.append(place.register_forward_pre_hook(layer.attend, with_kwargs=True))

    def forward(self, own: SlmPrompt, projected: ProjectedPrompt, alignment: Alignment) -> SlmPrompt:
        """Read the states for the calls of the slm that follow."""
        if projected.documents is None or own.documents is None:
            mask = projected.mask.bool()[:, None, None, :]
        else:
            mask = document_mask(own.documents, projected.documents)
        states = projected.prompt_embeds.to(own.inputs_embeds.dtype)
        for layer in self._read_layers:
            layer.read(states, mask)
        return own

    def can_pack(self, slm: PreTrainedModel) -> bool:
        """Each token attends to the states of its own example; an encoder-decoder's targets are not told apart here."""
        return not slm.config.is_encoder_decoder

    def step_parameters(self) -> list[nn.Parameter]:
        """Return all but the maps to keys and values, which are applied once a prompt."""
        return [parameter for name, parameter in self.named_parameters() if "key_value" not in name]

    def reference(self, slm: PreTrainedModel, limit: int = 1) -> Tensor:
        """Return ones: keys and values are made of states of size 1."""
        return torch.ones(1, self.slm_hidden_size)

    def metrics(self) -> dict[str, Tensor]:
        """Return how far each layer's output map has come from zero: the root of its mean square."""
        return {
            f"fusion/out_{i * self.every}": layer.out.weight.detach().square().mean().sqrt()
            for i, layer in enumerate(self._read_layers)
        }

    @property
    def _read_layers(self) -> list[ReadLayer]:
        return cast(list[ReadLayer], list(self.layers))
