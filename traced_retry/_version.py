# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("traced-retry")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
