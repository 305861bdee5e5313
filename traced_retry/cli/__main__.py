# SPDX-License-Identifier: Apache-2.0
"""Run the command line with ``python -m traced_retry.cli``."""

from traced_retry.cli.main import main

if __name__ == "__main__":
    main()
