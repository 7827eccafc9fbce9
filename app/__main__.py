"""`python -m app` is the command `depthscope`."""

import sys

from app.cli import main

sys.exit(main())
