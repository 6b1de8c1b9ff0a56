"""Provenance names the versions, also of what is missing."""

import torch

from sublimate.pipelines import versions as module
from sublimate.pipelines.versions import versions


def test_versions_survive_a_package_that_is_not_installed(monkeypatch):
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"
