# SPDX-License-Identifier: Apache-2.0
"""LLaVA-style video LLM over codec-selected patches. This release is the installable skeleton."""

from importlib.metadata import version

__version__ = version("llava-codec")

__all__ = ["__version__"]
