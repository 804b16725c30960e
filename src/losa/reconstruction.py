"""Block-wise reconstruction: the surviving weights of one block at a time learn to put out what the dense block puts out.

Right after a block is pruned: its inputs are what the sparse blocks before it make of the calibration text, its targets what the
dense model's block makes of its own. Adam minimises the reconstruction error (LoSA section 3.3) over the weights that pruning
left; masks stay. A whole block holds non-linear parts, which single matrices do not, and that is what makes it worth more than
another least-squares solve (EBFT, https://arxiv.org/abs/2402.12419; https://arxiv.org/abs/2510.14444).
Only one block's float32 weights, gradients and moments are alive at a time: 16 bytes a weight of one block.

Legend: `S` sequences, `T` tokens, `H` hidden.
"""

import torch
from torch import Tensor

from losa.adapter import whole_weights
from losa.config import ReconstructConfig
from losa.system import distributed
from losa.walk import Stop, Visit

WARMUP = 0.1  # of the updates; the learning rate then falls to zero in a straight line


def reconstruction_visit(config: ReconstructConfig, seed: int) -> Visit:
    """Trains each block's surviving weights on the sequences that both streams have.

    Differs from EBFT: the error is relative to each channel's energy, so that the few channels with outliers do not drown the
    others.

    Raises (from the visit):
        FloatingPointError: the error is not finite; the block is left as it was.
    """

    assert config.lr is not None, "resolve the configuration first"
    peak = config.lr

    def visit(stop: Stop) -> None:
        mine = sum(len(batch) for batch in stop.dense.hidden)
        total = int(distributed.sum_(torch.tensor(mine, device=stop.dense.hidden[0].device)))
        inputs_STH, targets_STH = torch.cat(stop.sparse.hidden)[:mine], torch.cat(stop.dense.hidden)
        energy_H = distributed.sum_(targets_STH.double().square().sum((0, 1))) / (total * targets_STH.shape[1])
        device = next(stop.block.parameters()).device
        weight_H = torch.where(energy_H > 0, 1 / energy_H, 0.0).float().to(device)
        generator = torch.Generator().manual_seed(seed + stop.index)
        updates, update = config.epochs * -(-total // config.batch_size), 0
        with torch.enable_grad(), whole_weights(stop.block) as parameters:
            optimizer = torch.optim.Adam(parameters, lr=peak, betas=(0.9, 0.95), fused=True)
            for _ in range(config.epochs):
                for batch in torch.randperm(total, generator=generator).split(config.batch_size):
                    update += 1
                    for group in optimizer.param_groups:
                        group["lr"] = peak * min(update / max(1, WARMUP * updates), 1 - (update - 1) / updates)
                    rows = distributed.own(batch)
                    if len(rows):
                        error = _error(stop, inputs_STH[rows].to(device), targets_STH[rows].to(device), weight_H)
                        _check(error, stop)
                        (error * (len(rows) / len(batch))).backward()
                    for parameter in parameters:
                        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        distributed.sum_(parameter.grad)
                    optimizer.step()
                    optimizer.zero_grad()

    return visit


def _error(stop: Stop, inputs_bTH: Tensor, targets_bTH: Tensor, weight_H: Tensor) -> Tensor:
    """Mean over channels of the batch's squared error relative to the channel's mean square."""
    difference_bTH = stop.sparse.run(stop.block, stop.index, inputs_bTH).float() - targets_bTH.float()
    return (difference_bTH.square().mean((0, 1)) * weight_H).mean()


def _check(error: Tensor, stop: Stop) -> None:
    if not torch.isfinite(error):
        raise FloatingPointError(f"{stop.name}, block {stop.index}: the error is not finite; lower reconstruct.lr")
