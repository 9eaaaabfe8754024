"""Attention from one sequence to another, shared by the resampler and the cross-attention fusion."""

from torch import Tensor, nn
from torch.nn import functional

HEAD_SIZE = 64


def head_count(width: int) -> int:
    """Return how many heads a width is divided into: of `HEAD_SIZE`, or a little more where that does not divide it."""
    return next(n for n in range(max(1, width // HEAD_SIZE), 0, -1) if width % n == 0)


class RmsNorm(nn.RMSNorm):
    """torch's, in the weights' dtype: of two dtypes, as under autocast, it warns and takes a slower way."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; in the dtype of `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to states of another width; queries are normalised (RMS) first.

    Args:
        width: of the queries and of the result.
        states_width: of the states that are attended to.
    """

    def __init__(self, width: int, states_width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.norm = RmsNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(states_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (batch, heads, states, head size), of states (batch, states, states_width)."""
        keys, values = self.key_value(states).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from (batch, len, width) to the states where mask (batch, 1, len or 1, states) is True."""
        query = self._split(self.query(self.norm(queries)))
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
