"""`python -m synchromesh`: the command line."""

import sys

from synchromesh.cli import main

sys.exit(main())
