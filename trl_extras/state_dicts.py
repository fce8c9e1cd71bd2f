"""The extrapolation step of *accelerated* preference optimization, on tensors and on state dicts; pure, torch only.

Source: Accelerated Preference Optimization (arXiv 2410.06293), equation 3.6,
`pi_{t+1} ∝ pihat_{t+1} * (pihat_{t+1} / pihat_t)^alpha`. For a softmax-linear policy that is exactly momentum in
parameter space; on a language model the paper (section 5.2) carries it out on the weights:

    theta_{t+1} = thetahat_{t+1} + alpha * (thetahat_{t+1} - thetahat_t)

| paper | here |
|---|---|
| thetahat_{t+1}, what round t has trained | `new` |
| thetahat_t, what round t - 1 had trained (before its own extrapolation) | `old` |
| thetahat_{t+1} - thetahat_t, the momentum | `difference(new, old)` |
| alpha | `alpha` |
| theta_{t+1}, the next policy and reference | what `extrapolate` returns |

The paper does not say in which precision; that is our choice. Each element is computed in float32 (float64 for float64
tensors) as

    acc = new.to(float32); delta = acc - old.to(float32); out = acc + alpha * delta; out.to(new.dtype)

with alpha rounded to that dtype, and the difference, the product and the sum each rounded once: no fused multiply-add,
so that the bits are the same on every device, in place or not. In bfloat16 arithmetic the product, and the difference
where weights have moved far, would be rounded to 8 bits too; here only the result is. Nothing helps against that last
rounding, nor against those of `new` and `old`: a step below half a unit in the last place (0.2 to 0.4 % of a weight)
is lost in bfloat16 weights. Keep float32 weights where such steps matter.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


# Elements worked on at a time. On a CPU the float32 temporaries of a piece stay in the cache. Where torch may use
# several threads, a piece also stays below the size (2^15) at which it does: waiting for each other after every short
# operation has cost a factor of 50 on a busy machine. On an accelerator a piece has to be large enough to fill it.
_CPU_CHUNK = 1 << 17
_CPU_CHUNK_THREADED = (1 << 15) - 64
_DEVICE_CHUNK = 1 << 25


def check_alpha(alpha: float, field: str = "alpha") -> float:
    """
    Return `alpha` as a float if it can be used: finite and not negative.

    The paper has 0 <= alpha < 1; 1 or more is let through, because at a fixed number of rounds nothing in the step
    needs less (our choice).

    Raises:
        ValueError: with the name of the `field`, what it got and what it wants.
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(
            f"`{field}` is {alpha!r}, but has to be a finite number of at least 0: use 0 for no extrapolation, or a "
            "value between 0 and 1 (the paper's is 0.3)."
        )
    return value


def extrapolate_tensor(new: Tensor, old: Tensor, alpha: float) -> Tensor:
    """
    `new + alpha * (new - old)` of one tensor (the paper's equation 3.6 on weights; the arithmetic is our choice and
    pinned in this module's docstring).

    Args:
        new: thetahat_{t+1}, any shape.
        old: thetahat_t, same shape and dtype; may be on another device.
        alpha: finite and not negative. 0 gives an exact copy of `new`, signed zeros included.

    Returns:
        A new tensor with the shape, dtype and device of `new`; for integers and bools a copy of `new`. Besides it,
        only two pieces of a bounded size are allocated.

    Where `new` equals `old` the result is `new`, infinities included (masks that are stored as buffers).

    Raises:
        ValueError: `alpha` cannot be used; shape or dtype differ; the tensors are complex or 8-bit floats; another
            element of the result is not finite: it overflowed the dtype, or `new` or `old` is a nan or an infinity.
    """
    out = new.detach().clone()
    extrapolate_(out, old, alpha)
    return out


@torch.no_grad()
def extrapolate_(new: Tensor, old: Tensor, alpha: float) -> float:
    """
    Write `extrapolate_tensor(new, old, alpha)` into `new`, with the same bits; a parameter that requires grad is fine.

    Returns:
        The squared norm of the momentum `new - old`, which costs next to nothing here, to about six digits (summed in
        float32 inside a piece). 0.0 for integers and bools.

    Raises:
        ValueError: as `extrapolate_tensor`; the beginning of `new` may have been written already.
    """
    alpha = check_alpha(alpha)
    _check_tensor(new, old, "new", "old", name=None)
    if not new.is_floating_point() or new.numel() == 0:
        return 0.0
    if not new.is_contiguous():
        flat = new.contiguous()
        squared_momentum = extrapolate_(flat, old, alpha)
        new.copy_(flat)
        return squared_momentum

    dtype = _accumulation_dtype(new)
    largest = torch.finfo(new.dtype).max
    flat_new, flat_old = new.detach().view(-1), old.detach().reshape(-1)
    size = _chunk_size(new)
    acc_buffer = torch.empty(min(size, new.numel()), dtype=dtype, device=new.device)
    delta_buffer = torch.empty_like(acc_buffer)
    squared_momentum = 0.0
    for start in range(0, new.numel(), size):
        new_piece, old_piece = flat_new[start : start + size], flat_old[start : start + size]
        acc, delta = acc_buffer[: len(new_piece)], delta_buffer[: len(new_piece)]
        acc.copy_(new_piece)
        delta.copy_(old_piece)
        torch.sub(acc, delta, out=delta)
        norm = float(torch.linalg.vector_norm(delta))
        if math.isnan(norm):
            # An infinity minus itself, if not worse.
            delta.masked_fill_(new_piece == old_piece.to(new.device), 0.0)
            norm = float(torch.linalg.vector_norm(delta))
        squared_momentum += norm**2
        if alpha == 0:
            continue  # adding 0 would turn a negative zero into a positive one
        delta.mul_(alpha)
        # Not add_(delta, alpha=alpha): that may be fused, which rounds once where the product and the sum round twice.
        acc.add_(delta)
        # The extremes tell in one pass that all is well; only if they do not is it worth asking element by element.
        low, high = torch.aminmax(acc)
        if not (bool(low >= -largest) and bool(high <= largest)):
            _check_finite(acc.to(new.dtype), new_piece, old_piece.to(new.device), alpha)
        new_piece.copy_(acc)
    return squared_momentum


def _check_finite(result: Tensor, new: Tensor, old: Tensor, alpha: float) -> None:
    """Raise a ValueError for an element that is not finite, unless `new` and `old` agree there."""
    wrong = ~result.isfinite() & (new != old)
    if not wrong.any():
        return
    at = int(wrong.nonzero()[0])
    if bool(new[at].isfinite()) and bool(old[at].isfinite()):
        raise ValueError(_overflow(new, alpha))
    raise ValueError(
        f"an element is {new[at].item()} in `new` and {old[at].item()} in `old`, which cannot be extrapolated: use "
        "checkpoints of finite weights."
    )


def extrapolate(new: Mapping[str, Tensor], old: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """
    theta_{t+1} from the state dicts of thetahat_{t+1} and thetahat_t (the paper's equation 3.6, on the weights as in
    its section 5.2): `new + alpha * (new - old)`, tensor by tensor. Needs no data and no training.

    Meant for full, unquantised weights. For LoRA this is not the step on the weights: extrapolating A and B by
    themselves gives another product B A. Nor is it for packed integers or their scales.

    Args:
        new: state dict of thetahat_{t+1}.
        old: state dict of thetahat_t: same names, shapes, dtypes and ties; may be on another device.
        alpha: the extrapolation parameter, finite and not negative; the paper uses 0.3. 0 gives exact copies of `new`.

    Returns:
        New tensors, in the order of `new`, with its dtypes and on its devices, sharing nothing with the inputs. Float
        tensors are computed as pinned in this module's docstring; integer and bool tensors are copies of `new`. Names
        that are one tensor in the inputs (tied embeddings) are one tensor in the result; tensors that merely overlap
        come out apart.

    Raises:
        ValueError: before any arithmetic, if `alpha` is negative or not finite, and naming the first tensor that is in
            one state dict only, or whose shape, dtype or ties differ, or that is complex or an 8-bit float. During
            it, naming the tensor, if finite inputs overflow the dtype (float16: above 65504), or one of two that
            differ is a nan or an infinity.

    Example:

    ```python
    >>> new = {"w": torch.tensor([2.0])}
    >>> old = {"w": torch.tensor([1.0])}
    >>> extrapolate(new, old, alpha=0.5)
    {'w': tensor([2.5000])}
    ```
    """
    alpha = check_alpha(alpha)
    check_compatible(new, old)
    done: dict[tuple[object, ...], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in new.items():
        key = _identity(name, tensor)
        if key not in done:
            try:
                done[key] = extrapolate_tensor(tensor, old[name], alpha)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        result[name] = done[key]
    return result


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    `a - b` of two state dicts in float32 (float64 for float64 tensors); of `new` and `old`, the paper's momentum.

    Args:
        a, b: same names, shapes, dtypes and ties; `b` may be on another device.

    Returns:
        The differences of the float tensors, on `a`'s devices, in its order. Integer and bool tensors are left out;
        tied tensors appear once, under their first name, so that a norm over the result counts each weight once.

    Raises:
        ValueError: as `extrapolate`, naming the first tensor that does not fit.
    """
    check_compatible(a, b, "a", "b")
    seen: set[tuple[object, ...]] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in a.items():
        key = _identity(name, tensor)
        if key in seen or not tensor.is_floating_point():
            continue
        seen.add(key)
        dtype = _accumulation_dtype(tensor)
        subtrahend = b[name].detach().to(device=tensor.device)
        minuend = tensor.detach().to(dtype, copy=True).sub_(subtrahend.to(dtype))
        # Equal infinities are no difference.
        result[name] = minuend.masked_fill_(minuend.isnan() & (tensor.detach() == subtrahend), 0.0)
    return result


def cosine(dot_ab: float, squared_norm_a: float, squared_norm_b: float) -> float:
    """
    The cosine between two vectors from sums over their tensors; 0.0 where either is zero,
    which has no angle.
    """
    if squared_norm_a == 0 or squared_norm_b == 0:
        return 0.0
    # Two roots, not the root of the product, which can over- or underflow where the cosine does not.
    return dot_ab / math.sqrt(squared_norm_a) / math.sqrt(squared_norm_b)


def check_compatible(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], new_name: str = "new", old_name: str = "old"
) -> None:
    """
    Check that two state dicts have the same names, shapes, dtypes and ties, and dtypes that can be extrapolated.

    Raises:
        ValueError: naming the first tensor that does not fit; `new_name` and `old_name` are what to call the two.
    """
    for here, there, here_name, there_name in ((new, old, new_name, old_name), (old, new, old_name, new_name)):
        for name in here:
            if name not in there:
                raise ValueError(
                    f"{name!r} is in `{here_name}` but not in `{there_name}`: pass two states of the same model."
                )
    for name, tensor in new.items():
        _check_tensor(tensor, old[name], new_name, old_name, name)
    ties_new, ties_old = _first_of_ties(new), _first_of_ties(old)
    for name in new:
        if ties_new[name] != ties_old[name]:
            tied, apart = (new_name, old_name) if ties_new[name] != name else (old_name, new_name)
            partner = ties_new[name] if tied == new_name else ties_old[name]
            raise ValueError(
                f"{name!r} and {partner!r} are one tensor (tied) in `{tied}` but two in `{apart}`: tie them in both "
                "or in neither (copy.deepcopy(model.state_dict()) keeps ties, cloning each tensor does not)."
            )


def _first_of_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the first name of its tensor: its own, unless it is tied to an earlier one."""
    order = {name: index for index, name in enumerate(sorted(tensors))}
    first: dict[tuple[object, ...], str] = {}
    # Sorted, so that two state dicts in different orders agree on what the first name of a group is.
    for name in order:
        first.setdefault(_identity(name, tensors[name]), name)
    return {name: first[_identity(name, tensors[name])] for name in tensors}


def _identity(name: str, tensor: Tensor) -> tuple[object, ...]:
    """
    Equal for two names exactly where they are the same view of the same memory. Sharing a storage is not enough: all
    tensors that safetensors maps from one file do that.
    """
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_tensor(new: Tensor, old: Tensor, new_name: str, old_name: str, name: str | None) -> None:
    what = "the tensor" if name is None else repr(name)
    if new.shape != old.shape:
        raise ValueError(
            f"{what} has shape {tuple(new.shape)} in `{new_name}` and {tuple(old.shape)} in `{old_name}`: pass two "
            "states of the same model (was the vocabulary resized in one of them?)."
        )
    if new.dtype != old.dtype:
        raise ValueError(
            f"{what} has dtype {new.dtype} in `{new_name}` and {old.dtype} in `{old_name}`: load both in one dtype."
        )
    if new.is_complex() or (new.is_floating_point() and new.element_size() < 2):
        raise ValueError(
            f"{what} has dtype {new.dtype}, which is not extrapolated (8-bit floats mean nothing without their scales)"
            ": use weights in float16, bfloat16, float32 or float64."
        )


def _overflow(new: Tensor, alpha: float) -> str:
    return (
        f"the extrapolation with alpha {alpha} leaves the range of {new.dtype} (above {torch.finfo(new.dtype).max:g}) "
        "though both inputs are finite: use a smaller alpha, or bfloat16 or float32 weights."
    )


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk_size(tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        return _DEVICE_CHUNK
    return _CPU_CHUNK if torch.get_num_threads() == 1 else _CPU_CHUNK_THREADED
