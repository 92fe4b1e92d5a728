"""The two ways in which published networks pad a convolution; they differ where it strides.

An even image under a 3x3 window of stride 2 wants one row and one column more: TensorFlow's
"SAME" adds them at the end, PyTorch's padding=1 at the start (and one more, unused, at the end).
Weights trained with one lose accuracy under the other.
"""

from collections.abc import Sequence
from typing import Literal

Padding = Literal["same", "symmetric"]


def lax_padding(padding: Padding, window: int) -> str | Sequence[tuple[int, int]]:
    """The `padding` argument of `nn.Conv` and of pooling, for a square window on images.

    Args:
      padding: "same" as in Keras and TensorFlow, "symmetric" as in PyTorch.
      window: taps along height and along width.

    Raises:
      ValueError: another name.
    """
    if padding == "same":
        return "SAME"
    if padding == "symmetric":
        return [(window // 2, window // 2)] * 2
    raise ValueError(f'padding is "same" or "symmetric", not {padding!r}')
