"""LlmToSlm: what the composition of a frozen encoder, a projector, a fusion and a small language model computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from llmslm.errors import UserError
from llmslm.models.composition import Composition
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.packing import additive_mask, causal_inputs, document_mask
from llmslm.models.prompt import ProjectedPrompt, SlmPrompt
from llmslm.models.sides import complete_sides, pad_id


class LlmToSlm(Composition):
    """A small language model that is conditioned on a large one's reading of the prompt (arXiv 2402.16844).

    Its parts, and how it is saved and loaded: `Composition`.
    """

    def encode(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the frozen encoder: hidden_states (batch, prompt_len, encoder_hidden_size) and their mask."""
        if self.encoder is None:
            raise UserError("this composition has no encoder: load it with from_pretrained, or call attach_encoder")
        hidden_states, mask = self.encoder(prompt_ids, prompt_attention_mask, documents)
        return hidden_states, mask

    def embed_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_ids: Tensor | None,
        prompt_attention_mask: Tensor,
        hidden_states: Tensor | None = None,
        prompt_spans: Tensor | None = None,
        prompt_documents: Tensor | None = None,
        documents: Tensor | None = None,
        projector: Callable[..., Tensor] | None = None,
    ) -> SlmPrompt:
        """Encode, project and fuse.

        Args:
            input_ids: (batch, input_len), the slm's side.
            attention_mask: (batch, input_len), 1 = attend.
            prompt_ids: (batch, prompt_len), the encoder's side; may be None where hidden_states are given.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            hidden_states: (batch, prompt_len, encoder_hidden_size), right-padded encoder states made before; those of
                several layers side by side where the encoder's layer is a list.
            prompt_spans: (batch, input_prompt_len, 2), only with the "offsets" layout; see `ProjectedPrompt`.
            prompt_documents: (batch, prompt_len), the example of each of prompt_ids, in packed rows.
            documents: (batch, input_len), that of each of input_ids.
            projector: called in place of the model's own, where something else computes the same.
        """
        token_embeds = None
        if self.alignment.needs_token_embeds:
            if self.encoder is None or prompt_ids is None:
                raise UserError("the EncoderTokenizer alignment reads the encoder's embeddings: attach the encoder")
            token_embeds = self.encoder.embed_tokens(prompt_ids, prompt_attention_mask, prompt_documents)
            token_embeds = token_embeds.to(self.slm.dtype)
        if hidden_states is None:
            if prompt_ids is None:
                raise UserError("give prompt_ids, or hidden_states that were encoded before")
            hidden_states, prompt_attention_mask = self.encode(prompt_ids, prompt_attention_mask, prompt_documents)
        hidden_states = hidden_states.to(self.slm.dtype)
        if self.layer_mix is not None:
            hidden_states = self.layer_mix(hidden_states)
        projector = self.projector if projector is None else projector
        prompt_embeds = projector(hidden_states, prompt_attention_mask, prompt_documents)
        mask = self.projector.states_mask(prompt_attention_mask)
        projected = ProjectedPrompt(prompt_embeds, mask, token_embeds, prompt_spans, prompt_documents)
        own = SlmPrompt(self.get_input_embeddings()(input_ids), attention_mask, documents=documents)
        fused: SlmPrompt = self.fusion(own, projected, self.alignment)
        return fused

    def slm_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_ids: Tensor | None,
        prompt_attention_mask: Tensor,
        hidden_states: Tensor | None = None,
        prompt_spans: Tensor | None = None,
        prompt_documents: Tensor | None = None,
        projector: Any = None,
    ) -> dict[str, Any]:
        """Return what the bare slm takes for its prefill: inputs_embeds or encoder_outputs, and attention_mask.

        Arguments as in `embed_prompt`. Where prompt_documents are given, an encoder-decoder's own side is right-padded
        too, and no operation waits for a value.
        """
        sides = (input_ids, attention_mask, prompt_ids, prompt_attention_mask)
        prompt = self.embed_prompt(*sides, hidden_states, prompt_spans, prompt_documents, projector=projector)
        embeds, mask = prompt.inputs_embeds, prompt.attention_mask
        if not self.config.is_encoder_decoder:
            return {"inputs_embeds": embeds, "attention_mask": mask}
        if not prompt.is_encoded:
            # Without gaps and from position 0, as an encoder with any kind of positions was trained to read.
            if prompt_documents is None or mask is not attention_mask:  # else it is so already
                order = mask.argsort(dim=1, descending=True, stable=True)
                embeds, mask = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds)), mask.gather(1, order)
            seen = mask
            if prompt_documents is not None:
                documents = mask - 1
                seen = additive_mask(document_mask(documents, documents), embeds.dtype)
            embeds = self.slm.get_encoder()(inputs_embeds=embeds, attention_mask=seen).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=embeds), "attention_mask": mask}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        prompt_spans: Tensor | None = None,
        prompt_documents: Tensor | None = None,
        documents: Tensor | None = None,
        document_starts: Tensor | None = None,
        on_prompt: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the slm on a prompt that the encoder has read.

        Args:
            input_ids: (batch, input_len): prompt and target of a decoder-only slm, the prompt of an encoder-decoder.
            attention_mask: (batch, input_len), 1 = attend; padding on either side.
            prompt_ids: (batch, prompt_len), the prompt in the encoder's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token; all ones where None.
            hidden_states: (batch, prompt_len, encoder_hidden_size), encoder states made before, right-padded.
            prompt_spans: (batch, input_prompt_len, 2), where the codec makes them; see `ProjectedPrompt`.
            prompt_documents: (batch, prompt_len), the example of each of prompt_ids in packed rows, -1 = padding. A
                decoder-only slm keeps these apart by position_ids that start again, an encoder-decoder by the masks of
                `llmslm.models.packing`.
            documents: (batch, input_len), the example of each of input_ids in packed rows, -1 = padding; that of each
                state (batch, prompt_len) where a decoder reads nothing else.
            document_starts: (examples + 1,), where each example of a decoder-only slm's packed rows begins among all
                positions of the batch, and their end; see `llmslm.models.document_attention.attend`.
            on_prompt: (batch, input_len), 1 on the prompts of a decoder-only slm's packed rows.
            inputs_embeds: (batch, input_len, slm_hidden_size), handed to the slm as they are.
            prompt_inputs_embeds: (batch, k, slm_hidden_size), what the first k positions read (made by `generate`).
            labels: -100 = ignored; (batch, input_len) for decoder-only, (batch, target_len) for encoder-decoder slms.
            position_ids: (batch, input_len); counted from the attention mask where None.
            past_key_values: the slm's cache.
            encoder_outputs: of the slm's own encoder, where it is an encoder-decoder and its encoder has run.
            kwargs: anything else that the slm's forward takes.

        Returns:
            The slm's own output: loss (if labels were given), logits (batch, input_len, vocabulary), past_key_values.
        """
        added = 0
        prompt_attention_mask = _prompt_mask(prompt_attention_mask, prompt_ids, hidden_states)
        if encoder_outputs is not None:
            kwargs["encoder_outputs"] = encoder_outputs
        elif inputs_embeds is None and input_ids is not None:
            if prompt_documents is not None and documents is not None:
                sides = (input_ids, documents, prompt_ids, prompt_documents)
                kwargs |= self._packed_inputs(*sides, on_prompt, hidden_states, document_starts)
                inputs_embeds, attention_mask = kwargs.pop("inputs_embeds", None), kwargs.pop("attention_mask", None)
            elif prompt_attention_mask is not None:
                # In decode steps a missing mask means "attend to the whole cache": do not invent a short one there.
                attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                ready = self.slm_inputs(
                    input_ids, attention_mask, prompt_ids, prompt_attention_mask, hidden_states, prompt_spans
                )
                inputs_embeds, attention_mask = ready.pop("inputs_embeds", None), ready.pop("attention_mask")
                kwargs |= ready
                added = 0 if inputs_embeds is None else inputs_embeds.shape[1] - input_ids.shape[1]
            else:
                inputs_embeds = self._embed_tail(input_ids, prompt_inputs_embeds)
        if added:
            position_ids = None
            labels = None if labels is None else nn.functional.pad(labels, (added, 0), value=-100)
        if position_ids is None and past_key_values is None and self._slm_takes_positions:
            position_ids = _positions(attention_mask)
        if position_ids is not None and self._slm_takes_positions:
            kwargs["position_ids"] = position_ids
        output: ModelOutput = self.slm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            **kwargs,
        )
        if added and inputs_embeds is not None and output.logits.shape[:2] == inputs_embeds.shape[:2]:
            output.logits = output.logits[:, added:]
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        prompt_inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the fused prompt to `forward` in prefill, and at each step where there is no cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if prompt_inputs_embeds is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            inputs["prompt_inputs_embeds"] = prompt_inputs_embeds
        return inputs

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as every transformers model does; the encoder reads the prompts once, before the first step.

        Args:
            inputs: (batch, input_len) the slm's side of the prompt; same as the keyword `input_ids`. May be left out
                where both sides share a tokenizer.
            kwargs: prompt_ids and prompt_attention_mask (batch, prompt_len; taken from input_ids and attention_mask
                where left out), hidden_states, and whatever `GenerationMixin.generate` takes.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        mask = kwargs.pop("attention_mask", None)
        prompt_ids = kwargs.pop("prompt_ids", None)
        prompt_mask = kwargs.pop("prompt_attention_mask", None)
        cached = {name: kwargs.pop(name, None) for name in ("hidden_states", "prompt_spans")}
        if input_ids is None or cached["hidden_states"] is None or prompt_mask is None:
            sides = (input_ids, mask, prompt_ids, prompt_mask)
            input_ids, mask, prompt_ids, prompt_mask = complete_sides(self.config, self.prompt_layout, *sides)
        mask = torch.ones_like(input_ids) if mask is None else mask
        ready = self.slm_inputs(input_ids, mask, prompt_ids, prompt_mask, **cached)
        if self.config.is_encoder_decoder:
            return super().generate(**ready, **kwargs)
        # Generation counts ids: those in front, where the slm reads states without a token, are taken off again.
        embeds, mask = ready["inputs_embeds"], ready["attention_mask"]
        added = embeds.shape[1] - input_ids.shape[1]
        input_ids = nn.functional.pad(input_ids, (added, 0), value=pad_id(self.config))
        kwargs |= {name: kwargs[name] + added for name in ("max_length", "min_length") if kwargs.get(name)}
        output = super().generate(input_ids, attention_mask=mask, prompt_inputs_embeds=embeds, **kwargs)
        if isinstance(output, Tensor):
            return output[:, added:]
        output.sequences = output.sequences[:, added:]
        return output

    def _packed_inputs(
        self,
        input_ids: Tensor,
        documents: Tensor,
        prompt_ids: Tensor | None,
        prompt_documents: Tensor,
        on_prompt: Tensor | None,
        hidden_states: Tensor | None,
        document_starts: Tensor | None,
    ) -> dict[str, Any]:
        """Return what the slm takes for packed rows: a row's k-th prompt token is the k-th of the encoder's row."""
        known = (prompt_documents >= 0).long()
        on_prompt = (documents >= 0).long() if on_prompt is None else on_prompt
        prompt = self.embed_prompt(
            input_ids, on_prompt, prompt_ids, known, hidden_states, None, prompt_documents, documents
        )
        embeds = prompt.inputs_embeds
        if not self.config.is_encoder_decoder:
            return {"inputs_embeds": embeds} | causal_inputs(self.slm.config, documents, document_starts)
        if not prompt.is_encoded:
            seen = document_mask(documents, documents)
            embeds = self.slm.get_encoder()(inputs_embeds=embeds, attention_mask=seen).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=embeds)}

    def _embed_tail(self, input_ids: Tensor, prompt_inputs_embeds: Tensor | None) -> Tensor:
        """Embed tokens; the first k positions read `prompt_inputs_embeds` where it is given."""
        if prompt_inputs_embeds is None:
            embeds: Tensor = self.get_input_embeddings()(input_ids)
            return embeds
        tail = self.get_input_embeddings()(input_ids[:, prompt_inputs_embeds.shape[1] :])
        return torch.cat([prompt_inputs_embeds, tail], dim=1)


def _prompt_mask(mask: Tensor | None, prompt_ids: Tensor | None, hidden_states: Tensor | None) -> Tensor | None:
    """Return the mask of a prompt, all ones where it was left out; None where there is no prompt to read."""
    read = hidden_states if prompt_ids is None else prompt_ids
    return mask if mask is not None or read is None else read.new_ones(read.shape[:2], dtype=torch.long)


def _positions(attention_mask: Tensor | None) -> Tensor | None:
    """Count positions over attended tokens: learned absolute positions must not see left padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that produces tokens: the slm of a composition, or the model itself."""
    return model.slm if isinstance(model, LlmToSlm) else model


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know the composition."""
    AutoConfig.register(LlmToSlmConfig.model_type, LlmToSlmConfig, exist_ok=True)
    AutoModel.register(LlmToSlmConfig, LlmToSlm, exist_ok=True)
    AutoModelForCausalLM.register(LlmToSlmConfig, LlmToSlm, exist_ok=True)


register()
