# SPDX-License-Identifier: Apache-2.0
"""SDK set-up and the local store."""
