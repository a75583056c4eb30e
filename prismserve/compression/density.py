"""DPC-KNN clustering: centres are dense and far from anything denser."""

from __future__ import annotations

import torch


def density_centres(features: torch.Tensor, centres: int, neighbours: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster n tokens around the largest products of density and distance to a denser token.

    Du et al., "Study on density peaks clustering based on k-nearest neighbors", Knowledge-Based Systems 99, 2016. The
    published codes add random noise against ties; here the lower index counts as denser.

    Args:
        features: [n, D] float32.
        centres: 1 to n.
        neighbours: tokens whose distances make the density.

    Returns:
        [centres] int64 indices of the centres, ascending, and [n] the number of each token's nearest centre.
    """
    count = features.shape[0]
    distance = torch.cdist(features, features) / features.shape[1] ** 0.5
    nearest = distance.topk(min(neighbours, count), largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    index = torch.arange(count, device=features.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index[None] < index[:, None]))
    apart = distance.masked_fill(~denser, torch.inf).amin(1)
    apart = torch.where(apart.isinf(), distance.max(), apart)
    chosen = (density * apart).argsort(descending=True, stable=True)[:centres].sort().values
    owner = distance[:, chosen].argmin(1)
    owner[chosen] = torch.arange(centres, device=features.device)
    return chosen, owner
