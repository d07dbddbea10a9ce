# SPDX-License-Identifier: Apache-2.0
"""Settings that all test folders share."""

from hypothesis import HealthCheck, settings

# the same examples in every run and on every worker; nothing is timed
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=30
)
settings.load_profile("repository")
