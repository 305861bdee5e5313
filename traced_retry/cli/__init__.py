# SPDX-License-Identifier: Apache-2.0
"""The command line ``traced-retry``; no other part of the package imports it."""
