"""``compact_kv``: C++ == eager reference == a copying oracle; nothing else in the cache changes."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import pytest
import torch
from torch import Tensor

from specfuse.kernels.compact_kv_ref import compact_kv_ref
from specfuse.ops import compact_kv, native
from specfuse.ops.compact_kv import _KV_TENSOR, _reference, _table

op = torch.ops.specfuse.compact_kv.default
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
]


def paths(rows: list[list[int]], K: int) -> tuple[Tensor, Tensor]:
    """``path`` padded with -1 to K and ``length``."""
    padded = [row + [-1] * (K - len(row)) for row in rows]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return torch.tensor(padded, dtype=torch.int32).reshape(len(rows), K), lengths


def cache(B: int, G: int, Smax: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element tells where it was, as far as the dtype can."""
    return (torch.arange(B * G * Smax * D) % 251).reshape(B, G, Smax, D).to(dtype)


def oracle(kv: list[Tensor], path: Tensor, length: Tensor, start: Tensor) -> list[Tensor]:
    moved = [t.clone() for t in kv]
    for old, new in zip(kv, moved, strict=True):
        for b in range(path.shape[0]):
            for i in range(1, int(length[b])):
                new[b, :, int(start[b]) + i] = old[b, :, int(start[b]) + int(path[b, i])]
    return moved


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("implementation", [op, compact_kv_ref], ids=["dispatched", "reference"])
def test_every_path_of_seven_nodes(implementation: object) -> None:
    rows = [[0, *rest] for n in range(7) for rest in combinations(range(1, 7), n)]
    path, length = paths([*rows, []], 7)
    start = torch.arange(len(rows) + 1) % 4
    kv = [cache(len(rows) + 1, 2, 11, 3), cache(len(rows) + 1, 1, 10, 5) + 0.5]
    expected = oracle(kv, path, length, start)
    assert not same(kv, expected)
    implementation(kv, path, length, start)
    assert same(kv, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 3, 64])
def test_dtypes_and_tensors_that_differ(dtype: torch.dtype, D: int) -> None:
    path, length = paths([[0, 2, 3, 7], [0], [0, 1, 2, 6]], 8)
    start = torch.tensor([5, 0, 2])
    kv = [cache(3, 4, 16, D, dtype), cache(3, 1, 13, D + 1, dtype), cache(3, 2, 40, 8, torch.float32)]
    expected = oracle(kv, path, length, start)
    compact_kv(kv, path, length, start)
    assert same(kv, expected)


def test_strided_views_leave_their_surroundings_alone() -> None:
    path, length = paths([[0, 1, 4], [0, 3, 5]], 6)
    start = torch.tensor([1, 3], dtype=torch.int32)
    base = torch.rand(4, 6, 30, 10)
    views = {
        "every dimension sliced": lambda t: t[1:3, ::2, 4:20, 2:7],
        "slots before heads": lambda t: t[:2].view(2, 30, 6, 10).transpose(1, 2),
        "every other slot": lambda t: t[::2, :, ::2],
    }
    for name, view in views.items():
        actual, expected = base.clone(), base.clone()
        view(expected).copy_(oracle([view(base)], path, length, start)[0])
        compact_kv([view(actual)], path, length, start)
        assert torch.equal(actual, expected), name
        assert not torch.equal(actual, base), name


def test_nan_stays_where_it_was() -> None:
    """Slots outside the move may hold anything."""
    kv = torch.full((1, 1, 10, 2), torch.nan)
    kv[0, 0, 3:7] = torch.arange(8.0).reshape(4, 2)
    path, length = paths([[0, 2, 3]], 4)
    compact_kv([kv], path, length, torch.tensor([3]))
    assert kv[0, 0, 3:6].flatten().tolist() == [0.0, 1.0, 4.0, 5.0, 6.0, 7.0]
    assert kv[0, 0, 6].tolist() == [6.0, 7.0]  # stale, not cleared
    assert kv[0, 0, :3].isnan().all() and kv[0, 0, 7:].isnan().all()


@pytest.mark.parametrize("B", [0, 1])
def test_nothing_to_do(B: int) -> None:
    path, length = paths([[0, 1, 2]] * B, 3)
    start = torch.zeros(B, dtype=torch.int64)
    kv = [cache(B, 2, 5, 4)]
    before = [t.clone() for t in kv]
    compact_kv(kv, path, length, start)
    compact_kv([], path, length, start)
    compact_kv(kv, path, torch.zeros(B, dtype=torch.int32), start + 100)  # empty rows have no start
    assert same(kv, before)


GOOD = {"kv": [torch.zeros(2, 1, 9, 4)], "path": paths([[0, 2, 4], [0, 1]], 5)[0]}
GOOD |= {"length": torch.tensor([3, 2], dtype=torch.int32), "start": torch.tensor([2, 3])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv": [torch.zeros(2, 1, 9, 4), torch.zeros(3, 1, 9, 4)]},
            r"kv\[1\] must be \[2, G.*\[3, 1, 9",
        ),
        ({"kv": [torch.zeros(2, 9, 4)]}, r"kv\[0\] must be \[2, G, Smax, D\]"),
        (
            {"kv": [torch.zeros(2, 1, 9, 4).transpose(2, 3)]},
            r"kv\[0\] must be contiguous",
        ),
        (
            {"kv": [torch.zeros(2, 1, 9, 4, dtype=torch.complex128)]},
            r"kv\[0\] must have .*complex128",
        ),
        ({"kv": [torch.zeros(2, 1, 9, 4, device="meta")]}, r"kv\[0\] must be .* on cpu.*meta"),
        ({"kv": [torch.zeros(1, 1, 9, 4).expand(2, 1, 9, 4)]}, "kv must not share memory"),
        (
            {"kv": [torch.zeros(2, 1, 6, 4)]},
            "start plus the last path node must lie inside every kv tensor, got 2 in row 0",
        ),
        ({"path": GOOD["path"].long()}, "path must be .* int32"),
        ({"path": paths([[0, 2, 2], [0, 1]], 5)[0]}, "path must increase strictly .* got 2 in row 0"),
        ({"path": paths([[0, -1, 2], [0, 1]], 5)[0]}, "path must increase strictly"),
        ({"path": paths([[-1, 0, 2], [0, 1]], 5)[0]}, "path must increase strictly"),
        ({"length": torch.tensor([6, 2], dtype=torch.int32)}, "length must lie between 0 and"),
        ({"length": torch.tensor([3, -1], dtype=torch.int32)}, "length must lie .* got -1 in row 1"),
        ({"length": torch.tensor([3], dtype=torch.int32)}, r"length must be \[2\]"),
        ({"start": torch.tensor([2, -1])}, "start plus the last path node"),
        ({"start": torch.tensor([5, 3])}, "start plus the last path node"),
        ({"start": torch.tensor([2**63 - 1, 3])}, "start plus the last path node"),
        ({"start": torch.tensor([2, 2**63 - 1])}, "start plus .* got 9223372036854775807 in row 1"),
        ({"start": torch.tensor([2, 3, 4])}, r"start must be \[2\]"),
    ],
)
@pytest.mark.parametrize("implementation", [op, _reference], ids=["dispatched", "reference"])
def test_bad_arguments_are_named_and_move_nothing(
    changes: dict[str, object], message: str, implementation: object
) -> None:
    arguments = GOOD | changes
    kv = [t if t.is_meta or 0 in t.stride() else t.normal_() for t in arguments["kv"]]
    before = [t.clone() for t in kv]
    with pytest.raises(ValueError, match=message):
        implementation(*arguments.values())
    assert all(t.is_meta or torch.equal(t, u) for t, u in zip(kv, before, strict=True))


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_a_cpu_call_reaches_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Spy:
        kv_table = native.cpu.kv_table

        def compact_kv(self, *args: object) -> None:
            calls.append(args)

    monkeypatch.setattr(native, "cpu", Spy())
    op(*GOOD.values())
    assert len(calls) == 1


def test_opcheck() -> None:
    path, length = paths([[0, 2, 3], [0, 1, 4]], 5)
    kv = [cache(2, 2, 9, 4), cache(2, 1, 12, 6)]
    torch.library.opcheck(op, (kv, path, length, torch.tensor([1, 4])))


def test_compiled_equals_eager() -> None:
    """In a full graph the caches are changed in place, before and after other arithmetic on them."""
    path, length = paths([[0, 2, 3], [0, 1, 4]], 5)
    start = torch.tensor([1, 4])

    def step(keys: Tensor, values: Tensor) -> Tensor:
        keys.add_(1.0)
        compact_kv([keys, values], path, length, start)
        return keys.sum() + values[:, :, 3].sum()

    eager = [cache(2, 2, 9, 4), cache(2, 1, 12, 6)]
    compiled = [t.clone() for t in eager]
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(actual, expected) and same(compiled, eager)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 3, 128])
def test_cuda_equals_cpu(dtype: torch.dtype, D: int) -> None:
    rows = [[0, 2, 3, 7], [0], [0, 1, 2, 6], [], list(range(0, 64, 3))]
    path, length = paths(rows, 64)
    start = torch.tensor([5, 0, 2, 9, 100])
    kv = [cache(5, 4, 200, D, dtype), cache(5, 1, 164, D + 1, dtype), *[cache(5, 2, 170, 8)] * 300]
    kv = [t.clone() for t in kv]
    on_gpu = [t.cuda() for t in kv]
    compact_kv(kv, path, length, start)
    compact_kv(on_gpu, path.cuda(), length.cuda(), start.cuda())
    assert same([t.cpu() for t in on_gpu], kv)


@pytest.mark.gpu
def test_cuda_leaves_out_moves_that_leave_the_cache() -> None:
    kv = cache(1, 1, 6, 4).cuda()
    path, length = paths([[0, 2, 5]], 6)
    compact_kv([kv], path.cuda(), length.cuda(), torch.tensor([2]).cuda())
    expected = cache(1, 1, 6, 4)
    expected[:, :, 3] = expected[:, :, 4].clone()
    assert torch.equal(kv.cpu(), expected)


@pytest.mark.gpu
def test_cuda_offsets_past_2_to_the_31() -> None:
    """3.2 GB in one tensor; the last row lies beyond 2**31 bytes and elements."""
    kv = torch.zeros(3, 8, 2**20 + 9, 128, dtype=torch.uint8, device="cuda")
    kv[:, :, -9:] = cache(3, 8, 9, 128, torch.uint8).cuda()
    path, length = paths([[0, 2, 3, 7]] * 3, 8)
    start = torch.full((3,), 2**20)
    expected = oracle([kv[:, :, -9:].cpu()], path, length, torch.zeros(3, dtype=torch.int64))
    compact_kv([kv], path.cuda(), length.cuda(), start.cuda())
    assert same([kv[:, :, -9:].cpu()], expected)
    assert not kv[:, :, :-9].any()


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_paths() -> None:
    kv = cache(2, 4, 300, 64, torch.float16).cuda()
    before = kv.clone()
    path = torch.zeros(2, 16, dtype=torch.int32, device="cuda")
    length = torch.zeros(2, dtype=torch.int32, device="cuda")
    start = torch.zeros(2, dtype=torch.int64, device="cuda")
    compact_kv([kv], path, length, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compact_kv([kv], path, length, start)
    for rows in ([[0, 3, 9], [0, 1]], [[0, 1, 2, 4], list(range(0, 32, 2))]):
        kv.copy_(before)
        new_path, new_length = paths(rows, 16)
        new_start = torch.tensor([200, 31])
        for old, new in ((path, new_path), (length, new_length), (start, new_start)):
            old.copy_(new)
        graph.replay()
        assert same([kv.cpu()], oracle([before.cpu()], new_path, new_length, new_start))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["rows", "heads", "slots"])
def test_broadcast_memory_is_refused(dim: int) -> None:
    """A move would be made several times over the same memory."""
    shape = [2, 2, 6, 4]
    base = [1 if i == dim else n for i, n in enumerate(shape)]
    kv = torch.zeros(base).expand(shape)
    path = torch.tensor([[0, 2]] * 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="share memory"):
        compact_kv([kv], path, torch.full((2,), 2, dtype=torch.int32), torch.ones(2, dtype=torch.int64))


def test_a_cache_with_gradients_is_refused() -> None:
    """Autograd would not notice that a tensor it keeps has changed."""
    path, length = paths([[0, 2]], 2)
    kv = [cache(1, 1, 6, 4), cache(1, 1, 6, 4).requires_grad_()]
    with pytest.raises(ValueError, match=r"kv\[1\] must not require grad"):
        compact_kv(kv, path, length, torch.tensor([0]))
    expected = oracle([t.detach() for t in kv], path, length, torch.tensor([0]))
    with torch.no_grad():
        compact_kv(kv, path, length, torch.tensor([0]))
    assert same(kv, expected)


def test_start_must_be_an_integer_tensor() -> None:
    path = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="start must be"):
        compact_kv([torch.zeros(1, 1, 6, 4)], path, torch.tensor([2], dtype=torch.int32), torch.tensor([1.7]))


# ---------------------------------------------------------------- what the native code is told


def views() -> list[Tensor]:
    base = torch.zeros(3, 4, 10, 16)
    return [
        base,
        base[:1].expand(3, 4, 10, 16)[:1],
        base[:, 1:2, ::2, 4:8],
        base.transpose(1, 2),
        base[..., :1],
        base[:, :, 3:3],
        base.new_zeros(0, 2, 5, 4),
        *(base.to(dtype) for dtype in [*DTYPES, torch.bool, torch.complex64]),
        torch.nn.Parameter(base),
        base.clone().requires_grad_(),
    ]


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_addresses_and_strides_are_read_in_one_call() -> None:
    """One call of the native module says what Python says tensor by tensor."""
    plain = 0
    for t in views():
        path = torch.zeros(t.shape[0], 2, dtype=torch.int32)
        arguments = ([t], path, torch.zeros(t.shape[0], dtype=torch.int32), torch.zeros(t.shape[0]).long())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "cpu", None)
            expected = _table(*arguments)
        assert len(expected) == 56 and _table(*arguments) == expected
        plain += native.cpu.kv_table([t], t.shape[0], 1, 0) is not None
    assert plain >= len(views()) - 2, "the one call serves all but tensors with gradients and subclasses"
    assert _KV_TENSOR.unpack(_table(*arguments))[0] == t.data_ptr()


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_one_call_leaves_what_it_cannot_describe_to_python() -> None:
    good = torch.zeros(2, 3, 5, 4)
    bad = [
        good[0],
        good[:1],
        good.transpose(2, 3),
        good.to(torch.complex128),
        good[:, :1].expand(2, 3, 5, 4),
        good.to("meta"),
        None,
        "text",
    ]
    assert native.cpu.kv_table([good, good], 2, 1, 0) is not None
    assert [native.cpu.kv_table([good, t], 2, 1, 0) for t in bad] == [None] * len(bad)
    assert native.cpu.kv_table([good], 2, 2, 0) is None  # asked for a GPU


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_first_calls_from_two_threads_do_not_wait_for_each_other() -> None:
    """The first call imports torch, and an import may let another thread run."""
    script = """
import builtins, threading, time, torch
from specfuse.ops import native

def slow(*args, found=builtins.__import__):
    time.sleep(0.05)
    return found(*args)

builtins.__import__ = slow
kv = [torch.zeros(2, 3, 5, 4)]
read = []
threads = [threading.Thread(target=lambda: read.append(native.cpu.kv_table(kv, 2, 1, 0))) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(set(read)) == 1 and read[0] is not None and len(read) == 3, read
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_one_call_reads_cuda_tensors() -> None:
    kv = cache(2, 3, 9, 8).cuda()
    table = native.cpu.kv_table([kv[:, :, 1:]], 2, 2, kv.device.index)
    expected = (kv.data_ptr() + 32, 3 * 9 * 32, 9 * 32, 32, 3, 8, 32)
    assert _KV_TENSOR.unpack(table) == expected
    assert native.cpu.kv_table([kv, kv.cpu()], 2, 2, kv.device.index) is None
