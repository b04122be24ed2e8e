"""EventGPT as a Hugging Face model: pictures of an event stream and a question in, an answer out.

Per picture of events the CLIP tower's last hidden state goes through Linear, GELU, Linear and the feature
adaptor; of n pictures with P tokens each remain n temporal tokens (means over the P) and P spatial ones
(means over the n), which stand in the prompt of a LLaMA where ``<event>`` is.

Source: Liu et al., "EventGPT: Event Stream Understanding with Multimodal Large Language Models", CVPR 2025,
with the published checkpoint's sizes and names as defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from specfuse.hf.cache_names import CACHE_NAMES, OUTPUT_CACHE, cache_argument, output_cache

ORIGINAL_EVENT_TOKEN = -200
"""What the original implementation writes where features go; here it is an ordinary id, one per feature."""

_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class EventGptConfig(PreTrainedConfig):
    """Sizes of an EventGPT; the defaults are those of the published model.

    Args:
        vision_config: of the CLIP tower; ViT-L/14 at 336 pixels where not given.
        text_config: of the LLaMA; 7B where not given.
        event_token_index: id of the placeholder. A prompt holds one for every feature of a stream.
        num_event_images: n, the pictures that a stream is rendered to.
        context_length: tokens of a prompt, features included; what is longer is cut off.
    """

    model_type = "eventgpt"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}
    attribute_map = {"event_token_id": "event_token_index"}

    vision_config: Any = None
    text_config: Any = None
    event_token_index: int = 32000
    num_event_images: int = 5
    context_length: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or _CLIP_L_336))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = LlamaConfig(**(self.text_config or {"vocab_size": 32001}))
        if self.num_event_images < 1:
            raise ValueError(f"num_event_images must be at least 1, got {self.num_event_images}")
        super().__post_init__(**kwargs)

    @property
    def picture_tokens(self) -> int:
        """P: tokens of one picture, its patches and the class token."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2 + 1

    @property
    def event_tokens(self) -> int:
        """Tokens of one stream in a prompt, n + P."""
        return self.num_event_images + self.picture_tokens


@dataclass
class EventGptModelOutput(BaseModelOutputWithPast):
    """Outputs of the decoder, and the features ``[S, n + P, D]`` that were spliced into its prompt."""

    event_hidden_states: Tensor | None = None


@dataclass
class EventGptOutput(CausalLMOutputWithPast):
    """Logits, and the features ``[S, n + P, D]`` that were spliced into the prompt."""

    event_hidden_states: Tensor | None = None


class EventGptPreTrainedModel(PreTrainedModel):
    """What the classes below have in common."""

    config_class = EventGptConfig
    base_model_prefix = "model"
    input_modalities = ("event", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class EventGptModel(EventGptPreTrainedModel):
    """Tower, projector, feature adaptor and decoder, without the language-model head."""

    def __init__(self, config: EventGptConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.visual_tower = AutoModel.from_config(config.vision_config)
        self.visual_projector = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.feature_adaptor = nn.Linear(width, width)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_event_features(self, pixel_values_events: Tensor) -> Tensor:
        """What a prompt holds of S streams: ``[S, n, 3, H, W]`` normalised pictures to ``[S, n + P, D]``.

        The first n tokens are the means of each picture, the P others those of each place over time.

        Raises:
            ValueError: pixels of another shape.
        """
        if pixel_values_events.dim() != 5:
            raise ValueError(
                f"pixel_values_events must be [S, n, 3, H, W], got {tuple(pixel_values_events.shape)}"
            )
        pixels = pixel_values_events.to(self.feature_adaptor.weight.dtype)
        seen = self.visual_tower(pixels.flatten(0, 1)).last_hidden_state
        return self.pool(seen.unflatten(0, pixels.shape[:2]))

    def pool(self, seen: Tensor) -> Tensor:
        """The same from the tower's last hidden states ``[S, n, P, D_vision]``."""
        features = self.feature_adaptor(self.visual_projector(seen))
        return torch.cat([features.mean(2), features.mean(1)], dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_events: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        event_features: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> EventGptModelOutput:
        """As :meth:`EventGptForConditionalGeneration.forward`, up to the last hidden state."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_events is not None and event_features is None:
            event_features = self.get_event_features(pixel_values_events)
        if event_features is not None:
            if input_ids is None:
                raise ValueError("events need input_ids: embeddings do not say where <event> stands")
            inputs_embeds = self.splice(input_ids, inputs_embeds, event_features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{cache_argument(self.language_model.forward): past_key_values if cache is None else cache},
            **kwargs,
        )
        return EventGptModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{OUTPUT_CACHE: output_cache(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            event_hidden_states=event_features,
        )

    def splice(self, input_ids: Tensor, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        """Puts features ``[S, n + P, D]`` where prompts ``[B, T]`` have placeholders, in reading order.

        Raises:
            ValueError: placeholders and features do not match.
        """
        places = input_ids == self.config.event_token_index
        each, used, rows = features.shape[1], 0, []
        for row, count in enumerate(places.sum(1).tolist()):
            # A prompt that was cut at the end of the context may hold a stream's first features only.
            if count % each and input_ids.shape[1] < self.config.context_length:
                raise ValueError(
                    f"row {row} of input_ids has {count} <event> tokens, a stream has {each} features"
                )
            streams = -(-count // each)
            rows.append(features[used : used + streams].flatten(0, 1)[:count])
            used += streams
        if used != len(features):
            raise ValueError(f"input_ids have <event> tokens for {used} streams, got {len(features)}")
        filled = torch.cat(rows).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(places[..., None].to(inputs_embeds.device), filled)


class EventGptForConditionalGeneration(EventGptPreTrainedModel, GenerationMixin):
    """EventGPT with its language-model head; ``generate`` takes what ``EventGptProcessor`` returns."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: EventGptConfig):
        super().__init__(config)
        self.model = EventGptModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        return self.model.language_model

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As Hugging Face's; only the pass over the prompt, where ``<event>`` stands, gets the events."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values_events", None)
            inputs.pop("event_features", None)
        return inputs

    def get_event_features(self, pixel_values_events: Tensor) -> Tensor:
        """See :meth:`EventGptModel.get_event_features`."""
        return self.model.get_event_features(pixel_values_events)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_events: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        event_features: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> EventGptOutput:
        """Logits of the next tokens.

        Args:
            input_ids: int64 ``[B, T]`` with ``n + P`` placeholders for each stream.
            pixel_values_events: ``[S, n, 3, H, W]`` of S streams, in reading order of their placeholders.
            attention_mask, position_ids, inputs_embeds: as for LLaMA.
            cache, past_key_values: the KV cache, by its new or its old name.
            event_features: ``[S, n + P, D]`` from ``get_event_features``, instead of pixels.
            labels: ``[B, T]``, -100 where there is no loss.
            logits_to_keep: compute only that many last logits; 0 for all.

        Raises:
            ValueError: placeholders and features do not match.
        """
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_events=pixel_values_events,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            event_features=event_features,
            **kwargs,
        )
        states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size
            )
        return EventGptOutput(
            loss=loss,
            logits=logits,
            **{OUTPUT_CACHE: output_cache(outputs)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            event_hidden_states=outputs.event_hidden_states,
        )


AutoConfig.register(EventGptConfig.model_type, EventGptConfig)
AutoModel.register(EventGptConfig, EventGptModel)
AutoModelForCausalLM.register(EventGptConfig, EventGptForConditionalGeneration)
