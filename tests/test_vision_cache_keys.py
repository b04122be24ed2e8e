"""What makes a cached prefix another prefix: each ingredient of the key, one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import image_inputs, tiny_video_llava, video_inputs
from torch import Tensor, nn

from specfuse.models import adapter_for
from specfuse.vision.cache import VisionCache, patch, patched, unpatch
from specfuse.vision.fingerprint import SAMPLES_PER_TENSOR, ModelFingerprint
from specfuse.vision.prefix import prefix_key


def ask(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits of a short greedy answer, one [B, V] a token: they show changes that the tokens would hide."""
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**inputs, **options).logits


def assert_other_entry(model: Any, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The second request misses although the first is cached, and is answered as without a cache."""
    expected = ask(model, second)
    with patched(model) as cache:
        ask(model, first)
        got = ask(model, second)
    assert (cache.stats.misses, cache.stats.hits, cache.stats.bypassed) == (2, 0, 0)
    for mine, reference in zip(got, expected, strict=True):
        assert torch.equal(mine, reference)


def changed(inputs: dict[str, Tensor], **values: Tensor) -> dict[str, Tensor]:
    return {**inputs, **values}


# ---------------------------------------------------------------- the request


def test_equal_content_in_other_tensors_is_a_hit() -> None:
    """Negative control of this file: without a change there is no miss."""
    model = tiny_video_llava()
    inputs = video_inputs(model)
    with patched(model) as cache:
        ask(model, inputs)
        ask(model, {name: value.clone() for name, value in inputs.items()})
        strided = inputs["pixel_values_videos"].transpose(-1, -2).contiguous().transpose(-1, -2)
        ask(model, changed(inputs, pixel_values_videos=strided))
    assert (cache.stats.misses, cache.stats.hits) == (1, 2)


def test_one_pixel() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    pixels = inputs["pixel_values_videos"].clone()
    pixels[0, -1, -1, -1, -1] += 1e-3
    assert_other_entry(model, inputs, changed(inputs, pixel_values_videos=pixels))


def test_order_of_frames() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    flipped = inputs["pixel_values_videos"].flip(1)
    assert_other_entry(model, inputs, changed(inputs, pixel_values_videos=flipped))


def test_number_of_frames() -> None:
    model = tiny_video_llava()
    four, three = video_inputs(model, frames=4), video_inputs(model, frames=3)
    three["pixel_values_videos"] = four["pixel_values_videos"][:, :3]
    assert_other_entry(model, four, three)


def test_shape_with_the_same_bytes() -> None:
    """Two clips of one frame and one clip of two frames hold the same bytes and the same tokens."""
    model = tiny_video_llava()
    inputs = video_inputs(model, frames=2)
    assert_other_entry(
        model, inputs, changed(inputs, pixel_values_videos=inputs["pixel_values_videos"].transpose(0, 1))
    )


def test_text_before_the_clip() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    ids = inputs["input_ids"].clone()
    ids[0, 2] += 1
    assert_other_entry(model, inputs, changed(inputs, input_ids=ids))


def test_length_of_the_text_before_the_clip() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    shorter = {name: inputs[name][:, 1:] for name in ("input_ids", "attention_mask")}
    assert_other_entry(model, inputs, changed(inputs, **shorter))


def test_first_position() -> None:
    model = tiny_video_llava(dtype=torch.float64)
    inputs = video_inputs(model)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    call = {**inputs, "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        expected = model(**call, position_ids=positions + 2).logits
        with patched(model) as cache:
            model(**call)
            model(**call, position_ids=positions)
            got = model(**call, position_ids=positions + 2).logits
    assert torch.equal(got, expected)
    assert (cache.stats.misses, cache.stats.hits) == (2, 1)


def test_image_and_video_of_the_same_bytes() -> None:
    model = tiny_video_llava()
    adapter = adapter_for(model)
    ids = torch.tensor([1, 2])
    frame = video_inputs(model, frames=1)["pixel_values_videos"]
    as_image, renamed, as_video = (
        prefix_key("", ids, 0, {name: frame}, adapter.pixel_names)
        for name in ("pixel_values", "pixel_values_images", "pixel_values_videos")
    )
    assert as_image == renamed != as_video


def test_pixel_dtype() -> None:
    model = tiny_video_llava()
    inputs = image_inputs(model)
    name = next(n for n in inputs if n.startswith("pixel_values"))
    assert_other_entry(model, inputs, changed(inputs, **{name: inputs[name].to(torch.bfloat16)}))


def test_vision_feature_layer_of_the_call() -> None:
    model = tiny_video_llava()
    call = {**video_inputs(model), "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        expected = model(**call, vision_feature_layer=-3).logits
        with patched(model) as cache:
            model(**call)
            assert torch.equal(model(**call, vision_feature_layer=-3).logits, expected)
    assert (cache.stats.misses, cache.stats.hits) == (2, 0)


# ---------------------------------------------------------------- the model


def halve_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.v_proj.weight.mul_(0.5)


def add_through_data(model: Any) -> None:
    """What merging a LoRA does: no version counter moves."""
    weight = model.model.language_model.layers[1].self_attn.q_proj.weight
    version = weight._version
    weight.data += torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1]) * 0.02
    assert weight._version == version


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.model.multi_modal_projector.parameters(), lr=0.5)
    model(**video_inputs(model)).logits.square().sum().backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)


def load_other_weights(model: Any) -> None:
    model.load_state_dict(tiny_video_llava(seed=9).state_dict())


def replace_parameter(model: Any) -> None:
    module = next(m for m in model.model.video_tower.modules() if isinstance(m, nn.Linear))
    module.weight = nn.Parameter(module.weight.detach() * 1.5)


def replace_module(model: Any) -> None:
    attention = model.model.language_model.layers[0].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, nn.Linear(64, 64))


def move_data(model: Any) -> None:
    weight = model.model.language_model.embed_tokens.weight
    weight.data = weight.data.roll(1, dims=1)


def change_buffer(model: Any) -> None:
    model.model.language_model.rotary_emb.inv_freq.mul_(0.5)


def change_dtype(model: Any) -> None:
    model.to(torch.float64)


def change_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def change_feature_layer(model: Any) -> None:
    model.config.vision_feature_layer = -3


def drop_a_layer(model: Any) -> None:
    model.config.text_config.num_hidden_layers = 1


CHANGES: list[Callable[[Any], None]] = [
    halve_in_place,
    add_through_data,
    optimizer_step,
    load_other_weights,
    replace_parameter,
    replace_module,
    move_data,
    change_buffer,
    change_dtype,
    change_attention,
    change_feature_layer,
    drop_a_layer,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_model_misses(change: Callable[[Any], None]) -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    cache = patch(model)
    before = ask(model, inputs)
    ask(model, inputs)
    assert (cache.stats.misses, cache.stats.hits) == (1, 1)
    change(model)
    after = ask(model, inputs)
    assert (cache.stats.misses, cache.stats.hits) == (2, 1)
    unpatch(model)
    for mine, reference in zip(after, ask(model, inputs), strict=True):
        assert torch.equal(mine, reference)
    # eager attention computes the same function; every other change is one that must be seen in the logits.
    if change is not change_attention:
        assert not torch.equal(after[0].float(), before[0].float())


def test_two_models_with_equal_weights_do_not_share() -> None:
    model = tiny_video_llava()
    # The very same tensors: even so the class or a hook of the other model may compute something else.
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): t for t in tensors})
    assert twin.lm_head.weight is model.lm_head.weight
    cache = VisionCache()
    with patched(model, cache), patched(twin, cache):
        for each in (model, twin, model, twin):
            ask(each, video_inputs(model))
    assert (cache.stats.misses, cache.stats.hits) == (2, 2)


def test_two_models_share_a_cache_and_keep_their_answers() -> None:
    models = [tiny_video_llava(seed=s) for s in range(3)]
    inputs = video_inputs(models[0])
    expected = [ask(model, inputs) for model in models]
    cache = VisionCache()
    for _ in range(2):
        for model, wanted in zip(models, expected, strict=True):
            with patched(model, cache):
                for mine, reference in zip(ask(model, inputs), wanted, strict=True):
                    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)
    assert (cache.stats.misses, cache.stats.hits) == (3, 3)


def test_autocast() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    with patched(model) as cache:
        ask(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            ask(model, inputs)
            ask(model, inputs)
    assert (cache.stats.misses, cache.stats.hits) == (2, 1)


def test_fingerprint_samples_every_tensor() -> None:
    """Each parameter, changed through `.data` by a tenth, changes the digest; unchanged, it does not."""
    model = tiny_video_llava()
    fingerprint = ModelFingerprint(model)
    before = fingerprint.digest()
    assert fingerprint.digest() == before
    for name, parameter in model.named_parameters():
        parameter.data.mul_(1.1)
        assert fingerprint.digest() != before, name
        before = fingerprint.digest()


def test_fingerprint_sees_one_sampled_element_and_may_miss_others() -> None:
    """States the limit of the sample: it reads `SAMPLES_PER_TENSOR` elements, not all."""
    model = tiny_video_llava()
    weight = model.lm_head.weight
    assert weight.numel() > 2 * SAMPLES_PER_TENSOR
    fingerprint = ModelFingerprint(model)
    before = fingerprint.digest()
    weight.data.view(-1)[1] += 1
    assert fingerprint.digest() == before
    weight.data.view(-1)[0] += 1
    assert fingerprint.digest() != before


def test_fingerprint_under_inference_mode_and_adapters() -> None:
    with torch.inference_mode():
        model = tiny_video_llava()
    fingerprint = ModelFingerprint(model)
    before = fingerprint.digest()
    assert fingerprint.digest() == before
    model.model.language_model._disable_adapters = True
    assert fingerprint.digest() != before
