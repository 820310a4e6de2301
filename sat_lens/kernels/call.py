"""One call of PyTorch's fused attention, as data, and the way to catch it.

When not to use it: for attention that calls softmax. See :mod:`sat_lens.sites.softmax`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sat_lens.attention.masks import EXTREME
from sat_lens.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The arguments of ``torch.nn.functional.scaled_dot_product_attention``."""

    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch group key d"]
    value: Float[Tensor, "batch group key dv"]
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Float[Tensor, "batch head query dv"]:
        """Call the kernel."""
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[3:]}
        return F.scaled_dot_product_attention(self.query, self.key, self.value, **rest)

    @property
    def factor(self) -> float:
        """What the kernel multiplies the products of queries and keys by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    def visible(self) -> Bool[Tensor, "*rows key"] | None:
        """Give the mask as bools; None if there is none.

        Raises:
            UnsupportedModelError: The mask adds something to visible scores.
        """
        mask = self.attn_mask
        if mask is None or mask.dtype == torch.bool:
            return mask
        visible = mask == 0
        if not bool((visible | (mask <= max(EXTREME, torch.finfo(mask.dtype).min))).all()):
            raise UnsupportedModelError(
                "Fused attention adds a bias to the scores, which a factor on them would scale as "
                'well. Load the model with attn_implementation="eager".'
            )
        return visible

    def scores(self, rows: Int[Tensor, "batch row"]) -> Float[Tensor, "batch head row key"]:
        """Compute the scores of some query rows of each sequence; a masked key holds ``-inf``.

        Raises:
            UnsupportedModelError: The mask adds something to visible scores.

        Example:
            >>> call = AttentionCall(*torch.ones(3, 1, 1, 2, 4), is_causal=True)
            >>> call.scores(torch.tensor([[0, 1]])).tolist()
            [[[[2.0, -inf], [2.0, 2.0]]]]
        """
        n_heads, n_queries = self.query.shape[1:3]
        key = self.key.repeat_interleave(n_heads // self.key.shape[1], 1)
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        query = self.query.transpose(1, 2)[batch, rows].transpose(1, 2)
        scores = query.float() @ key.float().mT * self.factor
        if self.is_causal:
            future = torch.arange(key.shape[2], device=rows.device) > rows[:, None, :, None]
            scores.masked_fill_(future, -math.inf)
        visible = self.visible()
        if visible is not None:
            shape = (len(rows), visible.shape[-3] if visible.dim() > 2 else 1, n_queries)
            of_rows = visible.expand(*shape, -1).transpose(1, 2)[batch, rows].transpose(1, 2)
            scores.masked_fill_(~of_rows, -math.inf)
        return scores


# What a block does with each call in place of running it.
Handler = Callable[[AttentionCall], Tensor]
_POSITIONAL = [field.name for field in dataclasses.fields(AttentionCall)][:6]


class FusedAttention(TorchFunctionMode):
    """Hands every fused attention that runs inside the block to ``handle``."""

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Route one PyTorch call."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.handle(
                AttentionCall(**dict(zip(_POSITIONAL, args, strict=False)), **kwargs)
            )
        return func(*args, **kwargs)
