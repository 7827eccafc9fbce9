"""`python -m depthscope` is the command `depthscope`."""

import sys

from depthscope.app.cli.main import main

sys.exit(main())
