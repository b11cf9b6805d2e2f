"""Measure graftkit against its peers: ``python -m benchmarks [NAMES] [--quick]``."""

import sys

from benchmarks.harness.run import main

sys.exit(main())
