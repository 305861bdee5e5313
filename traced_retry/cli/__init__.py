# SPDX-License-Identifier: Apache-2.0
"""The command line ``traced-retry``. The other packages do not import it."""
