"""Video-LLaVA of Hugging Face: the only file that knows its placeholders, pixel arguments and parts.

Source: Lin et al., "Video-LLaVA: Learning United Visual Representation by Alignment Before Projection", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel, VideoLlavaForConditionalGeneration

from specfuse.hf.rope import length_dependent_rope


class VideoLlavaAdapter:
    """See `specfuse.models.VisualAdapter`.

    A prompt holds one run of placeholder tokens per image or clip; `masked_scatter` fills them in reading
    order, so the rows of the pixel tensors belong to the rows of the prompt in order.
    """

    model_class = VideoLlavaForConditionalGeneration
    # transformers 5.23 renamed pixel_values_images to pixel_values and still takes both.
    pixel_names: Mapping[str, str] = {
        "pixel_values": "image",
        "pixel_values_images": "image",
        "pixel_values_videos": "video",
    }
    encoded_names = frozenset({"mm_encoder_outputs"})
    option_names = frozenset({"vision_feature_layer", "vision_feature_select_strategy"})

    def visual_ids(self, model: PreTrainedModel) -> dict[str, int]:
        """`{"image": id, "video": id}`."""
        return {"image": model.config.image_token_index, "video": model.config.video_token_index}

    def split_pixels(
        self, model: PreTrainedModel, input_ids: Tensor, pixels: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Pixels of each row.

        Args:
            model: the Video-LLaVA.
            input_ids: int64 [B, S].
            pixels: `pixel_values[_images]` [images, C, H, W] and `pixel_values_videos` [videos, T, C, H, W],
                by name.

        Returns:
            For each row the entries of each tensor that its placeholders consume; rows without any get none.

        Raises:
            ValueError: the placeholders can not be dealt out to whole images or clips.
        """
        rows: list[dict[str, Tensor]] = [{} for _ in range(input_ids.shape[0])]
        ids = self.visual_ids(model)
        for name, values in pixels.items():
            per_row = (input_ids == ids[self.pixel_names[name]]).sum(dim=1).tolist()
            entries = values.shape[0]
            if not entries or sum(per_row) % entries:
                raise ValueError(f"{name}: {sum(per_row)} placeholder tokens for {entries} entries")
            per_entry = sum(per_row) // entries
            first = 0
            for row, tokens in enumerate(per_row):
                if per_entry == 0 or tokens % per_entry:
                    raise ValueError(
                        f"{name}: row {row} has {tokens} placeholder tokens, {per_entry} an entry"
                    )
                count = tokens // per_entry
                if count:
                    rows[row][name] = values[first : first + count]
                first += count
        return rows

    def position_dependent(self, model: PreTrainedModel) -> str | None:
        """Names the setting that lets later tokens change the prefix' KV, if there is one."""
        config = model.config.get_text_config()
        if rope := length_dependent_rope(config):
            return f"rope type {rope[0]}"
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            return f"layer types {sorted(kinds)}"
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return f"sliding window {config.sliding_window}"
        return None

    def towers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Image tower and video tower."""
        return [model.get_submodule("model.image_tower"), model.get_submodule("model.video_tower")]

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        """The LLaMA without its head."""
        return model.get_submodule("model.language_model")


ADAPTER = VideoLlavaAdapter()
