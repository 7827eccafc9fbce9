"""What are the n² + 2n coefficients of a connection, on average over the tokens of a step? Their sums over real tokens.

Shapes: B batch, T token, N stream, V view; K the sampled sequences.
"""

from __future__ import annotations

import torch

from depthscope.probes.connections.coefficients import Parts


def coefficient_sums(
    complete: Parts, sampled: Parts | None, mask_BT: torch.Tensor | None, rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums of H_res, H_pre and H_post of one call of a connection over its real tokens, in float64.

    ``sampled``: of the sampled sequences, where more was read of these: H_pre may be known of them alone.
    ``mask_BT``: true on real tokens; None where all are real.
    Returns: ``h_res_sum`` (N, N) as the module computes it, ``h_pre_sum`` and ``h_post_sum`` (N), and
    ``h_pre_token_count``, the number of tokens in ``h_pre_sum``. Weights that do not exist, or have several views, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    if complete.mix is not None:
        found["h_res_sum"] = _over_tokens(complete.mix, mask_BT)
    if complete.write.shape[-1] == 1:
        found["h_post_sum"] = _over_tokens(complete.write.squeeze(-1), mask_BT)
    read, mask = complete.read, mask_BT
    if read is None and sampled is not None:
        read, mask = sampled.read, None if mask_BT is None else mask_BT[rows.to(mask_BT.device)]
    if read is not None and read.shape[-2] == 1:
        found["h_pre_sum"] = _over_tokens(read.squeeze(-2), mask)
        count = torch.tensor(float(read.shape[0] * read.shape[1])) if mask is None else mask.sum()
        found["h_pre_token_count"] = count.double()
    return found


def _over_tokens(weights: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    flat = weights.detach().flatten(0, 1)
    if mask_BT is not None:
        # Not times the mask: NaN on padding times 0 is NaN. Nor by a selection, which would wait for the device.
        real = mask_BT.flatten().to(flat.device).view(-1, *[1] * (flat.ndim - 1))
        flat = torch.where(real, flat, 0.0)
    return flat.sum(0, dtype=torch.float64)
