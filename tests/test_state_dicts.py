"""The extrapolation step of *accelerated* preference optimization on tensors and state dicts."""

import ast
import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference.extrapolation import dot_exactly, extrapolate_as_pinned, extrapolate_exactly
from trl_extras import state_dicts
from trl_extras.state_dicts import (
    check_alpha,
    cosine,
    difference,
    extrapolate,
    extrapolate_,
    extrapolate_tensor,
)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def pair(dtype: torch.dtype, shape: tuple[int, ...] = (37, 11), step: float = 0.02) -> tuple[Tensor, Tensor]:
    """Two neighbouring weights, as two rounds of training leave them."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator, dtype=torch.float64)
    new = old * (1 + step * torch.randn(shape, generator=generator, dtype=torch.float64))
    return new.to(dtype), old.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0, 2.5])
def test_values_against_the_reference(dtype: torch.dtype, alpha: float) -> None:
    new, old = pair(dtype)
    result = extrapolate_tensor(new, old, alpha)
    assert result.dtype == dtype
    exact = extrapolate_exactly(new, old, alpha)
    # Half a unit in the last place of the dtype, and the accumulation's own rounding.
    unit = torch.finfo(dtype).eps
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    error = (result.double() - exact).abs()
    scale = torch.maximum(exact.abs(), new.double().abs())
    assert (error <= (0.5 * unit + 2 * (1 + alpha) * accumulation) * scale).all()
    assert same_bits(result, extrapolate_as_pinned(new, old, alpha))


def test_one_number() -> None:
    result = extrapolate({"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}, alpha=0.5)
    assert result["w"].tolist() == [2.5]


@pytest.mark.parametrize(("form", "step"), [("momentum", 1.0), ("blend", 0.02)])
def test_bfloat16_arithmetic_would_fail_the_bound(form: str, step: float) -> None:
    """
    The bound of the test above tells float32 accumulation from bfloat16 arithmetic: from the obvious line where
    weights have moved far (of two close numbers the difference is exact in any precision), from the
    expanded one always.
    """
    new, old = pair(torch.bfloat16, step=step)
    exact = extrapolate_exactly(new, old, 0.3)
    bound = 0.5 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6 * new.double().abs()
    naive = new + 0.3 * (new - old) if form == "momentum" else 1.3 * new - 0.3 * old
    assert ((extrapolate_tensor(new, old, 0.3).double() - exact).abs() <= bound).all()
    assert ((naive.double() - exact).abs() > bound).sum() > new.numel() // 50


def test_linear_in_alpha() -> None:
    new, old = pair(torch.float64)
    at = {alpha: extrapolate_tensor(new, old, alpha) for alpha in (0.0, 0.25, 0.5, 1.0)}
    torch.testing.assert_close(at[0.5] - at[0.0], 2 * (at[0.25] - at[0.0]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(at[1.0] - at[0.0], new - old, rtol=1e-12, atol=1e-14)


def test_nothing_moves_where_nothing_moved() -> None:
    new, _ = pair(torch.bfloat16)
    assert same_bits(extrapolate_tensor(new, new.clone(), 0.7), new)


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_has_the_same_bits(dtype: torch.dtype) -> None:
    new, old = pair(dtype)
    expected = extrapolate_tensor(new, old, 0.3)
    parameter = torch.nn.Parameter(new.clone())
    extrapolate_(parameter, old, 0.3)
    assert same_bits(parameter.detach(), expected)
    assert parameter.requires_grad
    assert parameter.grad_fn is None


@pytest.mark.parametrize("elements", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, elements: int, threads: int) -> None:
    monkeypatch.setattr(state_dicts, "_CPU_CHUNK", 64)
    monkeypatch.setattr(state_dicts, "_CPU_CHUNK_THREADED", 63)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        new, old = pair(torch.bfloat16, (elements,))
        assert same_bits(extrapolate_tensor(new, old, 0.3), extrapolate_as_pinned(new, old, 0.3))
    finally:
        torch.set_num_threads(before)


def test_a_tensor_larger_than_a_piece() -> None:
    new, old = pair(torch.float32, (state_dicts._CPU_CHUNK + 5,))
    assert same_bits(extrapolate_tensor(new, old, 0.3), extrapolate_as_pinned(new, old, 0.3))


@pytest.mark.parametrize("transposed", ["new", "old", "both"])
def test_memory_layouts(transposed: str) -> None:
    new, old = pair(torch.float32)
    expected = extrapolate_as_pinned(new, old, 0.3)
    if transposed in ("new", "both"):
        new = new.t().contiguous().t()
    if transposed in ("old", "both"):
        old = old.t().contiguous().t()
    assert same_bits(extrapolate_tensor(new, old, 0.3), expected)
    extrapolate_(new, old, 0.3)
    assert same_bits(new, expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    new, old = torch.full(shape, 2.0), torch.full(shape, 1.0)
    result = extrapolate({"w": new}, {"w": old}, 0.5)["w"]
    assert torch.equal(result, torch.full(shape, 2.5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_alpha_zero_is_an_exact_copy(dtype: torch.dtype) -> None:
    new = torch.tensor([-0.0, 0.0, 1.0, math.inf, -math.inf, torch.finfo(dtype).tiny], dtype=dtype)
    # new + 0 * (new - old) would be nan or +0.0 for some of these.
    old = torch.tensor([0.0, 0.0, torch.finfo(dtype).max, 1.0, 1.0, 1.0], dtype=dtype)
    result = extrapolate({"w": new}, {"w": old}, 0)["w"]
    assert same_bits(result, new)
    assert result.data_ptr() != new.data_ptr()
    in_place = new.clone()
    extrapolate_(in_place, old, 0.0)
    assert same_bits(in_place, new)


def test_integers_and_bools_are_those_of_new() -> None:
    new = {"steps": torch.tensor([7, 8]), "mask": torch.tensor([True, False]), "w": torch.tensor([1.0])}
    old = {"steps": torch.tensor([1, 2]), "mask": torch.tensor([False, False]), "w": torch.tensor([0.0])}
    result = extrapolate(new, old, 0.5)
    assert result["steps"].tolist() == [7, 8]
    assert result["mask"].tolist() == [True, False]
    assert result["steps"].data_ptr() != new["steps"].data_ptr()
    assert list(difference(new, old)) == ["w"]


def test_inputs_are_left_alone_and_order_is_kept() -> None:
    new, old = ({"b": t.clone(), "a": t.clone()} for t in pair(torch.float32))
    before = copy.deepcopy((new, old))
    result = extrapolate(new, {"a": old["a"], "b": old["b"]}, 0.3)
    assert list(result) == ["b", "a"]
    for name in new:
        assert same_bits(new[name], before[0][name])
        assert same_bits(old[name], before[1][name])
        assert not result[name].requires_grad


def test_a_module_with_tied_weights() -> None:
    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
        module["head"].weight = module["embed"].weight
        return module

    new, old = model(0).state_dict(), model(1).state_dict()
    result = extrapolate(new, old, 0.3)
    assert result["embed.weight"].data_ptr() == result["head.weight"].data_ptr()
    assert same_bits(result["embed.weight"], extrapolate_as_pinned(new["embed.weight"], old["embed.weight"], 0.3))
    assert list(difference(new, old)) == ["embed.weight"]

    for apart, (a, b) in {
        "old": (new, {name: tensor.clone() for name, tensor in old.items()}),
        "new": ({name: tensor.clone() for name, tensor in new.items()}, old),
    }.items():
        with pytest.raises(ValueError, match=rf"'head.weight' and 'embed.weight' are one tensor .* two in `{apart}`"):
            extrapolate(a, b, 0.3)


def test_views_of_one_storage_are_not_tied() -> None:
    """What safetensors maps from one file shares a storage; the tensors are different ones all the same."""
    flat = torch.arange(6.0)
    new = {"a": flat[:3], "b": flat[3:], "beginning of a": flat[:2]}
    old = {"a": torch.zeros(3), "b": torch.zeros(3), "beginning of a": torch.zeros(2)}
    result = extrapolate(new, old, 1.0)
    assert result["beginning of a"].tolist() == [0.0, 2.0]
    assert result["a"].tolist() == [0.0, 2.0, 4.0]
    assert result["b"].tolist() == [6.0, 8.0, 10.0]


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        ({"a": W, "b": W.clone()}, {"a": W}, "'b' is in `new` but not in `old`"),
        ({"a": W}, {"a": W, "b": W.clone()}, "'b' is in `old` but not in `new`"),
        ({"a": W, "b": W.clone()}, {"a": W, "b": torch.ones(3, 2)}, r"'b' has shape \(2, 3\) in `new` and \(3, 2\)"),
        ({"a": W}, {"a": W.double()}, "'a' has dtype torch.float32 in `new` and torch.float64 in `old`"),
        ({"a": W.to(torch.complex64)}, {"a": W.to(torch.complex64)}, "'a' has dtype torch.complex64"),
        ({"a": W.to(torch.float8_e4m3fn)}, {"a": W.to(torch.float8_e4m3fn)}, "'a' has dtype torch.float8_e4m3fn"),
    ],
)
def test_state_dicts_that_do_not_fit(new: dict[str, Tensor], old: dict[str, Tensor], message: str) -> None:
    for function in (lambda: extrapolate(new, old, 0.3), lambda: extrapolate(new, old, 0)):
        with pytest.raises(ValueError, match=message):
            function()
    with pytest.raises(ValueError, match=message.replace("`new`", "`a`").replace("`old`", "`b`")):
        difference(new, old)


def test_tensors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="shape"):
        extrapolate_(torch.ones(2), torch.ones(3), 0.3)
    with pytest.raises(ValueError, match="dtype"):
        extrapolate_tensor(torch.ones(2), torch.ones(2).bfloat16(), 0.3)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, -0.1, "much", None])
def test_alphas_that_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"`alpha` is .* has to be a finite number of at least 0"):
        extrapolate({"w": W}, {"w": W}, alpha)
    with pytest.raises(ValueError, match=r"`extrapolation_alpha\[1\]`"):
        check_alpha(alpha, "extrapolation_alpha[1]")


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_overflow_names_the_tensor(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    new = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1.0, largest], dtype=dtype)}
    old = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1.0, -largest], dtype=dtype)}
    with pytest.raises(ValueError, match=f"^'b': .* leaves the range of {dtype}"):
        extrapolate(new, old, 0.5)
    # Just below it is fine.
    almost = {"b": torch.tensor([largest], dtype=dtype)}
    assert same_bits(extrapolate(almost, almost, 0.5)["b"], almost["b"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_infinities_stay(dtype: torch.dtype) -> None:
    """Masks that are stored as buffers."""
    new = torch.tensor([-math.inf, math.inf, 1.0], dtype=dtype)
    old = torch.tensor([-math.inf, math.inf, 0.0], dtype=dtype)
    expected = torch.tensor([-math.inf, math.inf, 1.5], dtype=dtype)
    assert same_bits(extrapolate_tensor(new, old, 0.5), expected)
    assert extrapolate_exactly(new, old, 0.5).tolist() == expected.tolist()
    assert extrapolate_(new.clone(), old, 0.5) == 1.0
    assert difference({"mask": new}, {"mask": old})["mask"].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("new", "old"), [(math.inf, 1.0), (1.0, -math.inf), (math.inf, -math.inf), (math.nan, 1.0), (math.nan, math.nan)]
)
def test_what_is_not_finite_is_named(new: float, old: float) -> None:
    states = (
        {"good": torch.ones(2), "bad": torch.tensor([2.0, new])},
        {
            "good": torch.ones(2),
            "bad": torch.tensor([1.0, old]),
        },
    )
    with pytest.raises(ValueError, match=f"^'bad': an element is {new} in `new` and {old} in `old`"):
        extrapolate(*states, alpha=0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_difference(dtype: torch.dtype) -> None:
    new, old = pair(dtype)
    result = difference({"w": new}, {"w": old})["w"]
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # alpha 1 goes on by exactly the difference.
    torch.testing.assert_close(
        result.double(), extrapolate_exactly(new, old, 1.0) - new.double(), rtol=1e-6, atol=1e-7
    )
    assert result.data_ptr() != new.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_in_place_returns_the_squared_norm_of_the_momentum(dtype: torch.dtype, alpha: float) -> None:
    a, b = pair(dtype)
    delta = a.double() - b.double()
    assert extrapolate_(a.clone(), b, alpha) == pytest.approx(dot_exactly(delta, delta), rel=1e-5)


def test_cosine() -> None:
    assert cosine(1.0, 1.0, 2.0) == pytest.approx(math.sqrt(0.5))
    assert cosine(0.0, 0.0, 1.0) == 0.0
    assert cosine(1e-200, 1e-200, 1e-200) == pytest.approx(1.0)


def test_the_module_needs_torch_only() -> None:
    nodes = list(ast.walk(ast.parse(Path(state_dicts.__file__).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gpu_gives_the_same_bits(dtype: torch.dtype) -> None:
    new, old = pair(dtype, (1000, 77))
    expected = extrapolate_tensor(new, old, 0.3)
    for other in (old, old.cuda()):
        result = extrapolate({"w": new.cuda()}, {"w": other}, 0.3)["w"]
        assert result.is_cuda
        assert same_bits(result.cpu(), expected)
