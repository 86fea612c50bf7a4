"""One thread at the start of each test, whatever the test before it left."""

import pytest
import torch


@pytest.mark.parametrize("left", [2, 3])
def test_what_a_test_sets_leads_nowhere_else(left: int) -> None:
    assert torch.get_num_threads() == 1
    torch.set_num_threads(left)
