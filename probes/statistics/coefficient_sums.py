"""What are the n² + 2n coefficients of a connection, on average over the tokens of a step? Their sums over real tokens.

Shapes: B batch, T token, N stream, V view.
"""

from __future__ import annotations

import torch

from depthscope.probes.connections.proof import Parts


def coefficient_sums(parts: Parts, mask_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Sums of H_res, H_pre and H_post of one call of a connection over its real tokens, in float64.

    ``mask_BT``: true on real tokens; None where all are real.
    Returns: ``h_res_sum`` (N, N) as the module computes it, ``h_pre_sum`` and ``h_post_sum`` (N), and
    ``h_pre_token_count``, the number of tokens in ``h_pre_sum``. Weights that do not exist, or have several views, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    if parts.mix is not None:
        found["h_res_sum"] = _over_tokens(parts.mix, mask_BT)
    if parts.write.shape[-1] == 1:
        found["h_post_sum"] = _over_tokens(parts.write.squeeze(-1), mask_BT)
    read = parts.read
    if read is not None and read.shape[-2] == 1:
        found["h_pre_sum"] = _over_tokens(read.squeeze(-2), mask_BT)
        count = torch.tensor(float(read.shape[0] * read.shape[1])) if mask_BT is None else mask_BT.sum()
        found["h_pre_token_count"] = count.double()
    return found


def _over_tokens(weights: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    flat = weights.detach().flatten(0, 1)
    if mask_BT is not None:
        # Not times the mask: NaN on padding times 0 is NaN. Nor by a selection, which would wait for the device.
        real = mask_BT.flatten().to(flat.device).view(-1, *[1] * (flat.ndim - 1))
        flat = torch.where(real, flat, 0.0)
    return flat.sum(0, dtype=torch.float64)
