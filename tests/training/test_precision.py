"""Warnings of precisions that a machine does not have."""

import warnings

import pytest
import torch

from sublimate.training.precision import warn_of_launchers_precision, warn_of_slow_bf16


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


def test_a_launchers_precision_that_does_not_count_is_warned_of():
    with pytest.warns(UserWarning, match=r"says mixed_precision=fp16, and the run's own bf16 counts"):
        warn_of_launchers_precision("fp16", "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for launchers in ("no", "bf16"):
            warn_of_launchers_precision(launchers, "bf16")
