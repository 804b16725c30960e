"""Which blocks matter: representation mutual information (RMI), LoSA section 3.2.

Two blocks whose hidden states tell the same story are redundant, and redundant blocks can lose more weights. The paper
measures "the same story" by mutual information, approximated by the normalised Hilbert-Schmidt independence
criterion with a linear kernel, which is linear CKA (https://arxiv.org/abs/1905.00414). For that, only the `n x n` Gram
matrix of each block's features is ever needed, never the features themselves: a block's hidden states of `n` sequences
are one `n x (T*H)` matrix (`T*H` can be 8 million) whose Gram matrix is accumulated chunk by chunk. `L` blocks
cost `O(L n^2)` memory; the released code kept every feature, 34 GB for a 7B model.

Legend: `n` calibration sequences, `D = T*H` features of one sequence, `L` blocks.
"""

import torch
from torch import Tensor

CHUNK = 1 << 16  # features of a sequence multiplied at once


def gram(F_nD: Tensor, chunk: int = CHUNK) -> Tensor:
    """Linear-kernel Gram matrix `K = F F^T`, products in float32, sums over chunks in float64.

    Args:
        F_nD: features, one row a sequence, shape `(n, D)`, any float dtype.
        chunk: columns multiplied at once; bounds the float32 copy to `n * chunk` values.

    Returns:
        `(n, n)` float64, on the device of `F_nD`.
    """
    n, width = F_nD.shape
    K_nn = torch.zeros(n, n, dtype=torch.float64, device=F_nD.device)
    for start in range(0, width, chunk):
        part = F_nD[:, start : start + chunk].float()
        K_nn += (part @ part.T).double()
    return K_nn


def centre(K_nn: Tensor) -> Tensor:
    """Double centring `H K H` with `H = I - 1/n`: removes the mean feature, as HSIC asks."""
    return K_nn - K_nn.mean(0, keepdim=True) - K_nn.mean(1, keepdim=True) + K_nn.mean()


def cka_matrix(grams: list[Tensor]) -> Tensor:
    """Linear CKA between all pairs of blocks, `CKA_ij = <K_i, K_j> / (|K_i| |K_j|)` on centred Gram matrices.

    Args:
        grams: `L` Gram matrices, each `(n, n)`.

    Returns:
        `(L, L)` float64, symmetric, entries in [0, 1]. A block whose features are the same for every sequence
        carries no information: its row is 0.
    """
    K_LN = torch.stack([centre(K.double()).flatten() for K in grams])
    norms = K_LN.norm(dim=1, keepdim=True)
    # Equal features leave a rounding error after centring, not 0; below this, float32 products cannot tell them apart.
    floor = 1e-6 * torch.stack([K.double().norm() for K in grams])[:, None]
    K_LN = torch.where(norms > floor, K_LN / norms, 0.0)
    return (K_LN @ K_LN.T).clamp(0.0, 1.0)


def rmi_importance(cka_LL: Tensor, beta: float = 1.0) -> Tensor:
    """Importance of each block, `I_l = exp(-beta * sum_{j != l} CKA_lj / sum_all)`, LoSA equation 6.

    `sum_all` runs over the off-diagonal entries. High similarity to the other blocks gives a low importance. Only the
    order of the result is used afterwards (see `allocation.layer_rates`), so `beta` changes no sparsity rate.

    Returns:
        `(L,)` float64 in (0, 1].
    """
    off_diagonal = cka_LL - torch.diag(torch.diagonal(cka_LL))
    total = off_diagonal.sum()
    share_L = off_diagonal.sum(1) / total if total > 0 else torch.zeros_like(off_diagonal[0])
    return torch.exp(-beta * share_L)
