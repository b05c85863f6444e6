"""How hypothesis draws: PACKFMT_TEST_PROFILE names the profile."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: the first example of a test may compile a kernel. Derandomized: a run can be repeated.
settings.register_profile("default", deadline=None, derandomize=True)
# for kernels with bounds checks or without compiler, where an example takes a hundred times as long
settings.register_profile(
    "slow_interpreter",
    settings.get_profile("default"),
    max_examples=5,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# for a person hunting: many new examples each time
settings.register_profile("hunt", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("PACKFMT_TEST_PROFILE", "default"))
