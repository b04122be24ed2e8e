"""A Video-LLaVA small enough to write in a second: real classes and files, random weights.

It answers nonsense. It is there to try the commands, the tests and the plumbing without a 14 GB download;
every figure measured on it says that its weights are random.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specfuse.models.tokenizer import SPECIAL_TOKENS, learn_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration, VideoLlavaProcessor

IMAGE_SIZE, PATCH_SIZE = 56, 14

# What the tokenizer learns its merges from. Single bytes are in the vocabulary, so any text can be encoded.
TEXT = """USER: <video> What is happening in this video? ASSISTANT:
USER: What are the key elements in this scene? ASSISTANT: The key elements in this scene include
The video shows a car driving down a street at night with other vehicles, traffic lights and street lights.
There are several people walking on the sidewalk, and a person riding a bicycle in front of the car.
Describe the weather and the road. The road is wet and the sky is cloudy, with trees on both sides.
How many cars are there? There are two cars parked on the left side and a truck in the distance.
Is the car turning or moving straight? The car is moving straight through an intersection.
A man is drinking water from a glass, which is captured in slow motion as the drops fall on the table.
What color is the building behind the tree? The building is white and has a large window above the door.
Overall, the scene depicts a typical day in the city, with pedestrians crossing and vehicles waiting."""

CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
---
# Tiny Video-LLaVA with random weights

Written by `specfuse init-tiny` (seed {seed}). **The weights are random: its answers mean nothing.**
The classes are Hugging Face's `VideoLlavaForConditionalGeneration` and `VideoLlavaProcessor`; a frame is
{image_size} pixels wide and {tokens_per_frame} tokens long. `example.gif` is a drawn clip to ask about. Use
it to try commands and to test code, not to judge speed or quality.

    from transformers import AutoProcessor, VideoLlavaForConditionalGeneration
    model = VideoLlavaForConditionalGeneration.from_pretrained("this directory")
    processor = AutoProcessor.from_pretrained("this directory")
"""


def init_tiny(directory: str | os.PathLike[str], seed: int = 0, *, force: bool = False) -> Path:
    """Writes a tiny Video-LLaVA for ``from_pretrained``: model, processor, tokenizer, example clip.

    Args:
        directory: where to; created if missing.
        seed: of the random weights. The same seed writes the same weights.
        force: write into a directory that already holds files.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory holds files and ``force`` is not set.
        NotADirectoryError: the path is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise FileExistsError(f"{directory} is not empty")
    tokenizer = learn_tokenizer(TEXT.split("\n"), 768)
    model = _model(tokenizer, seed)
    processor = _processor(tokenizer, model)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    tokens_per_frame = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    card = CARD.format(seed=seed, image_size=IMAGE_SIZE, tokens_per_frame=tokens_per_frame)
    (directory / "README.md").write_text(card)
    _write_example(directory / "example.gif")
    return directory


def _write_example(path: Path) -> None:
    """A clip to ask about: 16 frames of a red car on a grey road under a blue sky."""
    from PIL import Image, ImageDraw

    frames = []
    for step in range(16):
        frame = Image.new("RGB", (128, 96), (110, 160, 220))
        draw = ImageDraw.Draw(frame)
        draw.rectangle((0, 56, 127, 95), fill=(90, 90, 90))
        left = 6 * step
        draw.rectangle((left, 50, left + 30, 66), fill=(200, 30, 30))
        for wheel in (left + 6, left + 24):
            draw.ellipse((wheel - 4, 62, wheel + 4, 70), fill=(20, 20, 20))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def _model(tokenizer: PreTrainedTokenizerFast, seed: int) -> VideoLlavaForConditionalGeneration:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
    )

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    frame_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        video_token_index=SPECIAL_TOKENS.index("<video>"),
        image_seq_length=frame_tokens - 1,
        video_seq_length=8 * frame_tokens,
    )
    # What reports figures says so when it sees this.
    config.random_weights_seed = seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlavaForConditionalGeneration(config).eval()
    _draw_weights(model, seed)
    with torch.no_grad():
        # An answer holds text only (a logit of 0 never wins), and may stop.
        silent = [i for i in range(len(SPECIAL_TOKENS)) if i != tokenizer.eos_token_id]
        model.lm_head.weight[silent] = 0
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    return model


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Gives matrices the variance 4 / fan_in and embeddings 1.

    At the usual standard deviation of 0.02 every answer is one token repeated; here greedy answers vary with
    the question and with the video.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 and id(parameter) not in embeddings:
                continue
            fan_in = parameter[0].numel()
            scale = 1.0 if id(parameter) in embeddings else 2.0 * fan_in**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _processor(
    tokenizer: PreTrainedTokenizerFast, model: VideoLlavaForConditionalGeneration
) -> VideoLlavaProcessor:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    size = {"shortest_edge": IMAGE_SIZE}
    crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(size=size, crop_size=crop_size),
        video_processor=VideoLlavaVideoProcessor(size=size, crop_size=crop_size),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
