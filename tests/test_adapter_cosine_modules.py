"""The eager adapters: shapes, names in the state dict, the identity at first, gradients everywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specfuse.adapters import LightweightAdapter, LinearAdapter, ResidualMLPAdapter
from specfuse.ops.adapter_cosine import adapter_cosine

D, R = 24, 6
MAKE = {
    "linear": lambda: LinearAdapter(D),
    "residual_mlp": lambda: ResidualMLPAdapter(D, R),
    "lightweight": lambda: LightweightAdapter(D, R),
}
every_adapter = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())

LAYERS = {
    "linear": {"linear": (D, D)},
    "residual_mlp": {"down": (R, D), "up": (D, R)},
    "lightweight": {"down": (R, D), "norm1": (R,), "middle": (R, R), "norm2": (R,), "up": (D, R)},
}


@pytest.mark.parametrize("kind", MAKE)
def test_state_dict_names_and_shapes(kind: str) -> None:
    expected = {f"{layer}.weight": shape for layer, shape in LAYERS[kind].items()}
    expected |= {f"{layer}.bias": shape[:1] for layer, shape in LAYERS[kind].items()}
    adapter = MAKE[kind]()
    assert {name: tuple(t.shape) for name, t in adapter.state_dict().items()} == expected
    assert {t.data_ptr() for t in adapter.weights()} == {p.data_ptr() for p in adapter.parameters()}


@every_adapter
def test_state_dict_round_trip(make) -> None:
    first, second = make(), make()
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, D)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@every_adapter
def test_untrained_adapters_are_the_identity(make) -> None:
    x = torch.randn(2, 5, D)
    assert torch.equal(make()(x), x)


def test_widths_dtype_and_device() -> None:
    adapter = LinearAdapter(D, 40, dtype=torch.bfloat16, device="meta")
    assert adapter(torch.zeros(2, D, dtype=torch.bfloat16, device="meta")).shape == (2, 40)
    for made in (
        ResidualMLPAdapter(D, R, dtype=torch.float16),
        LightweightAdapter(D, R, dtype=torch.float16),
    ):
        assert {p.dtype for p in made.parameters()} == {torch.float16}


@every_adapter
def test_training_reaches_every_parameter_and_raises_the_score(make) -> None:
    torch.manual_seed(0)
    adapter = make()
    x = torch.randn(64, D)
    target = F.gelu(x @ torch.randn(D, D)) + x
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)

    def mean_score() -> float:
        with torch.no_grad():
            return adapter_cosine(x, adapter, target, 0.9).score.mean().item()

    untrained = mean_score()
    for _ in range(30):
        optimizer.zero_grad()
        y = adapter(x)
        loss = F.mse_loss(y, target) + 0.5 * (1 - F.cosine_similarity(y, target).mean())
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in adapter.named_parameters())
    assert mean_score() > untrained + 0.05
