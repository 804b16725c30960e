"""Rotation before pruning (DenoiseRotator, https://arxiv.org/abs/2505.23049): concentrate importance in few weights, then prune.

Between `v_proj` and `o_proj` every head's values may be turned by any orthogonal matrix, `o_proj R R^T v_proj`: attention only
averages values over tokens, so the model's function stays what it is, and both factors merge into weights. Inference pays
nothing. The rotation is chosen so that the salience of the turned weights is concentrated, which is measured by its entropy.

With `G = X^T X` of a layer's inputs, a turned weight's salience is, as Wanda's score squared,

- of `o_proj`, whose inputs turn: `S_ij = (W R)_ij^2 (R^T G R)_jj`; a row's weights within one head compete;
- of `v_proj`, whose outputs turn: `S_ij = (R^T W)_ij^2 G_jj`; a column's weights within one head compete. `G_jj` is one factor
  of the whole column and cancels when the column is normalised, so no statistic of `v_proj`'s inputs is needed.

Legend: `K` KV heads, `Q` query heads of one KV head, `d` head_dim, `O` out_features of `o_proj`, `I` in_features of `v_proj`,
`N` tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.models import BlockInputs, block_inputs, block_linears, find_decoder, on_device
from losa.system import distributed
from losa.system.progress import progress

TOLERANCE = 1e-4  # of the attention's output, relative; float32 leaves about 1e-6, a norm or a gate in between several percent


def input_salience(W_Od: Tensor, G_dd: Tensor, R_dd: Tensor) -> Tensor:
    """`(W R)_ij^2 (R^T G R)_jj`, `(..., O, d)`: salience after the inputs are turned. Leading dimensions are broadcast."""
    energy_d = (R_dd * (G_dd @ R_dd)).sum(-2)
    return (W_Od @ R_dd).square() * energy_d[..., None, :]


def output_salience(W_dI: Tensor, R_dd: Tensor) -> Tensor:
    """`(R^T W)_ij^2`, `(..., d, I)`: salience after the outputs are turned, up to the factor `G_jj` of each column."""
    return (R_dd.mT @ W_dI).square()


def entropy(S: Tensor, dim: int) -> Tensor:
    """`-sum p ln p` of `p = S / sum S` along `dim`, in nats; 0 where all of `S` is 0.

    Its gradient is finite also where some salience is 0.
    """
    total = S.sum(dim, keepdim=True)
    p = S / torch.where(total > 0, total, 1.0)
    return -(p * (p + torch.finfo(p.dtype).tiny).log()).sum(dim)


def orthogonal(A_dd: Tensor) -> Tensor:
    """The `Q` of `A = Q U` whose `U` has a positive diagonal: smooth in any invertible `A`, and the identity at the identity."""
    Q_dd, U_dd = torch.linalg.qr(A_dd)
    signs_d = torch.where(torch.diagonal(U_dd, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q_dd.dtype)
    turned_dd: Tensor = Q_dd * signs_d[..., None, :]
    return turned_dd


def objective(R_Kdd: Tensor, W_o_KQOd: Tensor, G_KQdd: Tensor, W_v_KdI: Tensor) -> Tensor:
    """What a rotation is chosen for: the entropies of all rows of `o_proj`, in each query head, and of all columns of `v_proj`.

    Args:
        R_Kdd: orthogonal matrices.
        W_o_KQOd: `o_proj`, each query head's slice.
        G_KQdd: `X^T X` of the inputs of each slice.
        W_v_KdI: `v_proj`, each KV head's rows.

    Returns:
        `(K,)` sums of `Q O + I` entropies each; KV heads do not depend on each other.
    """
    of_rows_KQO = entropy(input_salience(W_o_KQOd, G_KQdd, R_Kdd[:, None]), -1)
    return of_rows_KQO.sum((1, 2)) + entropy(output_salience(W_v_KdI, R_Kdd), -2).sum(-1)


def learn_rotations(
    W_o_KQOd: Tensor, G_KQdd: Tensor, W_v_KdI: Tensor, steps: int = 100, lr: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises `objective` over `R = orthogonal(A)` by Adam, from the identity, all KV heads at once. Uses no random numbers.

    Each head keeps the best rotation that it met, so no entropy ever rises. Shapes as in `objective`, float32 or float64.

    Returns:
        `R` `(K, d, d)`, float64; the objective before and after, `(K,)`.

    Raises:
        ValueError: weights or statistics are not finite.
    """
    if not all(torch.isfinite(tensor).all() for tensor in (W_o_KQOd, G_KQdd, W_v_KdI)):
        raise ValueError("weights or activations are not finite; check the model's weights and dtype")
    # What competes has unit size: it changes no entropy, and nothing is too small to square.
    W_o_KQOd, W_v_KdI = nn.functional.normalize(W_o_KQOd, dim=-1), nn.functional.normalize(W_v_KdI, dim=-2)
    trace_KQ = torch.diagonal(G_KQdd, dim1=-2, dim2=-1).sum(-1)
    G_KQdd = G_KQdd / torch.where(trace_KQ > 0, trace_KQ, 1.0)[..., None, None]
    A_Kdd = torch.eye(W_v_KdI.shape[1]).to(W_v_KdI).repeat(len(W_v_KdI), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([A_Kdd], lr=lr)
    best_Kdd, values = A_Kdd.detach().clone(), []
    best_K = torch.full_like(trace_KQ[:, 0], torch.inf)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            value_K = objective(orthogonal(A_Kdd), W_o_KQOd, G_KQdd, W_v_KdI)
        values.append(value_K.detach())
        best_Kdd = torch.where((values[-1] < best_K)[:, None, None], A_Kdd.detach(), best_Kdd)
        best_K = torch.minimum(values[-1], best_K)
        if step < steps:
            optimizer.zero_grad()
            value_K.backward(torch.ones_like(value_K))
            optimizer.step()
    return orthogonal(best_Kdd.double()), values[0], best_K


@dataclass(frozen=True)
class ValuePath:
    """An attention module and its two layers that values pass, and how these are cut into heads."""

    attention: nn.Module
    v_proj: nn.Linear
    o_proj: nn.Linear
    kv_heads: int
    group: int  # query heads of one KV head
    head_dim: int


def find_value_path(block: nn.Module, name: str) -> ValuePath:
    """Finds the attention of a block by structure: one module with `v_proj` and `o_proj`, both plain linear layers.

    Args:
        name: what to call the block in a message.

    Raises:
        ValueError: there is no such module, or several, or its layers do not consist of whole heads.
    """
    found = [module for module in block.modules() if {"v_proj", "o_proj"} <= dict(module.named_children()).keys()]
    if len(found) != 1:
        linears = ", ".join(block_linears(block)) or "no linear layers"
        raise ValueError(
            f"rotation needs one attention module with v_proj and o_proj in every block, {name} has {len(found)} among {linears}"
        )
    attention = found[0]
    v_proj, o_proj = attention.v_proj, attention.o_proj
    for layer in (v_proj, o_proj):
        if type(layer) is not nn.Linear:
            raise ValueError(f"rotation needs v_proj and o_proj to be plain nn.Linear, {name} has a {type(layer).__name__}")
    assert isinstance(v_proj, nn.Linear) and isinstance(o_proj, nn.Linear)
    head_dim = _head_dim(attention, o_proj)
    sizes = f"v_proj.out_features {v_proj.out_features}, o_proj.in_features {o_proj.in_features}, head_dim {head_dim}"
    if not head_dim or v_proj.out_features % head_dim or o_proj.in_features % v_proj.out_features:
        raise ValueError(f"rotation needs whole heads, and a multiple of the KV heads as query heads; {name} has {sizes}")
    group = o_proj.in_features // v_proj.out_features
    return ValuePath(attention, v_proj, o_proj, v_proj.out_features // head_dim, group, head_dim)


def _head_dim(attention: nn.Module, o_proj: nn.Linear) -> int:
    """What the module says, or the share of one of the configuration's heads in `o_proj`'s inputs; 0 where neither is known."""
    head_dim = getattr(attention, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    return o_proj.in_features // heads if isinstance(heads, int) and heads > 0 and o_proj.in_features % heads == 0 else 0


def find_value_paths(model: PreTrainedModel) -> list[ValuePath]:
    """Of all blocks, before any weight is touched.

    Raises:
        ValueError: see `find_value_path`; or blocks share weights.
    """
    decoder = find_decoder(model)
    paths = [find_value_path(block, f"{decoder.name}.{index}") for index, block in enumerate(decoder.blocks)]
    if len({id(layer.weight) for path in paths for layer in (path.v_proj, path.o_proj)}) < 2 * len(paths):
        raise ValueError(f"rotation needs weights of its own in every block, {type(model).__name__} shares some between blocks")
    return paths


@dataclass
class _Observed:
    """What one pass of the calibration sequences tells about a block's values."""

    path: ValuePath
    G_KQdd: Tensor | None = None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of the attention module, on the first batch

    def advance(self, block: nn.Module, index: int, stream: BlockInputs) -> None:
        """Advances the stream through the block, collecting; sums over processes.

        Raises:
            ValueError: no token reached the attention.
        """
        handles = [
            self.path.attention.register_forward_pre_hook(self._note_call, with_kwargs=True),
            self.path.o_proj.register_forward_pre_hook(self._add),
        ]
        try:
            stream.advance(block, index)
        finally:
            for handle in handles:
                handle.remove()
        if self.G_KQdd is None or self.call is None:
            raise ValueError(f"no calibration token reached the attention of block {index}; it cannot be rotated")
        distributed.sum_(self.G_KQdd)

    def _note_call(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is None:
            self.call = args, kwargs

    def _add(self, o_proj: nn.Module, args: tuple[Tensor, ...]) -> None:
        """`G += X^T X` of each query head's inputs; correlations between heads play no role."""
        path = self.path
        X_NKQd = args[0].flatten(0, -2).unflatten(-1, (path.kv_heads, path.group, path.head_dim))
        X_KQNd = X_NKQd.to(_work_dtype(args[0].dtype)).permute(1, 2, 0, 3)
        G_KQdd = X_KQNd.mT @ X_KQNd
        self.G_KQdd = G_KQdd if self.G_KQdd is None else self.G_KQdd.add_(G_KQdd)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 where the model is."""
    return torch.promote_types(dtype, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a nested argument in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (tuple, list) else value


def _heads(path: ValuePath) -> tuple[Tensor, Tensor]:
    """`o_proj` as `(K, Q, O, d)` and `v_proj` as `(K, d, I)`, copies in the dtype of the work."""
    dtype = _work_dtype(path.o_proj.weight.dtype)
    W_OKQd = path.o_proj.weight.detach().to(dtype).unflatten(1, (path.kv_heads, path.group, path.head_dim))
    W_KdI = path.v_proj.weight.detach().to(dtype).unflatten(0, (path.kv_heads, path.head_dim))
    return W_OKQd.permute(1, 2, 0, 3).contiguous(), W_KdI


def merge(path: ValuePath, R_Kdd: Tensor) -> None:
    """`o_proj <- o_proj R`, `v_proj <- R^T v_proj` and its bias, head by head; float32 or better, rounded once."""
    W_o_KQOd, W_v_KdI = _heads(path)
    R_Kdd = R_Kdd.to(W_v_KdI)
    turned_KQOd = W_o_KQOd @ R_Kdd[:, None]
    with torch.no_grad():
        path.o_proj.weight.copy_(turned_KQOd.permute(2, 0, 1, 3).flatten(1))
        path.v_proj.weight.copy_((R_Kdd.mT @ W_v_KdI).flatten(0, 1))
        if path.v_proj.bias is not None:
            b_Kd = path.v_proj.bias.to(R_Kdd.dtype).unflatten(0, (path.kv_heads, path.head_dim))
            path.v_proj.bias.copy_((R_Kdd.mT @ b_Kd[..., None]).flatten())


def _change(path: ValuePath, R_Kdd: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """By how much the rotation would change the attention's output, relative to it; on a copy, without the weights' rounding."""
    dtype = _work_dtype(path.o_proj.weight.dtype)
    attention = copy.deepcopy(path.attention).to(dtype).eval()
    args, kwargs = _cast(call[0], dtype), _cast(call[1], dtype)

    def output() -> Tensor:
        answer = attention(*args, **kwargs)
        answer = answer[0] if isinstance(answer, tuple) else answer
        assert isinstance(answer, Tensor)
        return answer.double()

    before = output()
    merge(find_value_path(attention, "a copy"), R_Kdd)
    change: float = ((output() - before).norm() / before.norm().clamp_min(torch.finfo(dtype).tiny)).item()
    return change


def _rotate(path: ValuePath, name: str, seen: _Observed, steps: int, lr: float) -> dict[str, float]:
    """Learns and merges the rotations of one block, after a trial that its function stays.

    Raises:
        ValueError: it would not.
    """
    assert seen.G_KQdd is not None and seen.call is not None
    W_o_KQOd, W_v_KdI = _heads(path)
    try:
        R_Kdd, before_K, after_K = learn_rotations(W_o_KQOd, seen.G_KQdd, W_v_KdI, steps, lr)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    distributed.send_(R_Kdd, 0)  # the same everywhere, also where processors round differently
    distributed.send_(before_K, 0)
    distributed.send_(after_K, 0)
    change = distributed.max_(torch.tensor(_change(path, R_Kdd, seen.call), dtype=torch.float64, device=R_Kdd.device)).item()
    if not change <= TOLERANCE:
        raise ValueError(
            f"rotating the values of {name} changes the output of its attention by {change:.1e} of its size; "
            f"something between v_proj and o_proj, such as a norm or a gate, forbids it"
        )
    merge(path, R_Kdd)
    count = len(R_Kdd) * (path.group * path.o_proj.out_features + path.v_proj.in_features)
    return {"entropy_before": before_K.sum().item() / count, "entropy_after": after_K.sum().item() / count}


@torch.no_grad()
def rotate_values(
    model: PreTrainedModel,
    ids_ST: Tensor,
    *,
    steps: int = 100,
    lr: float = 0.01,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> list[dict[str, float]]:
    """Turns the values of every head of every block so that their weights' salience is concentrated. The function stays.

    One walk over the dense model: a block's statistics are collected while the sequences pass it, its rotations are learned
    and merged, and all is forgotten but the hidden states. These are what the block put out before, which is what it puts out now
    but for rounding. Nothing is random: the same model and sequences give the same weights.

    Args:
        model: dense, without adapters, in eval mode; changed in place.
        ids_ST: calibration sequences; of several processes, each takes a part.
        steps: of Adam; 0 leaves the model as it is.
        lr: Adam's learning rate.
        device: where blocks run, if not where the model is.

    Returns:
        For each block `entropy_before` and `entropy_after`, in nats: the mean of all entropies in `objective`, at most
        `ln head_dim`.

    Raises:
        ValueError: an attention of another structure, before any weight is changed; values that are not finite.
        RuntimeError: the function would change. This block and the following ones are then as they were.
    """
    paths, decoder = find_value_paths(model), find_decoder(model)
    stream = block_inputs(model, distributed.part(ids_ST), batch_size)
    entropies = []
    blocks: Sequence[nn.Module] = list(decoder.blocks)
    for index, block in enumerate(progress(blocks, "rotation")):
        with on_device(block, device):
            seen = _Observed(paths[index])
            seen.advance(block, index, stream)
            entropies.append(_rotate(paths[index], f"{decoder.name}.{index}", seen, steps, lr))
    return entropies
