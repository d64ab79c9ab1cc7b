"""The sum of a block's two paths."""

import pytest
import torch

from residrop.functional.call import combined


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("includes_input", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_rows_of_several_lengths(scale, includes_input):
    """As nn.TransformerEncoder gives them to its layers in eval mode, with padding and without gradients."""
    skip = [torch.randn(tokens, 4) for tokens in (3, 1, 2)]
    out = [torch.randn(tokens, 4) for tokens in (3, 1, 2)]
    found = combined(torch.nested.nested_tensor(skip), torch.nested.nested_tensor(out), scale, includes_input)
    for x, y, z in zip(skip, out, found.unbind(), strict=True):
        torch.testing.assert_close(z, x + scale * (y - x if includes_input else y))
