"""Warnings of precisions that a machine does not have."""

import warnings

import pytest
import torch

from sublimate.training.precision import warn_of_slow_bf16


def test_bf16_that_a_cpu_does_not_have_is_warned_of():
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_slow_bf16(torch.device("cpu"))
    else:
        with pytest.warns(UserWarning, match="set mixed_precision to no"):
            warn_of_slow_bf16(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_bf16(torch.device("meta"))
